"""Joining over a network, and following a run whose jobs end early; sites and server are plain objects."""

from __future__ import annotations

import json
import stat

import pytest

pytest.importorskip("nvflare")

from polyrank import remote
from polyrank.errors import InputError, RunError
from polyrank.ledger import RunFolder
from polyrank.network import ENDED, PAUSE, SITES, Sites, write_job
from polyrank.provision import provision, restrict
from polyrank.site import Joined, Terms

TERMS = Terms(model="m", digest="d", tokenizer="t", labels=("a", "b"), seed=0, max_length=8)


def joined(count):
    told = {"num_examples": count, "num_tokens": 9 * count, "num_holdout": 0, "device": "cpu"}
    return Joined(**told, threads=1, pid=7, loads=1).model_dump_json()


class Proxy:
    def __init__(self, reply):
        self.reply = reply

    def __call__(self, *, timeout):
        return self

    def join(self, terms):
        assert Terms.model_validate_json(terms) == TERMS
        if isinstance(self.reply, Exception):
            raise self.reply
        return self.reply


def opened(folder, **replies):
    proxies = {name.replace("_", "-"): Proxy(reply) for name, reply in replies.items()}
    engine, texts = Sites(proxies, RunFolder(folder), 5.0).open(TERMS)
    return [(client.id, client.num_examples) for client in engine.clients()], sorted(engine.sites), texts


def test_a_run_begins_with_all_its_sites_or_with_one_clear_line(tmp_path):
    line = "data.label = 'x': unknown label; one of: a, b"
    with pytest.raises(InputError, match="site = 'site-b': does not take part: data.label = 'x': unknown"):
        opened(tmp_path, site_a=joined(5), site_b=line)
    assert not (tmp_path / SITES).exists()
    population, there, texts = opened(tmp_path, site_b=joined(3), site_a=joined(5))
    assert population == [("site-a", 5), ("site-b", 3)]  # by name, as a natural partition has them
    assert there == ["site-a", "site-b"]
    assert texts == {"site-a": (5, 45), "site-b": (3, 27)}


def test_a_run_goes_on_with_the_sites_that_are_there_and_keeps_its_population(tmp_path):
    opened(tmp_path, site_a=joined(5), site_b=joined(3), site_c=joined(4))
    population, there, texts = opened(tmp_path, site_c=joined(4), site_b=TimeoutError("no answer"))
    assert [name for name, _ in population] == ["site-a", "site-b", "site-c"]
    assert there == ["site-c"]
    assert len(texts) == 3
    told = json.loads((tmp_path / SITES).read_text())
    assert [row["connected"] for row in told.values()] == [False, False, True]


def test_a_site_with_other_texts_than_the_run_began_with_is_left_out(tmp_path):
    opened(tmp_path, site_a=joined(5), site_b=joined(3))
    population, there, _ = opened(tmp_path, site_a=joined(6), site_b=joined(3))
    assert population == [("site-a", 5), ("site-b", 3)]
    assert there == ["site-b"]


def test_a_job_carries_no_code(tmp_path):
    write_job(tmp_path / "run", ["site-a"], tmp_path / "job")
    files = {
        str(path.relative_to(tmp_path / "job")) for path in (tmp_path / "job").rglob("*") if path.is_file()
    }
    assert files == {"meta.json", "app/config/config_fed_server.json", "app/config/config_fed_client.json"}


def test_kits_hold_one_key_each_and_allow_two_classes_of_ours(tmp_path):
    kits = provision("demo", "localhost", ["site-a", "site-b"], tmp_path / "kits", 8100)
    assert [kit.name for kit in kits] == ["server", "admin", "site-a", "site-b"]
    assert all(len(list(kit.rglob("*.key"))) == 1 for kit in kits)
    assert remote.kit_sites(tmp_path / "kits" / "admin") == ["site-a", "site-b"]
    assert stat.S_IMODE((tmp_path / "kits" / "private").stat().st_mode) == 0o700
    restrict(kits[2])
    allowed = json.loads((kits[2] / "local" / "resources.json").read_text())
    assert [name for name in allowed["class_allow_list"] if not name.startswith("nvflare.collab.")] == [
        "polyrank.network.ServerEnd",
        "polyrank.network.SiteEnd",
    ]
    assert not allowed["allow_log_streaming"]
    rights = json.loads((kits[2] / "local" / "authorization.json").read_text())["permissions"]
    assert rights["project_admin"]["byoc"] == "none"
    with pytest.raises(InputError, match="exists already"):
        provision("demo", "localhost", ["site-a"], tmp_path / "kits")


@pytest.mark.parametrize("sites", [[], ["a", "a"], ["server"], ["A b"], ["localhost"]])
def test_names_that_cannot_be_used(tmp_path, sites):
    with pytest.raises(InputError, match="--site"):
        provision("demo", "localhost", sites, tmp_path / "kits")


def test_a_row_that_a_job_is_just_writing_is_not_read_yet(tmp_path):
    folder = RunFolder(tmp_path)
    folder.append("rounds.jsonl", [{"round": 0}])
    whole = (tmp_path / "rounds.jsonl").read_bytes()
    for cut in range(len(whole)):
        (tmp_path / "rounds.jsonl").write_bytes(whole + whole[:cut])
        assert folder.read_rows("rounds.jsonl") == [{"round": 0}]
    (tmp_path / "rounds.jsonl").write_bytes(b"")
    assert folder.read_rows("rounds.jsonl") == []


class Stretches:
    """Stands for the jobs of a run: each writes some rows and ends in some way."""

    def __init__(self, folder, *ends):
        self.folder, self.ends, self.done = folder, list(ends), 0

    def __call__(self, admin, folder, wanted, shown):
        (folder.path / ENDED).unlink(missing_ok=True)
        count, ended = self.ends.pop(0)
        for _ in range(count):
            yield {"round": self.done}
            self.done += 1
        if ended is not None:
            folder.write(ENDED, ended)
        if ended == {"code": 0, "line": ""} and not self.ends:
            folder.write("summary.json", {"rounds": self.done})


@pytest.fixture
def unfinished(tmp_path, monkeypatch):
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit" / "federation.json").write_text('{"sites": ["site-a"]}')
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    engine = {"kind": "flare", "kit": str(tmp_path / "kit")}
    data = {"test": "x.csv", "labels": ["a", "b"]}
    partition = {"kind": "natural", "column": "site"}
    run.write("config.json", {"engine": engine, "data": data, "partition": partition})
    monkeypatch.setattr(remote, "_BACK_OFF_S", 0.0)
    return run


def test_a_run_is_followed_through_all_its_jobs(unfinished, monkeypatch):
    good = {"code": 0, "line": ""}
    stretches = Stretches(unfinished, (2, None), (1, {"code": 1, "line": "no client"}), (0, None), (3, good))
    monkeypatch.setattr(remote, "_stretch", stretches)
    rows = list(remote.follow(unfinished.path))
    assert [row["round"] for row in rows[:-1]] == list(range(6))
    assert rows[-1] == {"rounds": 6}


def test_a_run_that_gets_nowhere_ends_with_what_the_job_said(unfinished, monkeypatch):
    failing = (0, {"code": 1, "line": "round 0: no client gave a usable update"})
    monkeypatch.setattr(remote, "_stretch", Stretches(unfinished, *[failing] * 5))
    with pytest.raises(RunError, match="no client gave a usable update; 5 tries in a row"):
        list(remote.follow(unfinished.path))


def test_bad_input_that_a_job_finds_ends_the_run_at_once(unfinished, monkeypatch):
    bad = {"code": 2, "line": "site = 'site-a': does not take part: data.label = 'x': unknown label"}
    monkeypatch.setattr(remote, "_stretch", Stretches(unfinished, (0, bad)))
    with pytest.raises(InputError, match="site = 'site-a': does not take part"):
        list(remote.follow(unfinished.path))


class FakeAdmin:
    """A server that answers with what is left in its lists, and is not to be reached for an error."""

    def __init__(self, idle=(), over=()):
        self.told = {"idle": list(idle), "over": list(over)}

    def _next(self, name, otherwise):
        found = self.told[name].pop(0) if self.told[name] else otherwise
        if isinstance(found, Exception):
            raise found
        return found

    def idle(self):
        return self._next("idle", set())

    def is_over(self, job):
        return self._next("over", True)


def watched(run, admin, monkeypatch, *events):
    """The rows seen while events happen, one at each look; an event is a function."""
    monkeypatch.setattr(remote, "_ASK_EVERY", 1)
    waiting = list(events)
    monkeypatch.setattr(remote.time, "sleep", lambda _: waiting.pop(0)() if waiting else None)
    return list(remote._watch(admin, run, ["site-a", "site-b"], "job", 0))


def test_a_server_that_does_not_answer_is_no_end_of_a_job(unfinished, monkeypatch):
    held = []

    def begin():
        held.append(remote.durable.lock(unfinished.path))
        unfinished.write(SITES, {})

    def end():
        unfinished.append("rounds.jsonl", [{"round": 1}])
        unfinished.write(ENDED, {"code": 0, "line": ""})

    away = [ConnectionError("away")] * 2
    events = (begin, lambda: unfinished.append("rounds.jsonl", [{"round": 0}]), lambda: None, end)
    rows = watched(unfinished, FakeAdmin(idle=away), monkeypatch, *events)
    assert [row["round"] for row in rows] == [0, 1]


def test_a_job_that_was_killed_has_let_go_of_the_run(unfinished, monkeypatch):
    held = []

    def begin():
        held.append(remote.durable.lock(unfinished.path))
        unfinished.write(SITES, {})

    def die():
        held.pop().release()

    assert watched(unfinished, FakeAdmin(idle=[set()] * 2), monkeypatch, begin, lambda: None, die) == []
    assert remote._why_it_ended(unfinished) == "the job was cut off"


@pytest.mark.parametrize("second", ["site-b", "site-a"])
def test_a_job_is_asked_to_end_for_a_site_that_stays_without_work(unfinished, monkeypatch, second):
    held = []

    def begin():
        held.append(remote.durable.lock(unfinished.path))
        unfinished.write(SITES, {})

    def end():
        assert (unfinished.path / PAUSE).exists() == (second == "site-b")
        unfinished.write(ENDED, {"code": 0, "line": ""})

    watched(unfinished, FakeAdmin(idle=[{"site-b"}, {second}]), monkeypatch, begin, lambda: None, end)
