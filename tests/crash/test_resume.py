"""Killed, interrupted, damaged: a resumed run ends with the same bits, or says in one line why it cannot."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

import polyrank.config
from polyrank import experiment, restart
from polyrank.accountant import Mechanism
from polyrank.charges import CHARGES
from polyrank.commit import CHECKPOINTS, commit
from polyrank.engine import workers
from polyrank.errors import InputError
from polyrank.restart import reopen
from tests.small_runs import METHODS, command, ended, forked, results, small_config, tree

STATEFUL = ("plain", "fused", "voting", "loss_based", "stacking", "federa", "pruning", "causal", "private")


def killed_at(run, moment_s: float, out: Path) -> bool:
    """Whether the kill came before the end."""
    pid = forked(lambda: run(out))
    time.sleep(moment_s)
    os.kill(pid, signal.SIGKILL)
    return ended(pid) == -signal.SIGKILL


def kill_and_resume(prepared, method: str, draw: random.Random) -> None:
    """Kill a run at a random moment, and the run that resumes it at another; then let it finish."""
    if method == "private":
        pytest.importorskip("dp_accounting")
    ready = prepared(method)
    for turn in range(5):
        out = ready.fresh()
        if killed_at(ready.run, draw.random() * ready.whole_s / 2**turn, out):
            break
        shutil.rmtree(out)
    else:
        pytest.fail("every one of five runs was done before it was killed")
    killed_at(ready.finish, draw.random() * ready.whole_s / 2, out)
    last = out if (out / "config.json").exists() else ready.fresh()
    work = ready.resume if last is out else ready.run
    assert ended(forked(lambda: work(last))) == 0
    assert results(last) == ready.expected
    shutil.rmtree(last)


@pytest.mark.parametrize("number", range(20))
def test_a_run_killed_at_a_random_moment_ends_with_the_same_bits(prepared, number):
    kill_and_resume(prepared, STATEFUL[number % len(STATEFUL)], random.Random(number))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(200))
def test_two_hundred_kills(prepared, number):
    kill_and_resume(prepared, STATEFUL[number % len(STATEFUL)], random.Random(1000 + number))


def test_without_the_rewind_a_resumed_run_has_other_results(prepared, monkeypatch):
    """The control: rows of a round that was not committed stay, and are there twice."""
    ready = prepared("plain")
    out = ready.fresh()

    def stops_before_a_commit():
        def dies(folder, state, *rest):
            if state.round == 2:
                os._exit(9)
            return commit(folder, state, *rest)

        experiment.commit = dies
        ready.run(out)

    assert ended(forked(stops_before_a_commit)) == 9
    monkeypatch.setattr(restart, "rewind", lambda folder, committed: None)
    assert ended(forked(lambda: ready.resume(out))) == 0
    assert results(out) != ready.expected


def changed_config(out: Path, table: str, **changes) -> None:
    config = json.loads((out / "config.json").read_text())
    config[table] |= changes
    (out / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("method", ["plain", "private"])
def test_another_config_is_refused(prepared, method, tmp_path):
    """Noise that was turned down in between would be charged as if it had always been so."""
    if method == "private":
        pytest.importorskip("dp_accounting")
    ready = prepared(method)
    out = ready.stopped(2)
    before = (out / "config.json").read_text()
    if method == "private":
        changed_config(out, "privacy", noise_multiplier=40)
    else:
        changed_config(out, "training", learning_rate=0.03)
    assert ended(forked(lambda: ready.resume(out), tmp_path / "told")) == 2
    told = (tmp_path / "told.err").read_text()
    assert told == (
        f"RUN = '{out / 'config.json'}': has changed since the run began, so that the run cannot go on\n"
    )
    (out / "config.json").write_text(before)
    assert ended(forked(lambda: ready.resume(out))) == 0
    assert results(out) == ready.expected


def test_a_private_run_that_lost_its_record_is_refused(prepared, tmp_path):
    pytest.importorskip("dp_accounting")
    ready = prepared("private")
    out = ready.stopped(2)
    (out / CHARGES).unlink()
    assert ended(forked(lambda: ready.resume(out), tmp_path / "told")) == 2
    lost = "holds no charge of round 0, which is done; what was spent is not known any more"
    assert (tmp_path / "told.err").read_text() == f"{CHARGES} = '{out / CHARGES}': {lost}\n"
    assert not (out / CHARGES).exists()


def test_a_private_run_that_can_pay_for_no_more_ends_with_what_it_has(prepared):
    """A round that was charged, cut off and done again with another sum takes the last round's share."""
    pytest.importorskip("dp_accounting")
    budget = Mechanism(20.0, None, 1e-5).epsilon(4)
    ready = prepared("private", "evaluation.every=10", f"privacy.epsilon={budget * (1 + 1e-9)}")
    assert len(ready.expected["privacy.jsonl"]) == 4
    out = ready.stopped(3)
    config = ready.config
    config.privacy.open(out, config.sampling).charge(3, b"a sum that was not to be")
    assert ended(forked(lambda: ready.resume(out), out.with_suffix(".told"))) == 0
    found = results(out)
    assert found["rounds.jsonl"] == ready.expected["rounds.jsonl"][:3]
    assert found["summary"]["rounds"] == 3
    assert found["summary"]["epsilon"] == found["privacy.jsonl"][-1]["epsilon"] == budget
    assert 0 <= found["summary"]["test_accuracy"] <= 1


@pytest.mark.parametrize("rounds", range(5))
@pytest.mark.parametrize("method", ["stacking", "voting", "causal"])
def test_every_round_is_a_place_to_go_on_from(prepared, method, rounds):
    ready = prepared(method)
    out = ready.stopped(rounds)
    assert ended(forked(lambda: ready.finish(out))) == 0
    assert results(out) == ready.expected


def test_a_process_of_its_own_resumes_with_all_that_a_device_had(inputs, prepared):
    """Not a fork: model and data are loaded anew, and folds come back from the checkpoint."""
    ready = prepared("stacking")
    out = ready.stopped(2)
    assert ended(forked(command("resume", str(out)), out.with_suffix(".told"))) == 0
    lines = out.with_suffix(".out").read_text().splitlines()
    assert lines[0] == f"{out}: 2 of 4 rounds are done"
    assert [line.split()[0] for line in lines[2:4]] == ["3/4", "4/4"]
    assert lines[-1] == f"adapter  {out}/adapter"
    assert out.with_suffix(".err").read_text() == ""
    assert results(out) == ready.expected


def test_control_c_says_how_to_go_on(inputs, tmp_path, monkeypatch):
    config, out = small_config(inputs, "plain", "rounds=400"), tmp_path / "run"
    monkeypatch.setattr(polyrank.config, "load_config", lambda *_: config)
    pid = forked(command("run", "--out", str(out)), tmp_path / "told")
    deadline = time.monotonic() + 60
    while not (out / "rounds.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(pid, signal.SIGINT)
    assert ended(pid) == 130
    told = f"polyrank: stopped; `polyrank resume {out}` goes on from its last round\n"
    assert (tmp_path / "told.err").read_text() == told
    assert reopen(out).committed is not None


def test_a_finished_run_says_so_and_stays_as_it_is(prepared):
    ready = prepared("plain")
    out = ready.stopped(4)
    assert ended(forked(lambda: ready.resume(out))) == 0
    before = tree(out)
    summary = json.loads((out / "summary.json").read_text())
    assert ended(forked(command("resume", str(out)), out.with_suffix(".told"))) == 0
    told = f"{out} is finished: accuracy {summary['test_accuracy']:.3f}\n"
    assert out.with_suffix(".out").read_text() == told
    assert out.with_suffix(".err").read_text() == ""
    assert tree(out) == before
    assert not (out / CHECKPOINTS).exists()
    out.chmod(0o555)  # an archive
    assert polyrank.resume(out).summary == summary
    out.chmod(0o755)
    (out / "report.html").unlink()  # killed in the last step of all
    assert polyrank.resume(out).summary == summary
    assert (out / "report.html").exists()


def test_other_data_or_another_model_is_refused(inputs, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(inputs, own)
    config = small_config(own)

    def start():
        from polyrank.assemble import prepare
        from polyrank.experiment import conduct, open_folder

        experiment = prepare(config)
        rows = conduct(experiment, open_folder(experiment, tmp_path / "run"))
        next(rows)

    assert ended(forked(start)) == 0
    before = tree(tmp_path / "run")
    texts = (own / "texts.csv").read_text()
    (own / "texts.csv").write_text(texts.replace("word7 ", "word8 ", 1))
    with pytest.raises(InputError, match=r"data.source = '.*: has changed since the run began"):
        polyrank.resume(tmp_path / "run")
    (own / "texts.csv").write_text(texts)
    from safetensors.torch import load_file, save_file

    weights = load_file(own / "model" / "model.safetensors")
    name = next(name for name in weights if "query.weight" in name)
    weights[name][0, 0] += 1e-3
    save_file(weights, own / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model.name = .*: has changed since the run began"):
        polyrank.resume(tmp_path / "run")
    assert tree(tmp_path / "run") == before


def test_a_folder_without_a_run_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=r"RUN = .*is no run folder that can go on"):
            polyrank.resume(path)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(prepared):
    ready = prepared("stacking")
    out = ready.stopped(3)
    state = out / CHECKPOINTS / "00003" / "state.safetensors"
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    reopened = reopen(out)
    assert reopened.committed.state.round == 2
    assert reopened.complaints == [
        "checkpoint 00003 is damaged: state.safetensors is not the file that was committed"
    ]
    reopened.folder.release()
    assert ended(forked(lambda: ready.resume(out))) == 0
    assert results(out) == ready.expected


def test_a_killed_server_leaves_no_lock_with_its_workers(inputs, tmp_path):
    """Workers are forks and outlive a killed server by up to a session; they must not keep its lock."""
    from polyrank.assemble import prepare
    from polyrank.experiment import conduct, open_folder

    changes = ("engine.workers=2", "training.local_steps=4000", "rounds=1")
    experiment, out = prepare(small_config(inputs, "plain", *changes)), tmp_path / "run"
    pid = forked(lambda: list(conduct(experiment, open_folder(experiment, out))))
    deadline = time.monotonic() + 30
    while len(children(pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = children(pid)
    assert len(workers) == 2
    with pytest.raises(InputError, match="is being written by another process"):
        reopen(out)
    before = [cpu_ticks(worker) for worker in workers]
    while any(cpu_ticks(worker) < 10 + ticks for worker, ticks in zip(workers, before, strict=True)):
        assert time.monotonic() < deadline, "the workers have nothing to do"
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    try:
        assert any(Path(f"/proc/{worker}").exists() for worker in workers)
        reopen(out).folder.release()
    finally:
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)


def cpu_ticks(pid: int) -> int:
    """What a process has worked, in hundredths of a second."""
    told = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(told[11]) + int(told[12])


def children(pid: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_every_stateful_method_is_among_the_killed():
    assert set(STATEFUL) == set(METHODS)


def test_a_run_its_resume_and_its_export_unpickle_nothing(inputs, tmp_path):
    """Python tells an audit hook of every name that a pickle asks for, in forked workers as well."""
    from polyrank.assemble import prepare
    from polyrank.experiment import conduct, open_folder
    from polyrank.export import export_run

    def unpickle() -> None:
        pickle = importlib.import_module("pickle")
        pickle.loads(pickle.dumps(Path()))

    def work(where: str) -> None:
        sys.addaudithook(lambda event, words: os._exit(3) if event == "pickle.find_class" else None)
        answers = workers._answers
        if where == "in a worker":
            workers._answers = lambda *given: [unpickle(), answers(*given)][1]
        experiment = prepare(small_config(inputs, "stacking", "engine.workers=2", "rounds=2"))
        folder = open_folder(experiment, tmp_path / f"run {where}")
        rows = conduct(experiment, folder)
        next(rows)
        rows.close()
        polyrank.resume(folder.path)
        if sum(row["failed"] for row in folder.read_rows("rounds.jsonl")):  # a worker is gone
            raise SystemExit(3)
        export_run(folder.path, folder.path / "merged", merged=True)
        if where == "at the end":
            unpickle()

    assert ended(forked(lambda: work("nowhere"), tmp_path / "told")) == 0, (tmp_path / "told.err").read_text()
    assert ended(forked(lambda: work("at the end"))) == 3
    assert ended(forked(lambda: work("in a worker"))) in (1, 3)
