"""A commit that is cut off at any system call, on a disk that is full, failing or lying; and two writers."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import time
from pathlib import Path

import pytest

from polyrank import durable, experiment, restart
from polyrank.commit import CHECKPOINTS, commit, first_manifest, newest, rewind
from polyrank.errors import InputError, RunError
from polyrank.export import adapter_sha256
from polyrank.ledger import LEDGERS, RunFolder, create_run_folder
from tests.builders import largest_difference, random_adapter, state_of
from tests.crash.conftest import plain_report
from tests.power import Cut, Disk
from tests.small_runs import ended, forked, results, tree


def state_after(rounds: int):
    """A state with folds, another one for every round."""
    from dataclasses import replace

    folds = [random_adapter(100 + number, 2) for number in range(rounds)]
    return replace(state_of(random_adapter(rounds, 3, "svd"), rounds), folds=folds)


def committed(folder: RunFolder, rounds: int, manifest=None):
    """Rows and commit of some rounds, as a run writes them."""
    for number in range(0 if manifest is None else manifest["round"] + 1, rounds + 1):
        if number:
            folder.append("rounds.jsonl", [{"round": number - 1}])
            folder.append("clients.jsonl", [{"round": number - 1, "client": c} for c in "ab"])
        before = manifest or first_manifest({"data": "d", "model": "m"})
        manifest = commit(folder, state_after(number), before, 1.0, 2)
    return manifest


@pytest.fixture
def bases(tmp_path, monkeypatch):
    """Folders of a run that has just begun, and of one after two rounds, each with its last manifest."""
    monkeypatch.setattr(os, "fsync", lambda number: None)  # the power cuts here are played
    found = {start: RunFolder(tmp_path / f"base-{start}") for start in (None, 2)}
    for folder in found.values():
        folder.path.mkdir()
    return {None: (found[None], None), 2: (found[2], committed(found[2], 2))}


def cut_off(bases, keeps, start, at):
    """The commit of a third round (or a new run's first two) cut off at a system call, or after its return.

    Returns: whether it was cut off, and which round is there then.
    """
    (base, manifest), rounds = bases[start], 1 if start is None else start + 1
    path = base.path.with_name(str(at))
    shutil.copytree(base.path, path)
    folder = RunFolder(path)

    def work():
        cut = Cut(Disk(path), keeps, at)
        committed(folder, rounds, manifest)
        cut.crash(0)

    code = ended(forked(work))
    assert code in (0, 9)
    found, complaints = newest(folder)
    assert complaints == []
    rewind(folder, found)
    there = -1 if found is None else found.state.round
    assert there in range(-1 if start is None else start, rounds + 1)
    assert code == 9 or there == rounds  # what a commit said is done stays
    assert [len(folder.read_rows(name)) for name in LEDGERS] == [max(0, there), 2 * max(0, there), 0]
    if found is not None:
        expected = state_after(there)
        assert largest_difference(found.state.adapter, expected.adapter) == 0
        pairs = zip(found.state.folds, expected.folds, strict=True)
        assert [largest_difference(a, b) for a, b in pairs] == [0] * there
    if there < rounds:  # the round can be done again
        committed(folder, rounds, found.manifest if found is not None else None)
    last, _ = newest(folder)
    assert (last.state.round, len(folder.read_rows("rounds.jsonl"))) == (rounds, rounds)
    left = list((path / CHECKPOINTS).glob("*.tmp"))
    assert left == [] or there == rounds  # the next commit sweeps these
    shutil.rmtree(path)
    return code == 9, there


SLOW = [pytest.param(keeps, start, marks=pytest.mark.slow) for keeps, start in (("all", 2), ("names", None))]


@pytest.mark.parametrize(("keeps", "start"), [("names", 2), ("synced", 2), ("synced", None), *SLOW])
def test_every_system_call_of_a_commit_is_a_safe_place_to_die(keeps, start, bases):
    seen, at, cut = [], 0, True
    while cut:
        at += 1
        cut, there = cut_off(bases, keeps, start, at)
        seen.append(there)
    assert seen == sorted(seen)  # old up to the rename, new from then on
    assert set(seen) == ({-1, 0, 1} if start is None else {2, 3})
    assert len(seen) > 30


def unsynced(path, data, flags):
    number = os.open(path, flags, 0o644)
    os.write(number, data)
    os.close(number)


@pytest.mark.parametrize(
    ("keeps", "name", "plant"),
    [
        ("names", "_put", unsynced),
        ("synced", "_put", unsynced),
        ("synced", "sync_folder", lambda path: None),
    ],
)
@pytest.mark.parametrize("start", [None, 2])
def test_a_commit_that_does_not_sync_would_be_found_out(keeps, name, plant, start, bases, monkeypatch):
    """The control: without the sync of files, or of folders, a power cut after a commit takes it away."""
    cut_off(bases, keeps, start, 10_000)
    monkeypatch.setattr(durable, name, plant)
    with pytest.raises((AssertionError, InputError)):
        cut_off(bases, keeps, start, 10_001)


def test_a_new_run_folder_is_there_after_a_power_cut(tmp_path):
    path = tmp_path / "runs" / "of today" / "run"

    def work():
        cut = Cut(Disk(tmp_path), "synced")
        create_run_folder(path, "").write("config.json", {})
        cut.crash(0)

    assert ended(forked(work)) == 0
    assert RunFolder(path).read("config.json") == {}


def test_a_summary_never_stands_before_what_it_speaks_of(prepared):
    """Power fails when the summary has its name and nothing later is synced."""
    ready = prepared("plain")
    out = ready.stopped(4)

    def work():
        cut = Cut(Disk(out), "synced")
        real = durable.sync_folder

        def cut_after_the_summary(path):
            if path == out and (out / "summary.json").exists():
                cut.crash(9, ahead="summary.json")
            real(path)

        durable.sync_folder = cut_after_the_summary
        ready.resume(out)

    assert ended(forked(work)) == 9
    summary = RunFolder(out).read("summary.json")
    assert adapter_sha256(out / "adapter") == summary["adapter_sha256"]
    assert "# Low-rank adapter" in (out / "adapter" / "README.md").read_text()
    assert ended(forked(lambda: ready.resume(out))) == 0
    assert results(out) == ready.expected


def fill(most: int):
    """The disk takes so many more bytes."""
    left, real = [most], os.write

    def write(number, data):
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = real(number, data[: left[0]])
        left[0] -= done
        return done

    os.write = write


def fail_fsync(number: int):
    """The disk fails at one sync."""
    count, real = [0], os.fsync

    def fsync(file):
        count[0] += 1
        if count[0] == number:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(file)

    os.fsync = fsync


FULL, BROKEN = "No space left on device", "Input/output error"
TROUBLES = [(fill, level, FULL) for level in range(20)] + [(fail_fsync, n, BROKEN) for n in range(1, 9)]


def assert_told(path, reason):
    """One line that says disk, and why."""
    told = path.read_text()
    assert told.startswith("disk: ")
    assert told.endswith(f"cannot be written ({reason})\n")
    assert told.count("\n") == 1


@pytest.mark.parametrize(("trouble", "level", "reason"), TROUBLES)
def test_a_disk_in_trouble_keeps_the_checkpoint(trouble, level, reason, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    manifest = committed(folder, 2)
    before = newest(folder)[0].manifest
    size = sum(path.stat().st_size for path in (folder.path / CHECKPOINTS / "00002").iterdir())

    def work():
        trouble(level * size // 20 if trouble is fill else level)
        committed(folder, 3, manifest)

    assert ended(forked(work, tmp_path / "told")) == 1
    assert_told(tmp_path / "told.err", reason)
    found, complaints = newest(folder)
    assert complaints == []
    assert found.manifest == before or (found.state.round == 3 and trouble is fail_fsync)
    rewind(folder, found)
    assert committed(folder, 4, found.manifest)["round"] == 4


@pytest.mark.parametrize(("trouble", "level", "reason"), [(fill, 30_000, FULL), (fail_fsync, 5, BROKEN)])
def test_a_run_on_a_disk_in_trouble_can_be_resumed(prepared, trouble, level, reason, tmp_path):
    ready = prepared("stacking")
    out = ready.stopped(2)

    def work():
        trouble(level)
        ready.resume(out)

    assert ended(forked(work, tmp_path / "told")) == 1
    assert_told(tmp_path / "told.err", reason)
    assert ended(forked(lambda: ready.resume(out))) == 0
    assert results(out) == ready.expected


def limit(most: int):
    """No file may grow past so many bytes, whoever writes it: also what a library opens by itself."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def fail_unlink(name: str):
    """The disk fails at taking one file away."""
    real = Path.unlink

    def unlink(path, missing_ok=False):
        if path.name == name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(path, missing_ok)

    Path.unlink = unlink


BIG = "File too large"


@pytest.mark.parametrize(
    ("moment", "trouble", "level", "reason"),
    [
        ("federated_round", limit, 3000, BIG),  # the journal, which is no file of `durable`
        pytest.param("federated_round", fill, 0, FULL, marks=pytest.mark.slow),
        ("federated_round", fail_unlink, "00003", BROKEN),
        pytest.param("save_state", fill, 2000, FULL, marks=pytest.mark.slow),
        ("export_adapter", limit, 1000, BIG),
        pytest.param("export_adapter", fill, 1000, FULL, marks=pytest.mark.slow),
        ("write_card", limit, 300, BIG),
        pytest.param("write_report", fill, 0, FULL, marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_fills_up_late_stops_the_run_in_one_line(
    moment, trouble, level, reason, prepared, tmp_path
):
    ready = prepared("plain")
    out = ready.stopped(3)

    def work():
        experiment.write_report = plain_report
        real = getattr(experiment, moment)

        def in_trouble(*words):
            trouble(level)
            return real(*words)

        setattr(experiment, moment, in_trouble)
        restart.prepare = lambda config, network=None: ready.experiment
        restart.resume(out)

    assert ended(forked(work, tmp_path / "told")) == 1
    assert_told(tmp_path / "told.err", reason)
    assert (out / "summary.json").exists() == (moment == "write_report")
    assert ended(forked(lambda: ready.resume(out))) == 0
    assert results(out) == ready.expected


def test_free_space_is_looked_at_before_anything_is_written(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    manifest = committed(folder, 1)
    before = tree(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(RunError, match=r"disk: .* cannot be written \(1.1 MB needed, 1.0 MB free\)"):
        commit(folder, state_after(2), manifest, 1.0, 2)
    assert tree(tmp_path) == before


def unseen(folder: RunFolder, changes: int) -> int:
    """How many of some changed bytes of a checkpoint, each alone, still give that checkpoint."""
    home, draw, count = folder.path / CHECKPOINTS, random.Random(0), 0
    files = [*(home / "00003").iterdir(), *home.glob("fold-*"), *folder.path.glob("*.jsonl")]
    assert {path.name for path in files} >= {"manifest.json", "state.safetensors", "fold-00002.safetensors"}
    for _ in range(changes):
        path = draw.choice(files)
        data = path.read_bytes()
        place = draw.randrange(len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ draw.randrange(1, 256)]) + data[place + 1 :])
        try:
            found, complaints = newest(folder)
        except InputError as error:
            assert "holds no checkpoint that verifies" in str(error)  # noqa: PT017
        else:
            count += found.state.round == 3
            assert found.state.round == 3 or complaints[0].startswith("checkpoint 00003 is damaged: ")
        path.write_bytes(data)
    assert newest(folder)[0].state.round == 3
    return count


def test_a_thousand_changed_bytes_are_found(tmp_path):
    folder = RunFolder(tmp_path)
    committed(folder, 3)
    assert unseen(folder, 1000) == 0


def test_without_their_hashes_many_changed_bytes_would_go_unseen(tmp_path, monkeypatch):
    """The control: of a manifest that knows the sizes alone."""
    monkeypatch.setattr("polyrank.commit._entry", lambda data: {"bytes": len(data)})
    folder = RunFolder(tmp_path)
    committed(folder, 3)
    assert unseen(folder, 100) > 20


def test_a_manifest_cannot_name_files_elsewhere(tmp_path):
    """Names in a manifest are never paths: a part it adds is not read, a ledger it names is not cut."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    manifest = dict(committed(folder, 1))
    outside = tmp_path / "precious.jsonl"
    outside.write_text("kept\n")
    manifest["ledgers"] = {**manifest["ledgers"], "../precious.jsonl": {"bytes": 0, "sha256": "0"}}
    from polyrank.commit import _seal

    (folder.path / CHECKPOINTS / "00001" / "manifest.json").write_bytes(_seal(manifest))
    found, _ = newest(folder)
    assert found.state.round == 1
    rewind(folder, found)
    assert outside.read_text() == "kept\n"


def test_keep_last_and_leftovers(tmp_path):
    folder = RunFolder(tmp_path)
    manifest = committed(folder, 4)
    home = tmp_path / CHECKPOINTS
    assert sorted(path.name for path in home.iterdir() if path.is_dir()) == ["00003", "00004"]
    assert len(list(home.glob("fold-*"))) == 4
    (home / "00005.tmp").mkdir()
    (home / "00005.tmp" / "state.safetensors").write_bytes(b"half")
    (home / "00001.tmp").mkdir()  # what a kill amid pruning leaves
    (home / "00001.tmp" / "manifest.json").write_bytes(b"old")
    committed(folder, 5, manifest)
    assert sorted(path.name for path in home.iterdir() if path.is_dir()) == ["00004", "00005"]
    assert newest(folder)[0].manifest["wall_s"] == 6.0


def race(out, tmp_path, patience_s):
    """Two processes go for one run folder: one gets it, the other leaves at once and has changed nothing."""
    before = tree(out)
    gate, opened = os.pipe(), os.pipe()

    def work():
        os.close(gate[1])
        os.read(gate[0], 1)  # both start when the test closes its end

        def hold(config, network=None):
            os.close(opened[1])
            os.read(opened[0], 1)  # the winner goes no further than the test lets it
            os._exit(0)

        restart.prepare = hold
        restart.resume(out)

    both = [forked(work, tmp_path / f"{n}.told") for n in range(2)]
    for end in (gate[0], gate[1], opened[0]):
        os.close(end)
    left = ended_within(both, patience_s)
    os.close(opened[1])
    codes = [left[pid] if pid in left else ended(pid) for pid in both]
    assert list(left.values()) == [2], f"{len(left)} of two left within {patience_s} s"
    assert sorted(codes) == [0, 2]
    assert tree(out) == before
    told = "".join((tmp_path / f"{n}.err").read_text() for n in range(2))
    assert told == f"RUN = '{out}': is being written by another process; nothing was touched\n"


def ended_within(pids, patience_s):
    """The exit code of the first of some processes to end; of none where that takes too long."""
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        for pid in pids:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                return {pid: os.waitstatus_to_exitcode(status)}
        time.sleep(0.002)
    return {}


@pytest.mark.parametrize("number", range(50))
def test_two_processes_on_one_run_folder(race_folder, number, tmp_path):
    race(race_folder, tmp_path, 5.0)


def test_without_the_lock_both_would_get_in(race_folder, tmp_path, monkeypatch):
    """The control, which would hang if nobody looked at the time."""
    monkeypatch.setattr(durable, "lock", lambda folder: durable.Lock(os.open(os.devnull, os.O_RDONLY)))
    with pytest.raises(AssertionError, match=r"0 of two left within 1.0 s"):
        race(race_folder, tmp_path, 1.0)


@pytest.fixture(scope="module")
def race_folder(prepared):
    ready = prepared("plain")
    return ready.stopped(2)


def test_two_new_runs_cannot_take_one_folder(prepared):
    ready = prepared("plain")
    out = ready.fresh()
    codes = [ended(pid) for pid in [forked(lambda: ready.run(out)) for _ in range(2)]]
    assert sorted(codes) == [0, 2]
    assert results(out) == ready.expected


def test_a_lock_ends_with_its_holder(tmp_path):
    held = durable.lock(tmp_path)
    with pytest.raises(InputError, match="is being written by another process"):
        durable.lock(tmp_path)
    held.release()
    again = durable.lock(tmp_path)
    del again
    durable.lock(tmp_path).release()
