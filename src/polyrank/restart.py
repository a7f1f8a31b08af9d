"""A run that stopped goes on from its last checkpoint, to the same bits as if it had never stopped."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from polyrank import durable
from polyrank.assemble import Experiment, Network, prepare
from polyrank.client import MissingFoldsError, catch_up
from polyrank.commit import Committed, Manifest, newest, rewind
from polyrank.errors import InputError
from polyrank.experiment import JOURNAL, Result, close_folder, conduct, describe
from polyrank.export import config_digest, read_config
from polyrank.ledger import RunFolder
from polyrank.messages import Folds
from polyrank.report import REPORT


@dataclass(frozen=True, slots=True)
class Reopened:
    """A run folder that this process may write, and how far its run had come.

    Args:
        summary: of a run that is finished.
        committed: the checkpoint to go on from; None where the run stopped before the first.
        complaints: a line about each newer checkpoint that is damaged.
    """

    folder: RunFolder
    summary: dict[str, Any] | None
    committed: Committed | None
    complaints: list[str]


def resume(run: str | Path) -> Result:
    """Finish a run that stopped; one that is finished stays as it is.

    Raises:
        InputError: the folder holds no run, another process writes it, or its config, data or model changed.
        RunError: the run cannot go on.
    """
    reopened = reopen(Path(run))
    if reopened.summary is not None:
        return Result(reopened.folder.path, reopened.summary)
    experiment, manifest = restore(reopened)
    rows = list(conduct(experiment, reopened.folder, manifest))
    return Result(reopened.folder.path, rows[-1])


def reopen(path: Path) -> Reopened:
    """Take the lock of a run folder and find its last checkpoint.

    Raises: InputError when there is no run, another process writes it, or no checkpoint verifies.
    """
    if durable.kind_at(path / "config.json") != "file":
        allowed = "is no run folder that can go on (it holds no config.json); start the run anew"
        raise InputError("RUN", str(path), allowed)
    folder = RunFolder(path)
    if (path / "summary.json").exists() and (path / REPORT).exists():  # it may lie where nobody can write
        return Reopened(folder, folder.read("summary.json"), None, [])
    folder = RunFolder(path, durable.lock(path))
    if (path / "summary.json").exists():
        close_folder(folder)
        folder.release()
        return Reopened(folder, folder.read("summary.json"), None, [])
    committed, complaints = newest(folder)
    return Reopened(folder, None, committed, complaints)


def restore(reopened: Reopened, network: Network | None = None) -> tuple[Experiment, Manifest | None]:
    """The experiment as it stood at the checkpoint, and the checkpoint's manifest.

    Args:
        network: the way to real sites, where the run has some.

    Raises: InputError when the config, the data or the model are not those that the run began with.
    """
    folder, committed = reopened.folder, reopened.committed
    if committed is not None:
        _unchanged(committed, "config", config_digest(folder), ("RUN", str(folder.path / "config.json")))
    experiment = prepare(read_config(folder), network)
    if committed is None:
        durable.drop_folder(folder.path / JOURNAL)
        rewind(folder, None)
        describe(experiment, folder)
        return experiment, None
    config, found = experiment.config, experiment.inputs()
    _unchanged(committed, "data", found["data"], ("data.source", config.data.source))
    _unchanged(committed, "model", found["model"], ("model.name", config.model.name))
    rewind(folder, committed)
    _give_back_folds(experiment, committed)
    state = committed.state
    if network is not None:  # their processes began anew as well, and hold no fold
        state = replace(state, clients={c: replace(record, folds=0) for c, record in state.clients.items()})
    return replace(experiment, start=state), committed.manifest


def _unchanged(committed: Committed, name: str, found: str, told: tuple[str, str]) -> None:
    """Raises: InputError, of a key and its value, when an input is not the one that the run began with."""
    if committed.manifest["inputs"].get(name) != found:
        raise InputError(*told, "has changed since the run began, so that the run cannot go on")


def _give_back_folds(experiment: Experiment, committed: Committed) -> None:
    """Every simulated device holds all folds.

    What it is sent again it knows, and what it answered before
    the stop, in the journal, it will not be asked for, and so not be sent.
    """
    state, model = committed.state, experiment.model
    try:
        catch_up(model, [], Folds(0, state.folds))
    except MissingFoldsError as error:
        allowed = f"gives another start than the run began with ({error})"
        raise InputError("model.name", experiment.config.model.name, allowed) from error
    for env in experiment.environments.values():
        env.folds[:] = model.folded
