"""Following a run whose jobs end early; jobs, server and clock are plain objects."""

from __future__ import annotations

import json
import threading

import pytest

pytest.importorskip("nvflare")

from polyrank import durable, network, remote
from polyrank.errors import InputError, RunError
from polyrank.ledger import RunFolder
from polyrank.network import ENDED, JOB, PAUSE, SITES
from polyrank.report import REPORT


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

    def __init__(self, *ends):
        self.ends, self.done = list(ends), 0

    def __call__(self, run):
        (run.folder.path / ENDED).unlink(missing_ok=True)
        count, ended = self.ends.pop(0)
        run.begun, run.shown = True, run.shown + count
        for _ in range(count):
            yield {"round": self.done}
            self.done += 1
        if ended is not None:
            run.folder.write(ENDED, ended)
        if ended == {"code": 0, "line": ""} and not self.ends:
            run.folder.write("summary.json", {"rounds": self.done})
            (run.folder.path / REPORT).touch()


class FakeAdmin:
    """A server that answers with what is left in its lists, and is not to be reached for an error."""

    def __init__(self, **told):
        self.told = {name: list(answers) for name, answers in told.items()}
        self.asked = []

    def _next(self, name, otherwise):
        found = self.told[name].pop(0) if self.told.get(name) else otherwise
        if isinstance(found, Exception):
            raise found
        return found

    def idle(self):
        return self._next("idle", set())

    def is_over(self, job):
        return self._next("over", True)

    def connected(self):
        return self._next("connected", {"site-a", "site-b"})

    def last_words(self, job):
        return self._next("words", "")

    def ask(self, command, *given):
        self.asked.append((command, *given))
        return self._next(command, "job")

    def close(self):
        pass


@pytest.fixture
def unfinished(tmp_path, monkeypatch):
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit" / "federation.json").write_text('{"sites": ["site-a", "site-b"]}')
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    engine = {"kind": "flare", "kit": str(tmp_path / "kit")}
    data = {"test": "x.csv", "labels": ["a", "b"]}
    partition = {"kind": "natural", "column": "site"}
    run.write("config.json", {"engine": engine, "data": data, "partition": partition})
    monkeypatch.setattr(remote, "wrong_with", lambda own, root: None)
    for name in ("_BACK_OFF_S", "_POLL_S"):
        monkeypatch.setattr(remote, name, 0.0)
    return run


def following(run, needed=1, **told):
    return remote.Following(FakeAdmin(**told), run, ["site-a", "site-b"], needed)


def follow(run, monkeypatch, *stretches, **told):
    """The rows of a run whose jobs are made up, and the server too."""
    monkeypatch.setattr(remote, "_stretch", Stretches(*stretches))
    monkeypatch.setattr(remote, "Admin", lambda kit: FakeAdmin(**told))
    return list(remote.follow(run.path))


def test_a_run_is_followed_through_all_its_jobs(unfinished, monkeypatch):
    good = {"code": 0, "line": ""}
    stretches = ((2, None), (1, {"code": 1, "line": "no client"}), (0, None), (3, good))
    rows = follow(unfinished, monkeypatch, *stretches)
    assert [row["round"] for row in rows[:-1]] == list(range(6))
    assert rows[-1] == {"rounds": 6}


def test_a_job_killed_before_the_report_has_it_written_all_the_same(unfinished, monkeypatch):
    stretch = Stretches((1, {"code": 0, "line": ""}))

    def killed(run):
        yield from stretch(run)
        (run.folder.path / REPORT).unlink()

    closed = []
    monkeypatch.setattr(remote, "_stretch", killed)
    monkeypatch.setattr(remote, "Admin", lambda kit: FakeAdmin())
    monkeypatch.setattr(remote, "reopen", closed.append)
    assert list(remote.follow(unfinished.path))[-1] == {"rounds": 1}
    assert closed == [unfinished.path.resolve()]


FAILING = (0, {"code": 1, "line": "round 0: no client gave a usable update"})


def test_a_run_that_gets_nowhere_ends_with_what_the_job_said(unfinished, monkeypatch):
    with pytest.raises(RunError, match="no client gave a usable update; 5 tries in a row"):
        follow(unfinished, monkeypatch, *[FAILING] * 5)


def test_a_run_does_not_give_up_while_a_link_is_cut(unfinished, monkeypatch):
    good = {"code": 0, "line": ""}
    cut = [{"site-a"}] * 5 + [ConnectionError("away")] * 5
    rows = follow(unfinished, monkeypatch, *[FAILING] * 14, (1, good), connected=cut)
    assert rows == [{"round": 0}, {"rounds": 1}]
    (unfinished.path / "summary.json").unlink()
    with pytest.raises(RunError, match="5 tries in a row"):
        follow(unfinished, monkeypatch, *[FAILING] * 15, connected=cut)


def test_bad_input_that_a_job_finds_ends_the_run_at_once(unfinished, monkeypatch):
    """With its key, value and what is allowed as they were: a value may hold what looks like an end of it."""
    said = InputError("sampling.count", ["a: b", 4], "at most 2: all there are")
    bad = {"code": 2, "line": str(said), "input": [said.key, said.value, said.allowed]}
    with pytest.raises(InputError) as caught:
        follow(unfinished, monkeypatch, (0, bad))
    assert str(caught.value) == str(said)


def test_who_stops_following_ends_the_job(unfinished, monkeypatch):
    def stopped(run):
        run.job = "second"
        yield {"round": 0}
        raise KeyboardInterrupt

    admin = FakeAdmin()
    monkeypatch.setattr(remote, "_stretch", stopped)
    monkeypatch.setattr(remote, "Admin", lambda kit: admin)
    with pytest.raises(KeyboardInterrupt):
        list(remote.follow(unfinished.path))
    assert admin.asked == [("abort_job", "second")]
    unfinished.write(JOB, {"job": "first"})  # the one that has the folder
    rows = remote.follow(unfinished.path)
    next(rows)
    rows.close()
    assert admin.asked[1:] == [("abort_job", "first"), ("abort_job", "second")]


class Clock:
    """Stands for the module `time`: sleeping takes a second, and something happens meanwhile."""

    def __init__(self, *events):
        self.events, self.now = list(events), 0.0

    def sleep(self, _):
        self.now += 1.0
        if self.events:
            self.events.pop(0)()

    def monotonic(self):
        return self.now


def watched(run, monkeypatch, *events):
    """The rows of a job seen while events happen, one at each look; an event is a function."""
    monkeypatch.setattr(remote, "_ASK_EVERY", 1)
    monkeypatch.setattr(remote, "time", Clock(*events))
    return list(remote._watch(run, ["site-a", "site-b"]))


def nothing():
    pass


@pytest.fixture
def begin(unfinished):
    """What a job does first, and what is left of it when it dies."""
    held = []

    def begin():
        held.append(durable.lock(unfinished.path))

    begin.die = lambda: held.pop().release()
    return begin


def test_a_server_that_does_not_answer_is_no_end_of_a_job(unfinished, begin, monkeypatch):
    def end():
        unfinished.append("rounds.jsonl", [{"round": 1}])
        unfinished.write(ENDED, {"code": 0, "line": ""})

    run = following(unfinished, idle=[ConnectionError("away")] * 2)
    events = (begin, lambda: unfinished.append("rounds.jsonl", [{"round": 0}]), nothing, end)
    assert [row["round"] for row in watched(run, monkeypatch, *events)] == [0, 1]


def test_a_job_that_was_killed_has_let_go_of_the_run(unfinished, begin, monkeypatch):
    run = following(unfinished)
    assert watched(run, monkeypatch, begin, nothing, begin.die) == []
    assert remote._why_it_ended(run) == "the job was cut off"


def test_a_job_that_has_the_run_may_take_any_time_to_load(unfinished, begin, monkeypatch):
    def end():
        unfinished.append("rounds.jsonl", [{"round": 0}])
        unfinished.write(ENDED, {"code": 0, "line": ""})

    run = following(unfinished, over=[False] * 2000)
    events = (nothing, begin, *[nothing] * int(3 * remote._BEGIN_S), end)
    assert watched(run, monkeypatch, *events) == [{"round": 0}]


def test_a_job_that_never_opens_the_run_is_ended_and_says_why(unfinished, monkeypatch):
    run = following(unfinished, over=[False] * 2000, words=["RUN = '/x': cannot be locked"])
    run.job = "job"
    assert watched(run, monkeypatch) == []
    assert run.admin.asked == [("abort_job", "job")]
    assert remote._why_it_ended(run) == "the job did not begin: RUN = '/x': cannot be locked"


@pytest.mark.parametrize("second", ["site-b", "site-a"])
def test_a_job_is_asked_to_end_for_a_site_that_stays_without_work(unfinished, begin, monkeypatch, second):
    def end():
        assert (unfinished.path / PAUSE).exists() == (second == "site-b")
        unfinished.write(ENDED, {"code": 0, "line": ""})

    run = following(unfinished, idle=[{"site-b"}, {second}])
    watched(run, monkeypatch, begin, nothing, end)


def test_a_site_whose_process_does_not_come_up_is_left_out_for_a_while(unfinished, monkeypatch):
    unfinished.write(SITES, {})  # the run has begun
    run = following(unfinished, idle=[{"site-a", "site-b"}, {"site-b"}], over=[False, True])
    monkeypatch.setattr(remote, "_ASK_EVERY", 1)
    clock = Clock()
    monkeypatch.setattr(remote, "time", clock)
    assert list(remote._stretch(run)) == []
    assert remote._gather(run) == ["site-a"]
    run.needed = 2
    assert remote._gather(run) == ["site-a", "site-b"]  # without it nothing would come of it
    run.needed, clock.now = 1, clock.now + remote._LEFT_OUT_S
    assert remote._gather(run) == ["site-a", "site-b"]


def test_a_run_begins_with_all_and_goes_on_with_all_that_come_back_in_time(unfinished, monkeypatch):
    monkeypatch.setattr(remote, "time", Clock())
    coming = [set(), {"site-a"}, {"site-a"}, {"site-a", "site-b"}]
    assert remote._gather(following(unfinished, connected=coming)) == ["site-a", "site-b"]
    unfinished.write(SITES, {})
    assert remote._gather(following(unfinished, connected=coming)) == ["site-a", "site-b"]
    away = [ConnectionError("away")] * 100  # the server, for longer than its sites get
    assert remote._gather(following(unfinished, connected=away + coming)) == ["site-a", "site-b"]
    assert remote._gather(following(unfinished, connected=[{"site-b"}] * 100)) == ["site-b"]
    enough = following(unfinished, needed=2, connected=[{"site-b"}] * 500)
    assert remote._gather(enough) == ["site-a", "site-b"]


def test_a_site_that_was_not_heard_of_for_a_while_is_away(tmp_path, monkeypatch):
    now = remote.time.time()
    admin = remote.Admin(tmp_path)
    monkeypatch.setattr(remote.Admin, "last_seen", lambda self: {"a": now - 5, "b": now - 300})
    assert admin.connected() == {"a"}


def test_the_last_words_of_a_job_are_in_its_log(tmp_path, monkeypatch):
    log = "INFO x\nERROR polyrank: RUN = '/x': one\n09:02 ERROR polyrank: RUN = '/x': two\nINFO y"
    admin = remote.Admin(tmp_path)
    monkeypatch.setattr(remote.Admin, "ask", lambda self, command, job: {"logs": {"server": log}})
    assert admin.last_words("job") == "RUN = '/x': two"
    monkeypatch.setattr(remote.Admin, "ask", lambda self, command, job: {"logs": {}})
    assert admin.last_words("job") == ""


def test_a_job_that_is_at_work_is_followed_and_no_second_one_begun(unfinished, begin, monkeypatch):
    begin()
    unfinished.write(JOB, {"job": "first"})
    run = following(unfinished)
    row = {"round": 0}
    monkeypatch.setattr(remote, "time", Clock(lambda: unfinished.append("rounds.jsonl", [row]), begin.die))
    assert list(remote._stretch(run)) == [row]
    assert (run.job, run.admin.asked) == ("first", [])


def test_a_folder_that_another_process_writes_is_told_after_a_while(unfinished, begin, monkeypatch):
    begin()
    monkeypatch.setattr(remote, "time", Clock())
    with pytest.raises(InputError, match="is being written by another process"):
        list(remote._stretch(following(unfinished)))


@pytest.fixture
def job(unfinished, monkeypatch):
    """The main function of a job; calling it gives what it leaves behind."""

    class Collab:
        clients = ()

        class fl_ctx:  # noqa: N801
            get_job_id = staticmethod(lambda: "job")

    monkeypatch.setattr(network, "collab", Collab)
    monkeypatch.setattr(network, "_LOCK_S", 0.5)

    def main():
        network.ServerEnd(str(unfinished.path), []).main()
        path = unfinished.path / ENDED
        return json.loads(path.read_text()) if path.exists() else None

    return main


def test_a_second_job_of_a_run_leaves_it_to_the_first(unfinished, begin, job):
    begin()
    assert job() is None
    assert not (unfinished.path / JOB).exists()


def test_a_job_waits_a_moment_for_who_looks_at_the_lock(unfinished, begin, job, monkeypatch):
    monkeypatch.setattr(network, "_LOCK_S", 20)
    begin()
    timer = threading.Timer(0.2, begin.die)
    timer.start()
    assert job()["code"] == 2  # there is no data, so it had the folder
    assert json.loads((unfinished.path / JOB).read_text()) == {"job": "job", "complaints": []}
    timer.join()


def test_what_nobody_thought_of_is_told_in_one_line(unfinished, job, monkeypatch):
    def broken(path):
        raise KeyError("surprise")

    monkeypatch.setattr(network, "reopen", broken)
    assert job() == {"code": 1, "line": "KeyError: 'surprise'"}


def test_a_job_that_flare_ends_says_nothing(job, monkeypatch):
    def aborted(path):
        raise network.RunAborted

    monkeypatch.setattr(network, "reopen", aborted)
    with pytest.raises(network.RunAborted):
        job()
