"""Starting a run on a FLARE server, following it, and starting it again when a server or a site comes back.

The run is in its folder, on the server's machine; FLARE is told to work on it, as often as it takes. Nothing
is lost by a job that ends early: what was committed stays, and what sites had sent is in the journal.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polyrank import durable
from polyrank.config import Config, Flare
from polyrank.errors import InputError, RunError, first_line
from polyrank.export import read_config
from polyrank.ledger import RunFolder, create_run_folder
from polyrank.messages import ClientId
from polyrank.network import ENDED, PAUSE, SITES, write_job

ADMIN = "admin@polyrank.local"
FEDERATION = "federation.json"
_POLL_S, _ASK_EVERY, _BACK_OFF_S, _FRUITLESS = 1.0, 3, 5.0, 5
_BEGIN_S = 300.0
"""A job that has not opened its run by then is given up."""


@dataclass
class Admin:
    """A connection to the server that is made when needed, and made again after it broke."""

    kit: Path
    session: Any = field(default=None, repr=False)

    def ask(self, command: str, *given: Any) -> Any:
        """Raises: ConnectionError when the server cannot be reached or does not accept the kit."""
        from nvflare.fuel.flare_api.flare_api import new_secure_session

        try:
            with contextlib.redirect_stdout(io.StringIO()):
                if self.session is None:
                    self.session = new_secure_session(ADMIN, str(self.kit), timeout=30.0)
                return getattr(self.session, command)(*given)
        except Exception as error:  # the library raises many kinds
            self.close()
            raise ConnectionError(first_line(error)) from error

    def connected(self) -> dict[ClientId, float]:
        """The sites that are connected, and when each was heard of last (seconds since 1970)."""
        found = self.ask("get_system_info").client_info
        return {client.name: client.last_connect_time for client in found}

    def idle(self) -> set[ClientId]:
        """The sites that are connected and work on no job."""
        rows = self.ask("get_client_job_status") or []
        return {row["client_name"] for row in rows if row.get("status") == "no_jobs"}

    def is_over(self, job: str) -> bool:
        """Whether FLARE has ended a job, in whatever way."""
        return str(self.ask("get_job_meta", job).get("status", "")).startswith(("FINISHED", "ABANDONED"))

    def close(self) -> None:
        """Log out; a server that is gone does not mind."""
        if self.session is not None:
            with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
                self.session.close()
        self.session = None


def kit_sites(kit: Path) -> list[ClientId]:
    """The sites that a federation was made for.

    Raises: InputError when the folder is no administrator's kit.
    """
    try:
        found: list[ClientId] = json.loads((kit / FEDERATION).read_text(encoding="utf-8"))["sites"]
    except (OSError, ValueError, KeyError) as error:
        allowed = "is no administrator's kit; `polyrank provision` makes one"
        raise InputError("engine.kit", str(kit), allowed) from error
    return found


def open_remote(config: Config, out: Path | None) -> RunFolder:
    """A new run folder with its config in it; what lies on this machine is named in full."""
    assert isinstance(config.engine, Flare)
    kit_sites(Path(config.engine.kit))
    changes = {
        "engine": config.engine.model_copy(update={"kit": str(Path(config.engine.kit).resolve())}),
        "data": config.data.model_copy(update={"test": str(Path(config.data.test or "").resolve())}),
    }
    if Path(config.model.name).is_dir():
        changes["model"] = config.model.model_copy(update={"name": str(Path(config.model.name).resolve())})
    folder = create_run_folder(out, f"{config.method}-network")
    folder.write("config.json", config.model_copy(update=changes).model_dump(mode="json"))
    folder.release()
    return folder


def follow(path: Path) -> Iterator[dict[str, Any]]:
    """Have a run worked on until it is finished; yields its rows as they are committed, then the summary.

    Raises:
        InputError: config, data or a site do not fit; the run did not begin.
        RunError: it cannot go on.
    """
    folder = RunFolder(path.resolve())
    engine = read_config(folder).engine
    assert isinstance(engine, Flare)
    admin = Admin(Path(engine.kit))
    wanted, shown, fruitless = kit_sites(admin.kit), len(folder.read_rows("rounds.jsonl")), 0
    try:
        while not (folder.path / "summary.json").exists():
            before = shown
            for row in _stretch(admin, folder, wanted, shown):
                shown += 1
                yield row
            line = _why_it_ended(folder)
            fruitless = 0 if shown > before else fruitless + 1
            if fruitless == _FRUITLESS:
                raise RunError(f"{line or 'the job ended'}; {_FRUITLESS} tries in a row committed no round")
            if line:
                _tell(f"{line}; going on")
                time.sleep(_BACK_OFF_S * fruitless)
    finally:
        admin.close()
    yield folder.read("summary.json")


def _stretch(
    admin: Admin, folder: RunFolder, wanted: Sequence[ClientId], shown: int
) -> Iterator[dict[str, Any]]:
    """One job from submission to end."""
    _wait_for_lock(folder.path)
    begun = (folder.path / SITES).exists()
    sites = _gather(admin, wanted, begun)
    for name in (ENDED, PAUSE):
        (folder.path / name).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        write_job(folder.path, sites, Path(scratch) / "polyrank")
        try:
            job = admin.ask("submit_job", str(Path(scratch) / "polyrank"))
        except ConnectionError as error:
            _tell(f"the server did not take the job ({error})")
            return
    yield from _watch(admin, folder, wanted, job, shown)


def _watch(
    admin: Admin, folder: RunFolder, wanted: Sequence[ClientId], job: str, shown: int
) -> Iterator[dict[str, Any]]:
    """The rows of a job until it ends; a server that does not answer for a while is no end.

    That the job has begun shows in the run folder, and so does its end, whatever FLARE knows: it holds the
    folder's lock for as long as it lives.
    """
    started, before, missed = time.monotonic(), _stamp(folder.path), set[ClientId]()
    for turn in itertools.count(1):
        time.sleep(_POLL_S)
        ended = (folder.path / ENDED).exists()
        rows = folder.read_rows("rounds.jsonl")  # after the question, so that none of an ended job is missed
        yield from rows[shown:]
        shown = max(shown, len(rows))
        if ended:
            return _wait_for_end(admin, job)
        if _stamp(folder.path) != before:
            if _is_free(folder.path):  # it ends, or was killed
                time.sleep(3 * _POLL_S)
                return _wait_for_end(admin, job)
        elif time.monotonic() - started > _BEGIN_S:
            return None
        if turn % _ASK_EVERY:
            continue
        try:
            if _stamp(folder.path) == before:
                if admin.is_over(job):
                    return None
                continue
            idle = set(wanted) & admin.idle()
        except ConnectionError as error:
            _tell(f"the server does not answer ({error})")
            continue
        if idle and idle <= missed and not (folder.path / PAUSE).exists():
            _tell(f"{', '.join(sorted(idle))} came back, and takes part from the next round on")
            (folder.path / PAUSE).touch()
        missed = idle


def _stamp(run: Path) -> int:
    """When a job last wrote down which sites it has."""
    with contextlib.suppress(FileNotFoundError):
        return (run / SITES).stat().st_mtime_ns
    return 0


def _is_free(run: Path) -> bool:
    with contextlib.suppress(InputError):
        durable.lock(run).release()
        return True
    return False


def _gather(admin: Admin, wanted: Sequence[ClientId], begun: bool) -> list[ClientId]:
    """Wait for the sites: all of them when a run begins, any of them later."""
    told: object = None
    while True:
        try:
            there = sorted(set(admin.connected()) & set(wanted))
            state: object = there
        except ConnectionError as error:
            there, state = [], str(error)
        if there and (begun or len(there) == len(wanted)):
            return there
        if state != told:
            missing = ", ".join(sorted(set(wanted) - set(there)))
            _tell(f"waiting for the server ({state})" if isinstance(state, str) else f"waiting for {missing}")
            told = state
        time.sleep(2 * _POLL_S)


def _wait_for_lock(path: Path, patience_s: float = 60.0) -> None:
    """A job that was just ended may still hold the run folder.

    Raises: InputError when it is held for longer.
    """
    until = time.monotonic() + patience_s
    while not _is_free(path) and time.monotonic() < until:
        time.sleep(_POLL_S)
    durable.lock(path).release()


def _wait_for_end(admin: Admin, job: str, patience_s: float = 60.0) -> None:
    until = time.monotonic() + patience_s
    with contextlib.suppress(ConnectionError):
        while time.monotonic() < until and not admin.is_over(job):
            time.sleep(_POLL_S / 2)


def _why_it_ended(folder: RunFolder) -> str:
    """What the job said at its end; empty when it was cut off or the run goes on by itself.

    Raises: InputError when the job found something wrong that no further try would mend.
    """
    if not (folder.path / ENDED).exists():
        return "the job was cut off"
    ended = folder.read(ENDED)
    if ended["code"] == 2:
        key, _, rest = str(ended["line"]).partition(" = ")
        value, _, allowed = rest.partition(": ")
        raise InputError(key, value.strip("'"), allowed)
    return str(ended["line"])


def status(path: Path) -> list[dict[str, Any]]:
    """One row per site: connected, last seen, device, texts, and its slots in the last round.

    Raises: InputError when the folder is no run over a network.
    """
    folder = RunFolder(path)
    engine = read_config(folder).engine
    if not isinstance(engine, Flare):
        raise InputError("RUN", str(path), "is not a run over a network; its clients are simulated")
    admin = Admin(Path(engine.kit))
    try:
        seen = admin.connected()
    except ConnectionError as error:
        _tell(f"the server does not answer ({error})")
        seen = {}
    finally:
        admin.close()
    told = folder.read(SITES) if (folder.path / SITES).exists() else {}
    last = {row["client"]: row for row in folder.read_rows("clients.jsonl")}
    names = sorted({*kit_sites(admin.kit), *told})
    return [
        {
            "site": name,
            "connected": name in seen,
            "seen_s_ago": round(time.time() - seen[name], 1) if name in seen else None,
            **{key: told.get(name, {}).get(key) for key in ("device", "num_examples", "pid", "loads")},
            "round": last[name]["round"] if name in last else None,
            "slots": last[name]["slots"] if name in last else None,
            "error": last[name]["error"] if name in last else None,
        }
        for name in names
    ]


def _tell(line: str) -> None:
    print(f"polyrank: {line}", file=sys.stderr, flush=True)
