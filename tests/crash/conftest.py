"""Small runs that are prepared once, and copies of them made by fork."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest

from polyrank import durable, experiment, restart
from polyrank.assemble import prepare
from polyrank.experiment import conduct, open_folder
from tests.small_runs import ended, forked, results, small_config


def plain_report(folder):
    """A report without figures, which take longer than a small run."""
    durable.replace(folder.path / "report.html", b"<html>")


class Prepared:
    """One config whose model and data are loaded; every fork of this process runs it from the start."""

    def __init__(self, inputs: Path, folder: Path, method: str, *more: str) -> None:
        self.folder, self.count = folder, itertools.count()
        self.config = small_config(inputs, method, *more)
        self.experiment = prepare(self.config)
        whole, start = self.fresh(), time.perf_counter()
        assert ended(forked(lambda: self.run(whole))) == 0
        self.whole_s = time.perf_counter() - start
        self.expected = results(whole)

    def fresh(self) -> Path:
        return self.folder / str(next(self.count))

    def run(self, out: Path, rounds: int | None = None) -> None:
        """Run from the start; only some rounds where a number is given."""
        experiment.write_report = plain_report  # in a fork: nobody else sees this
        rows = conduct(self.experiment, open_folder(self.experiment, out))
        list(rows if rounds is None else itertools.islice(rows, rounds))

    def stopped(self, rounds: int) -> Path:
        """A new run folder whose process died after some rounds."""
        out = self.fresh()
        assert ended(forked(lambda: self.run(out, rounds))) == 0
        return out

    def resume(self, out: Path) -> None:
        experiment.write_report = plain_report
        restart.prepare = lambda config, network=None: self.experiment
        restart.resume(out)

    def finish(self, out: Path) -> None:
        """Resume as a user would: where not even a config was written, start anew."""
        if (out / "config.json").exists():
            self.resume(out)
        else:
            self.run(out.with_name(f"{out.name}-anew"))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    small_config(folder)
    return folder


@pytest.fixture(scope="session")
def prepared(inputs: Path, tmp_path_factory: pytest.TempPathFactory):
    made: dict[tuple[str, ...], Prepared] = {}

    def of(method: str, *more: str) -> Prepared:
        if (method, *more) not in made:
            made[method, *more] = Prepared(inputs, tmp_path_factory.mktemp(method), method, *more)
        return made[method, *more]

    return of
