"""One site that answers with nonsense, or has nonsense in its table or its texts: the others go on."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("nvflare")

from tests.network.federation import Federation, rows, wait_for_rounds
from tests.network.malformed.sitecustomize import WAYS
from tests.site_runs import SITES

pytestmark = pytest.mark.network
REASONS = {
    "honest": None,
    "empty": "empty",
    "garbage": "digest",
    "large": "too_large",
    "dict": "failed",
    "raises": "failed",
    "drips": "failed",
    "old": "round",
    "twice": None,
}
DEADLINE_S = 40


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory):
    """site-b has something on its path that spoils its answers, and sends them in small pieces."""
    made = Federation.made_in(tmp_path_factory.mktemp("malformed"))
    for name in ("server", "site-a", "site-c"):
        made.start(name)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(Path(__file__).parent / "malformed"), prepend=os.pathsep)
        environment.setenv("NVFLARE_STREAMING_CHUNK_SIZE", "1000")
        made.start("site-b")
    yield made
    for name in list(made.running):
        made.kill(name)


def test_answers_that_are_no_answers_cost_their_site_its_part_and_nobody_else(federation):
    out = federation.folder / "spoilt"
    federation.run(out, f"rounds={len(WAYS)}", f"engine.deadline_s={DEADLINE_S}")
    told = {(row["round"], row["client"]): row for row in rows(out, "clients.jsonl")}
    assert len(told) == len(WAYS) * len(SITES)
    for round_, way in enumerate(WAYS):
        assert (way, told[round_, "site-b"]["reason"]) == (way, REASONS[way])
        assert all(told[round_, name]["error"] is None for name in ("site-a", "site-c"))
    assert told[WAYS.index("drips"), "site-b"]["error"] == f"no answer within {DEADLINE_S} s"
    assert told[WAYS.index("raises"), "site-b"]["error"] == "OSError"  # and no path
    assert told[WAYS.index("dict"), "site-b"]["error"] == "the site answered with dict"


def test_a_label_that_the_run_does_not_know_is_the_same_line_on_both_sides(federation):
    texts = federation.folder / "site-b" / "own.csv"
    before = texts.read_text()
    texts.write_text(before + "word1 word2,unheard of\n")
    words = federation.command(*federation.run_words(federation.folder / "mismatch", "rounds=2"))
    ended = subprocess.run(words, capture_output=True, text=True, timeout=400, check=False)
    texts.write_text(before)
    line = "data.label = 'unheard of': unknown label; one of: kind 0, kind 1, kind 2"
    assert ended.returncode == 2
    assert f"site = 'site-b': does not take part: {line}" in ended.stderr
    assert line in (federation.folder / "site-b.out").read_text()


def test_a_table_that_is_spoilt_during_a_run_leaves_its_site_out_and_no_more(federation):
    table, out = federation.folder / "site-b" / "site.toml", federation.folder / "table"
    before = table.read_text()
    driver = federation.begin("table-driver", *federation.run_words(out, "rounds=12"))
    wait_for_rounds(out, 2)
    table.write_text("[data\n")
    (out / "pause").touch()  # the job ends, and the next one reads the table anew
    assert driver.wait(timeout=400) == 0, (federation.folder / "table-driver.out").read_text()
    table.write_text(before)
    assert [row["round"] for row in rows(out)] == list(range(12))
    last = {row["client"]: row["error"] for row in rows(out, "clients.jsonl") if row["round"] == 11}
    assert last == {"site-a": None, "site-b": "the site is not connected", "site-c": None}
