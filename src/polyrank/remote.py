"""Starting a run on a FLARE server, following it, and starting it again when a server or a site comes back.

The run is in its folder, on the server's machine; FLARE is told to work on it, as often as it takes. Nothing
is lost by a job that ends early: what was committed stays, and what sites had sent is in the journal.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polyrank import durable
from polyrank.config import Config, Flare
from polyrank.errors import InputError, RunError, first_line, printable
from polyrank.export import read_config
from polyrank.kit import wrong_with
from polyrank.ledger import RunFolder, create_run_folder
from polyrank.messages import ClientId
from polyrank.network import ENDED, JOB, PAUSE, SITES, write_job
from polyrank.report import REPORT
from polyrank.restart import reopen
from polyrank.sampling import expected_share

ADMIN = "admin@polyrank.local"
FEDERATION = "federation.json"
_SAID = "polyrank: "
_POLL_S, _ASK_EVERY, _BACK_OFF_S, _FRUITLESS = 1.0, 3, 5.0, 5
_BEGIN_S = 300.0
"""A job that has not opened its run by then is given up."""
_TOGETHER_S = 60.0
"""How long a run that goes on waits for all its sites, before it does with some."""
_FRESH_S = 45.0
"""A site says every 10 s that it is there; one that was not heard of for longer is away."""
_LEFT_OUT_S = 300.0
"""How long a site is left out whose process did not come up."""


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
                    _quiet()
                    self.session = new_secure_session(ADMIN, str(self.kit), timeout=30.0)
                return getattr(self.session, command)(*given)
        except Exception as error:  # the library raises many kinds
            self.close()
            raise ConnectionError(first_line(error)) from error

    def last_seen(self) -> dict[ClientId, float]:
        """The sites that the server knows, and when each was heard of last (seconds since 1970)."""
        found = self.ask("get_system_info").client_info
        return {client.name: client.last_connect_time for client in found}

    def connected(self) -> set[ClientId]:
        """The sites that are there; FLARE itself counts one that died as connected for ten minutes more."""
        return {name for name, seen in self.last_seen().items() if time.time() - seen < _FRESH_S}

    def idle(self) -> set[ClientId]:
        """The sites that are connected and work on no job."""
        rows = self.ask("get_client_job_status") or []
        return {row["client_name"] for row in rows if row.get("status") == "no_jobs"}

    def is_over(self, job: str) -> bool:
        """Whether FLARE has ended a job, in whatever way."""
        return str(self.ask("get_job_meta", job).get("status", "")).startswith(("FINISHED", "ABANDONED"))

    def last_words(self, job: str) -> str:
        """What a job that could not write into its run folder said at last; empty when it said nothing."""
        with contextlib.suppress(ConnectionError):
            log = str(self.ask("get_job_logs", job)["logs"].get("server", ""))
            said = [line.rpartition(_SAID)[2] for line in log.splitlines() if _SAID in line]
            return printable(said[-1], 500) if said else ""
        return ""

    def close(self) -> None:
        """Log out; a server that is gone does not mind."""
        if self.session is not None:
            with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
                self.session.close()
        self.session = None


def kit_sites(kit: Path) -> list[ClientId]:
    """The sites that a federation was made for.

    Raises: InputError when the folder is no administrator's kit, or its certificate has run out.
    """
    try:
        found: list[ClientId] = json.loads((kit / FEDERATION).read_text(encoding="utf-8"))["sites"]
    except (OSError, ValueError, KeyError) as error:
        allowed = "is no administrator's kit; `polyrank provision` makes one"
        raise InputError("engine.kit", str(kit), allowed) from error
    if (defect := wrong_with(kit / "startup" / "client.crt", kit / "startup" / "rootCA.pem")) is not None:
        raise InputError("engine.kit", str(kit), defect)
    return found


def open_remote(config: Config, out: Path | None) -> RunFolder:
    """A new run folder with its config in it; what lies on this machine is named in full."""
    assert isinstance(config.engine, Flare)
    kit_sites(Path(config.engine.kit))
    changes: dict[str, Any] = {
        "engine": config.engine.model_copy(update={"kit": str(Path(config.engine.kit).resolve())}),
        "data": config.data.model_copy(update={"test": str(Path(config.data.test or "").resolve())}),
    }
    if config.fleet is not None and Path(config.fleet.name).is_file():
        changes["fleet"] = config.fleet.model_copy(update={"name": str(Path(config.fleet.name).resolve())})
    if Path(config.model.name).is_dir():
        changes["model"] = config.model.model_copy(update={"name": str(Path(config.model.name).resolve())})
    folder = create_run_folder(out, f"{config.method}-network")
    folder.write("config.json", config.model_copy(update=changes).model_dump(mode="json"))
    folder.release()
    return folder


@dataclass
class Following:
    """What is known of a run that is followed.

    Args:
        needed: how many sites a round can do with.
        shown: rows that were seen.
        job: the one that works on the run, or did last; ``begun``: it opened the run folder.
        behind: sites of that job that had no part in it when others had.
        left_out: until when a site is left out, of those whose process did not come up.
    """

    admin: Admin
    folder: RunFolder
    wanted: Sequence[ClientId]
    needed: int = 1
    shown: int = 0
    job: str = ""
    begun: bool = False
    behind: set[ClientId] = field(default_factory=set)
    left_out: dict[ClientId, float] = field(default_factory=dict)

    def out(self) -> set[ClientId]:
        """The sites that are left out now."""
        return {site for site, until in self.left_out.items() if time.monotonic() < until}


def follow(path: Path) -> Iterator[dict[str, Any]]:
    """Have a run worked on until it is finished; yields its rows as they are committed, then the summary.

    Raises:
        InputError: config, data or a site do not fit; the run did not begin.
        RunError: it cannot go on.
    """
    folder = RunFolder(path.resolve())
    config = read_config(folder)
    assert isinstance(config.engine, Flare)
    kit = Path(config.engine.kit)
    admin, wanted = Admin(kit), kit_sites(kit)
    cohort = round(expected_share(config.sampling, len(wanted)) * len(wanted))
    run = Following(admin, folder, wanted, config.failures.needed(cohort))
    run.shown, tries, fruitless = len(folder.read_rows("rounds.jsonl")), 0, 0
    try:
        while not (folder.path / "summary.json").exists():
            before = run.shown
            yield from _stretch(run)
            line = _why_it_ended(run)
            tries, fruitless = (0, 0) if run.shown > before else (tries + 1, fruitless + _all_there(run))
            if fruitless == _FRUITLESS:
                raise RunError(f"{line or 'the job ended'}; {_FRUITLESS} tries in a row committed no round")
            if line:
                _tell(f"{line}; going on")
                time.sleep(_BACK_OFF_S * min(tries, _FRUITLESS))
    except (KeyboardInterrupt, GeneratorExit):  # the latter when it was whoever takes the rows
        _abort(run)
        raise
    finally:
        admin.close()
    if not (folder.path / REPORT).exists():  # the job ended between the two
        _wait_for_lock(folder.path)
        reopen(folder.path)
    yield folder.read("summary.json")


def _stretch(run: Following) -> Iterator[dict[str, Any]]:
    """One job from submission to end, or the rest of one that is at work already."""
    path, run.behind, run.begun = run.folder.path, set(), False
    if durable.is_held(path) and (path / JOB).exists() and not (path / ENDED).exists():
        run.job = run.folder.read(JOB)["job"]
        _tell(f"job {run.job} works on it already")
        yield from _watch(run, run.wanted)
        return
    _wait_for_lock(path)
    sites = _gather(run)
    for name in (ENDED, PAUSE):
        (path / name).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        write_job(path, sites, Path(scratch) / "polyrank")
        try:
            run.job = run.admin.ask("submit_job", str(Path(scratch) / "polyrank"))
        except ConnectionError as error:
            _tell(f"the server did not take the job ({error})")
            return
    before = _stamp(path)
    yield from _watch(run, sites)
    found = run.folder.read(JOB) if (path / JOB).exists() else {}
    for line in found.get("complaints", ()) if found.get("job") == run.job else ():
        _tell(line)
    if _stamp(path) == before and run.behind:
        _tell(f"{', '.join(sorted(run.behind))} did not come up, and is left out for {_LEFT_OUT_S:.0f} s")
        run.left_out |= dict.fromkeys(run.behind, time.monotonic() + _LEFT_OUT_S)


def _watch(run: Following, sites: Sequence[ClientId]) -> Iterator[dict[str, Any]]:
    """The rows of a job until it ends; a server that does not answer for a while is no end.

    That the job has begun shows in the run folder, and so does its end, whatever FLARE knows: it holds the
    folder's lock for as long as it lives.
    """
    path, missed = run.folder.path, set[ClientId]()
    started, before = time.monotonic(), _stamp(path)
    for turn in itertools.count(1):
        time.sleep(_POLL_S)
        held, ended = durable.is_held(path), (path / ENDED).exists()
        run.begun = run.begun or held or _stamp(path) != before
        rows = run.folder.read_rows("rounds.jsonl")  # after these questions, so that none is missed
        new, run.shown = rows[run.shown :], max(run.shown, len(rows))
        yield from new
        if ended or (run.begun and not held):
            if not ended:  # it ends, or was killed
                time.sleep(3 * _POLL_S)
            return _wait_for_end(run)
        if not run.begun and time.monotonic() - started > _BEGIN_S:
            return _abort(run)
        if turn % _ASK_EVERY:
            continue
        try:
            idle = run.admin.idle()
            if not idle.issuperset(sites):
                run.behind = idle & set(sites)
            if not run.begun and run.admin.is_over(run.job):
                return None
        except ConnectionError as error:
            _tell(f"the server does not answer ({error})")
            continue
        idle = (idle & set(run.wanted)) - run.out()
        if run.begun and idle and idle <= missed and not (path / PAUSE).exists():
            _tell(f"{', '.join(sorted(idle))} came back, and takes part from the next round on")
            (path / PAUSE).touch()
        missed = idle if run.begun else set()


def _stamp(run: Path) -> int:
    """When a job last wrote down which sites it has."""
    with contextlib.suppress(FileNotFoundError):
        return (run / SITES).stat().st_mtime_ns
    return 0


def _gather(run: Following) -> list[ClientId]:
    """Wait for the sites: for all of them when a run begins; later a while for all, then for enough."""
    begun = (run.folder.path / SITES).exists()
    until, told = time.monotonic() + _TOGETHER_S, None
    while True:
        try:
            there = run.admin.connected() & set(run.wanted)
            state = "waiting for " + ", ".join(sorted(set(run.wanted) - there))
        except ConnectionError as error:
            there, state = set(), f"waiting for the server ({error})"
            until = time.monotonic() + _TOGETHER_S  # those that it has lost need a moment to find it again
        here = there - run.out() if begun and len(there - run.out()) >= run.needed else there
        late = begun and time.monotonic() >= until and len(here) >= run.needed
        if len(there) == len(run.wanted) or late:
            return sorted(here)
        if state != told:
            _tell(state)
            told = state
        time.sleep(2 * _POLL_S)


def _all_there(run: Following) -> bool:
    """Whether a job that brought nothing says something about the run, and not about links that are cut."""
    with contextlib.suppress(ConnectionError):
        return run.admin.connected().issuperset(run.wanted)
    return False


def _abort(run: Following) -> None:
    """Tell FLARE to end the job, so that it does not go on with no one who follows it."""
    holds = run.folder.read(JOB)["job"] if (run.folder.path / JOB).exists() else run.job
    for job in sorted({holds, run.job} - {""}):
        with contextlib.suppress(ConnectionError):
            run.admin.ask("abort_job", job)


def _wait_for_lock(path: Path, patience_s: float = 60.0) -> None:
    """A job that was just ended may still hold the run folder.

    Raises: InputError when it is held for longer.
    """
    until = time.monotonic() + patience_s
    while durable.is_held(path) and time.monotonic() < until:
        time.sleep(_POLL_S)
    durable.lock(path).release()


def _wait_for_end(run: Following, patience_s: float = 60.0) -> None:
    until = time.monotonic() + patience_s
    with contextlib.suppress(ConnectionError):
        while time.monotonic() < until and not run.admin.is_over(run.job):
            time.sleep(_POLL_S / 2)


def _why_it_ended(run: Following) -> str:
    """What the job said at its end; empty when the run goes on by itself.

    Raises: InputError when the job found something wrong that no further try would mend.
    """
    if not (run.folder.path / ENDED).exists():
        why = "the job was cut off" if run.begun else "the job did not begin"
        said = run.admin.last_words(run.job) if run.job else ""
        return f"{why}: {said}" if said else why
    ended = run.folder.read(ENDED)
    if ended["code"] == 2:
        raise InputError(*ended["input"])
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
        seen = admin.last_seen()
    except ConnectionError as error:
        _tell(f"the server does not answer ({error})")
        seen = {}
    finally:
        admin.close()
    ago = {name: round(time.time() - when, 1) for name, when in seen.items()}
    told = folder.read(SITES) if (folder.path / SITES).exists() else {}
    last = {row["client"]: row for row in folder.read_rows("clients.jsonl")}
    names = sorted({*kit_sites(admin.kit), *told})
    return [
        {
            "site": name,
            "connected": name in ago and ago[name] < _FRESH_S,
            "seen_s_ago": ago.get(name),
            **{key: told.get(name, {}).get(key) for key in ("device", "num_examples", "pid", "loads")},
            "round": last[name]["round"] if name in last else None,
            "slots": last[name]["slots"] if name in last else None,
            "error": last[name]["error"] if name in last else None,
        }
        for name in names
    ]


def _quiet() -> None:
    """FLARE logs every try to reach a server; where nobody has set up a log, Python would print that."""
    if not logging.root.handlers:
        logging.root.addHandler(logging.NullHandler())


def _tell(line: str) -> None:
    print(f"polyrank: {line}", file=sys.stderr, flush=True)
