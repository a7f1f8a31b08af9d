"""A commit that is cut off at any system call, on a disk that is full, failing or lying; and two writers."""

from __future__ import annotations

import errno
import os
import random
import shutil
import time

import pytest

from polyrank import durable, restart
from polyrank.commit import CHECKPOINTS, commit, first_manifest, newest, rewind
from polyrank.errors import InputError, RunError
from polyrank.ledger import LEDGERS, RunFolder
from tests.builders import largest_difference, random_adapter, state_of
from tests.small_runs import ended, forked, results, tree

CALLS = ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "close")


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


class Cut:
    """Counts the system calls of a process and ends it at one of them, taking what was never synced."""

    def __init__(self, at: int) -> None:
        self.at, self.count, self.dirty = at, 0, {}
        for name in CALLS:
            setattr(os, name, self.counted(name, getattr(os, name)))

    def counted(self, name, real):
        def call(*words, **options):
            self.count += 1
            if self.count == self.at:
                self.crash(name, real, words)
            if name == "write":
                number = words[0]
                if number not in self.dirty:
                    self.dirty[number] = (os.dup(number), os.fstat(number).st_size)
            if name == "fsync":
                self.dirty.pop(words[0], None)
            if name == "close" and words[0] in self.dirty:
                self.dirty[-self.count] = self.dirty.pop(words[0])
            return real(*words, **options)

        return call

    def crash(self, name, real, words):
        if name == "write":
            real(words[0], words[1][: len(words[1]) // 2])
        for number, size in self.dirty.values():
            os.ftruncate(number, size)
        os._exit(9)


def test_every_system_call_of_a_commit_is_a_safe_place_to_die(tmp_path):
    base = RunFolder(tmp_path / "base")
    base.path.mkdir()
    manifest = committed(base, 2)
    seen, at = [], 0
    while True:
        at += 1
        path = tmp_path / str(at)
        shutil.copytree(base.path, path)
        folder = RunFolder(path)

        def third_round(folder=folder, at=at):
            Cut(at)
            committed(folder, 3, manifest)

        code = ended(forked(third_round))
        found, complaints = newest(folder)
        assert complaints == []
        assert found.state.round in (2, 3)
        seen.append(found.state.round)
        expected = state_after(found.state.round)
        assert largest_difference(found.state.adapter, expected.adapter) == 0
        assert [largest_difference(a, b) for a, b in zip(found.state.folds, expected.folds, strict=True)] == (
            [0] * found.state.round
        )
        rewind(folder, found)
        assert [len(folder.read_rows(name)) for name in LEDGERS] == [
            found.state.round,
            2 * found.state.round,
            0,
        ]
        if found.state.round == 2:  # and the round can be done again
            committed(folder, 3, found.manifest)
        last, _ = newest(folder)
        assert (last.state.round, len(folder.read_rows("rounds.jsonl"))) == (3, 3)
        shutil.rmtree(path)
        if code == 0:
            break
        assert code == 9
    assert at > 30
    assert seen == sorted(seen)  # old up to the rename, new from then on
    assert {2, 3} == set(seen)


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


def test_free_space_is_looked_at_before_anything_is_written(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    manifest = committed(folder, 1)
    before = tree(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(RunError, match=r"disk: .* cannot be written \(1.1 MB needed, 1.0 MB free\)"):
        commit(folder, state_after(2), manifest, 1.0, 2)
    assert tree(tmp_path) == before


def test_a_thousand_changed_bytes_are_found(tmp_path):
    folder = RunFolder(tmp_path)
    committed(folder, 3)
    home, draw = tmp_path / CHECKPOINTS, random.Random(0)
    files = [*(home / "00003").iterdir(), *home.glob("fold-*"), *tmp_path.glob("*.jsonl")]
    assert {path.name for path in files} >= {"manifest.json", "state.safetensors", "fold-00002.safetensors"}
    for _ in range(1000):
        path = draw.choice(files)
        data = path.read_bytes()
        place = draw.randrange(len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ draw.randrange(1, 256)]) + data[place + 1 :])
        try:
            found, complaints = newest(folder)
        except InputError as error:
            assert "holds no checkpoint that verifies" in str(error)  # noqa: PT017
        else:
            assert found.state.round == 2
            assert complaints[0].startswith("checkpoint 00003 is damaged: ")
        path.write_bytes(data)
    assert newest(folder)[0].state.round == 3


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
    committed(folder, 5, manifest)
    assert sorted(path.name for path in home.iterdir() if path.is_dir()) == ["00004", "00005"]
    assert newest(folder)[0].manifest["wall_s"] == 6.0


@pytest.mark.parametrize("race", range(50))
def test_two_processes_on_one_run_folder(race_folder, race, tmp_path):
    """One gets it; the other leaves at once and has changed nothing."""
    out = race_folder
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

    both = {forked(work, tmp_path / f"{n}.told") for n in range(2)}
    for end in (gate[0], gate[1], opened[0]):
        os.close(end)
    start = time.monotonic()
    loser, status = os.wait()
    assert time.monotonic() - start < 5
    assert os.waitstatus_to_exitcode(status) == 2
    assert tree(out) == before
    os.close(opened[1])
    (winner,) = both - {loser}
    assert ended(winner) == 0
    told = "".join((tmp_path / f"{n}.err").read_text() for n in range(2))
    assert told == f"RUN = '{out}': is being written by another process; nothing was touched\n"


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
