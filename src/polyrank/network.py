"""What runs inside FLARE: the server's main function, which goes through a run, and a site's answers.

The round loop is `experiment.conduct`, the same as for simulated clients; a site's answer is `client.handle`.
A job of FLARE is one stretch of a run: it opens the run folder, goes on from its last checkpoint and its
journal, and ends with the run, or after a round when a site is back that the job does not know.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nvflare.collab import collab
from nvflare.collab.api.exceptions import RunAborted
from pydantic import ValidationError

from polyrank import durable
from polyrank.config import Flare
from polyrank.data.tokens import TextSizes
from polyrank.engine.base import Client
from polyrank.engine.flare import FlareEngine, side_by_side
from polyrank.errors import InputError, RunError, first_line, printable
from polyrank.experiment import conduct
from polyrank.export import read_config
from polyrank.kit import SERVER_CLASS, SITE_CLASS
from polyrank.ledger import RunFolder
from polyrank.messages import ClientId
from polyrank.restart import Reopened, reopen, restore
from polyrank.session import ClientError
from polyrank.site import Joined, Site, Terms, read_table
from polyrank.streams import share_clock
from polyrank.wire import WireError

SITE_VARIABLE, DEVICE_VARIABLE = "POLYRANK_SITE", "POLYRANK_DEVICE"
SITES, ENDED, PAUSE, JOB = "sites.json", "ended.json", "pause", "job.json"
"""In the run folder: what the sites said of themselves; why a job ended; a wish to end after this round; the
job that works on it, or did last."""
SIZES = "num_examples", "num_tokens", "num_taught"
_JOIN_S, _LOCK_S = 600.0, 10.0
_START_S = 120
"""For the sites' processes of a job to import what they need; FLARE ends a job when one takes longer."""
_log = logging.getLogger("polyrank")


class SiteEnd:
    """A site's process, as FLARE starts it: one thread does all the work, one request after the other."""

    def __init__(self) -> None:
        share_clock()
        self.site: Site | None = None  # made by `join`: what goes wrong here would end the job for all sites
        self.desk = ThreadPoolExecutor(1, "polyrank")
        self.latest: bytes = b""

    @collab.publish  # type: ignore[untyped-decorator]
    def join(self, terms: str) -> str:
        """What the site says of itself as JSON, or the line that says why it does not take part."""
        return self.desk.submit(self._join, collab.site_name, terms).result()

    @collab.publish  # type: ignore[untyped-decorator]
    def answer(self, request: bytes) -> bytes | str:
        """What `client.handle` made of a request, or the line that says why there is nothing."""
        self.latest = request
        return self.desk.submit(self._answer, request).result()

    @collab.final  # type: ignore[untyped-decorator]
    def leave(self) -> None:
        """At the end of a job: FLARE ends the process without Python's own end, which would free the disk."""
        self.desk.shutdown(wait=False, cancel_futures=True)
        if self.site is not None:
            self.site.leave()

    def _join(self, name: ClientId, terms: str) -> str:
        try:
            self.site = self.site or _own_site()
            return self.site.join(name, Terms.model_validate_json(terms)).model_dump_json()
        except (InputError, ValidationError) as error:
            line = first_line(error, 500)
        except Exception as error:  # what it says may name a path
            line = _unforeseen(error)
        _log.error("polyrank: this site does not take part: %s", line)
        return line

    def _answer(self, request: bytes) -> bytes | str:
        if request is not self.latest:
            return "the server has asked anew since"
        if self.site is None:
            return "the site has not joined this run"
        try:
            return self.site.answer(request)
        except (ClientError, WireError) as error:
            _log.error("polyrank: %s", first_line(error))
            return f"{type(error).__name__}: {first_line(error)}"
        except Exception as error:
            return _unforeseen(error)


def _own_site() -> Site:
    """The site whose table ``join`` was given; the server does not learn what the table says.

    Raises: InputError when it cannot be used any more.
    """
    try:
        return Site(read_table(Path(os.environ[SITE_VARIABLE]), os.environ.get(DEVICE_VARIABLE) or None))
    except InputError as error:
        _log.error("polyrank: %s", error)
        allowed = "the table cannot be used as it is now; the site's own log says why"
        raise InputError("--data", error.key, allowed) from None


def _unforeseen(error: Exception) -> str:
    """What the server may know of an error that nobody foresaw: its kind. The rest stays here, in the log."""
    _log.error("polyrank: %s", first_line(error, 500), exc_info=error)
    return type(error).__name__


class ServerEnd:
    """The server's part of a job.

    Args:
        run: the run folder.
        sites: those that were there when the job was made; a run begins with all of them or not at all.
    """

    def __init__(self, run: str, sites: list[ClientId]) -> None:
        share_clock()
        self.run = run
        self.sites = sites

    @collab.main  # type: ignore[untyped-decorator]
    def main(self) -> None:
        """Go on with the run, and leave in its folder how this ended; where it cannot, in the job's log."""
        folder = RunFolder(Path(self.run))
        code, line, wrong = 0, "", None
        try:
            proxies = {site.name: site for site in collab.clients}
            gone = sorted(set(self.sites) - set(proxies))
            if gone and not (folder.path / SITES).exists():
                raise RunError(f"{', '.join(gone)} left before the run began")
            _go_on(folder, proxies, collab.fl_ctx.get_job_id())
        except RunAborted:
            raise
        except InputError as error:
            if durable.is_taken(error):  # by another job, and how that one ends is for it to say
                _log.error("polyrank: %s", error)
                return
            code, line, wrong = 2, str(error), [error.key, _plain(error.value), error.allowed]
        except RunError as error:
            code, line = 1, str(error)
        except Exception as error:
            code, line = 1, f"{type(error).__name__}: {first_line(error)}"
            _log.exception("polyrank: the job ends")
        if line:
            _log.error("polyrank: %s", line)
        folder.write(ENDED, {"code": code, "line": line, **({} if wrong is None else {"input": wrong})})


def _plain(value: object) -> object:
    """A value that JSON can hold."""
    return value if isinstance(value, str | int | float | list | None) else str(value)


def _go_on(folder: RunFolder, sites: Mapping[ClientId, Any], job: str) -> None:
    reopened = _opened(folder.path)
    if reopened.summary is not None:
        return
    folder.write(JOB, {"job": job, "complaints": reopened.complaints})
    engine = read_config(folder).engine
    assert isinstance(engine, Flare)
    network = Sites(sites, folder, engine.deadline_s, lambda: bool(collab.is_aborted))
    experiment, manifest = restore(reopened, network)
    for _ in conduct(experiment, reopened.folder, manifest):  # it holds the folder's lock until its end
        if (folder.path / "summary.json").exists():
            network.ask_again()
        elif (folder.path / PAUSE).exists():
            return


def _opened(run: Path) -> Reopened:
    """`reopen`, with patience: an earlier job may just be ending, and who looks for the lock takes it.

    Raises: InputError as `reopen` does.
    """
    until = time.monotonic() + _LOCK_S
    while True:
        try:
            return reopen(run)
        except InputError as error:
            if not durable.is_taken(error) or time.monotonic() > until:
                raise
        time.sleep(0.2)


def _never() -> bool:
    return False


@dataclass
class Sites:
    """The sites of one job, and those that a run began with."""

    proxies: Mapping[ClientId, Any]
    folder: RunFolder
    deadline_s: float
    ending: Callable[[], bool] = _never
    terms: Terms | None = None

    def open(self, terms: Terms) -> tuple[FlareEngine, Mapping[ClientId, TextSizes]]:
        """Ask every site to join; a run begins with all its sites, and goes on with those that are there.

        Raises: InputError when a site does not agree.
        """
        registered = self.folder.read(SITES) if (self.folder.path / SITES).exists() else {}
        self.terms = terms
        found = self._ask(terms, registered, _JOIN_S)
        here = {name: one for name, one in found.items() if isinstance(one, Joined)}
        for name, one in found.items():
            if not isinstance(one, Joined):
                if not registered:
                    raise InputError("site", name, f"does not take part: {one}")
                _log.error("polyrank: site %s does not take part: %s", name, one)
        told = {name: {**one.model_dump(), "connected": True} for name, one in here.items()}
        absent = {name: {**row, "connected": False} for name, row in registered.items() if name not in here}
        rows = dict(sorted({**absent, **told}.items()))
        self.folder.write(SITES, rows)
        population = [Client(name, row["num_examples"]) for name, row in rows.items()]
        proxies = {name: self.proxies[name] for name in here}
        engine = FlareEngine(population, proxies, self.deadline_s, RunAborted, self.ending)
        return engine, {name: TextSizes(*(row[key] for key in SIZES)) for name, row in rows.items()}

    def ask_again(self) -> None:
        """Note what the sites say of themselves at the end: the process and the loads that the run took."""
        assert self.terms is not None, "the sites are asked when the run opens"
        rows = self.folder.read(SITES)
        found = self._ask(self.terms, rows, self.deadline_s)
        told = {name: one.model_dump() for name, one in found.items() if isinstance(one, Joined)}
        told |= {name: {"connected": False} for name in found if name not in told}
        self.folder.write(SITES, {name: {**row, **told.get(name, {})} for name, row in rows.items()})

    def _ask(
        self, terms: Terms, registered: Mapping[str, Any], within_s: float
    ) -> dict[ClientId, Joined | str]:
        """What each site says of itself, or why it does not take part, in the order of the proxies."""
        calls = [partial(self._join, name, terms, registered, within_s) for name in self.proxies]
        ended = dict(side_by_side(calls, within_s))
        if self.ending():
            raise RunAborted("the job ends")
        found: dict[ClientId, Joined | str] = {}
        for number, name in enumerate(self.proxies):
            outcome = ended[number]
            if isinstance(outcome, Exception) and not isinstance(outcome, TimeoutError):
                raise outcome
            found[name] = str(outcome) if isinstance(outcome, Exception) else outcome
        return found

    def _join(
        self, name: ClientId, terms: Terms, registered: Mapping[str, Any], within_s: float
    ) -> Joined | str:
        try:
            told = self.proxies[name](timeout=within_s).join(terms.model_dump_json())
            joined = Joined.model_validate_json(told)
        except ValidationError:
            return printable(str(told), 500)
        except RunAborted:
            raise
        except Exception as failure:  # a site's trouble is not the run's
            return first_line(failure)
        before = registered.get(name, {})
        if registered and joined.num_examples != before.get("num_examples"):
            return f"has {joined.num_examples} texts, and the run began with {before.get('num_examples')}"
        if registered and any(getattr(joined, key) != before.get(key) for key in SIZES):
            return "has other texts than the run began with"
        return joined.model_copy(update={"device": printable(joined.device, 100)})


def write_job(run: Path, sites: list[ClientId], out: Path) -> None:
    """The folder that describes a job to FLARE: which classes run where, and no code."""
    app = out / "app" / "config"
    app.mkdir(parents=True)
    meta = {
        "name": "polyrank",
        "resource_spec": {},
        "min_clients": 1,  # a job with fewer than it asks for, or without one it must have, is ended by FLARE
        "deploy_map": {"app": ["server", *sites]},
    }
    controller = "nvflare.collab.runtime.controller.CollabController"
    started = {"server_obj_id": "server_end", "sync_task_timeout": _START_S}
    server = {
        "format_version": 2,
        "workflows": [{"id": "controller", "path": controller, "args": started}],
        "components": [{"id": "server_end", "path": SERVER_CLASS, "args": {"run": str(run), "sites": sites}}],
    }
    executor = "nvflare.collab.runtime.executor.CollabExecutor"
    client = {
        "format_version": 2,
        "executors": [
            {"tasks": ["*"], "executor": {"path": executor, "args": {"client_obj_id": "site_end"}}}
        ],
        "components": [{"id": "site_end", "path": SITE_CLASS, "args": {}}],
    }
    for path, content in (
        (out / "meta.json", meta),
        (app / "config_fed_server.json", server),
        (app / "config_fed_client.json", client),
    ):
        path.write_text(json.dumps(content, indent=2), encoding="utf-8")
