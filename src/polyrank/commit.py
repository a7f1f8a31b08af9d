"""The commit of a round: all of it is on the disk, or none of it.

    1  rows go to the end of the ledgers            5  the state without folds
    2  fsync of the run folder                      6  the manifest says size and sha256 of every part
    3  folds that are new, each a file of its own   7  fsync of the folder, rename to 00004
    4  a folder 00004.tmp, swept if one was there   8  fsync of the folder above
                                                    9  checkpoints past ``keep_last`` go

Every file is synced before the manifest is, and the manifest before the rename. So a checkpoint that has its
name is whole; one that is damaged later does not verify, and the one before it is taken. Ledgers are only
appended to: a manifest names their length, and a resumed run cuts what is past it.
Sampling and local training draw from seeds of (seed, round, client): the round number is their whole state.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from polyrank import durable
from polyrank.checkpoint import STATE_FILE, StateError, decode_fold, decode_state, encode_fold, encode_state
from polyrank.errors import InputError
from polyrank.ledger import LEDGERS, RunFolder
from polyrank.state import ServerState

CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
FORMAT = 1
Manifest = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Committed:
    """A checkpoint that was read back and verified."""

    state: ServerState
    manifest: Manifest


class DamagedError(ValueError):
    """A checkpoint that is not what its manifest says."""


def first_manifest(inputs: Mapping[str, str]) -> Manifest:
    """What stands before the first commit.

    Args:
        inputs: fingerprints of what a run is made from; a resumed run must have the same.
    """
    return {"inputs": dict(inputs), "folds": [], "wall_s": 0.0}


def commit(
    folder: RunFolder, state: ServerState, before: Manifest, wall_s: float, keep_last: int
) -> Manifest:
    """Make the state between two rounds last; returns its manifest.

    Args:
        before: the manifest of the commit before this one.
        wall_s: measured seconds the run has taken since that one.

    Raises: RunError when the disk does not take it; the checkpoint before it is untouched.
    """
    home = folder.path / CHECKPOINTS
    with durable.disk_errors(home):
        home.mkdir(exist_ok=True)
        durable.sync_folder(folder.path)  # its name, and those of ledgers that were begun since
        data = encode_state(replace(state, folds=()))
        folds = {number: encode_fold(state.folds[number]) for number in _new(state, before)}
        durable.need_space(home, len(data) + sum(map(len, folds.values())))
        for number, fold in folds.items():
            durable.replace(_fold_path(home, number), fold)
        manifest = {
            "format": FORMAT,
            "round": state.round,
            "seed": state.seed,
            "inputs": before["inputs"],
            "state": _entry(data),
            "folds": [*before["folds"], *map(_entry, folds.values())],
            "ledgers": {name: _entry(read) for name, read in _ledgers(folder)},
            "wall_s": before["wall_s"] + wall_s,
        }
        target = _place(home, state.round)
        unfinished = target.with_name(f"{target.name}.tmp")
        durable.drop_folder(target)
        os.mkdir(unfinished)
        durable.write(unfinished / STATE_FILE, data)
        durable.write(unfinished / MANIFEST, _seal(manifest))
        durable.sync_folder(unfinished)
        os.rename(unfinished, target)
        durable.sync_folder(home)
        for number in sorted(_numbers(home))[:-keep_last]:
            durable.drop_folder(_place(home, number))
        for left in home.glob("[0-9]*.tmp"):  # by a kill amid such a sweep
            shutil.rmtree(left, ignore_errors=True)
    return manifest


def newest(folder: RunFolder) -> tuple[Committed | None, list[str]]:
    """The last checkpoint that verifies, and a line about each newer one that does not.

    Raises: InputError when there are checkpoints and none verifies.
    """
    home, complaints = folder.path / CHECKPOINTS, list[str]()
    for number in sorted(_numbers(home), reverse=True):
        try:
            return _verified(folder, number), complaints
        except DamagedError as error:
            complaints.append(f"checkpoint {number:05d} is damaged: {error}")
    if complaints:
        raise InputError("RUN", str(folder.path), f"holds no checkpoint that verifies ({complaints[0]})")
    return None, []


def rewind(folder: RunFolder, committed: Committed | None) -> None:
    """Take away what came after a checkpoint: rows past its ledgers, and checkpoints that are damaged.

    Raises: RunError when the disk does not let it.
    """
    home = folder.path / CHECKPOINTS
    ledgers = committed.manifest["ledgers"] if committed else {}
    with durable.disk_errors(folder.path):
        for name in LEDGERS:
            path, size = folder.path / name, ledgers.get(name, {"bytes": 0})["bytes"]
            if path.exists() and path.stat().st_size > size:
                os.truncate(path, size)
        kept = committed.state.round if committed else -1
        for number in _numbers(home):
            if number > kept:
                durable.drop_folder(_place(home, number))


def _verified(folder: RunFolder, number: int) -> Committed:
    """Raises: DamagedError when any part is not the one that was committed."""
    home = folder.path / CHECKPOINTS
    manifest = _unseal(_read(_place(home, number) / MANIFEST))
    try:
        if manifest["format"] != FORMAT or manifest["round"] != number:
            raise DamagedError(f"{MANIFEST}: is of format {manifest['format']}, round {manifest['round']}")
        data = _read(_place(home, number) / STATE_FILE, manifest["state"])
        folds = [_read(_fold_path(home, n), entry) for n, entry in enumerate(manifest["folds"])]
        for name, entry in manifest["ledgers"].items():
            if name in LEDGERS:
                _read(folder.path / name, entry)
        state = decode_state(data)
        return Committed(replace(state, folds=[decode_fold(fold) for fold in folds]), manifest)
    except (KeyError, TypeError, StateError) as error:
        raise DamagedError(f"{MANIFEST}: {error}") from error


def _read(path: Path, entry: Mapping[str, Any] | None = None) -> bytes:
    """The bytes that an entry vouches for, from the start of a file; without one, all of it."""
    try:
        with path.open("rb") as file:
            data = file.read() if entry is None else file.read(entry["bytes"])
    except OSError as error:
        raise DamagedError(f"{path.name}: {error.strerror}") from error
    if entry is not None and _entry(data) != entry:
        raise DamagedError(f"{path.name} is not the file that was committed")
    return data


def _entry(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _ledgers(folder: RunFolder) -> Iterator[tuple[str, bytes]]:
    for name in LEDGERS:
        if (folder.path / name).exists():
            yield name, (folder.path / name).read_bytes()


def _seal(manifest: Manifest) -> bytes:
    """The manifest as JSON beside its own sha256; a manifest has one spelling."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({"manifest": manifest, "sha256": digest}, indent=1, sort_keys=True).encode()


def _unseal(data: bytes) -> Manifest:
    try:
        manifest: Manifest = json.loads(data)["manifest"]
        whole = _seal(manifest) == data
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise DamagedError(f"{MANIFEST} is not the file that was committed")
    return manifest


def _new(state: ServerState, before: Manifest) -> range:
    return range(len(before["folds"]), len(state.folds))


def _place(home: Path, number: int) -> Path:
    return home / f"{number:05d}"


def _fold_path(home: Path, number: int) -> Path:
    return home / f"fold-{number:05d}.safetensors"


def _numbers(home: Path) -> list[int]:
    return [int(path.name) for path in home.glob("[0-9]*") if path.name.isdigit()]
