"""Two configs over two seeds with the real MiniLM, from the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from polyrank.cli import app, main


@pytest.fixture(scope="module")
def words(tiny_settings, tmp_path_factory):
    """`polyrank compare` for two ranks and two seeds, without --out."""
    folder = tmp_path_factory.mktemp("arms")
    for rank in (2, 4):
        (folder / f"rank{rank}.toml").write_text(f"[adapter]\nrank = {rank}\n")
    settings = [s for s in tiny_settings if not s.startswith("adapter.rank")]
    return [
        *("compare", str(folder / "rank2.toml"), str(folder / "rank4.toml"), "--seeds", "2"),
        *(word for setting in settings for word in ("--set", setting)),
    ]


def polyrank_command(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from polyrank.cli import main; main()", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


@pytest.fixture(scope="module")
def finished(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("here")
    done = polyrank_command(*words, "--target", "0.1", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "comparisons" / "1", done


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_comparison_tells_its_progress_its_result_and_where_things_lie(finished):
    _, done = finished
    told = done.stdout.splitlines()
    assert told[0].split() == ["cell", "status", "accuracy", "wall", "s", "ETA"]
    assert [line.split()[:2] for line in told[1:5]] == [
        ["rank2-0", "done"],
        ["rank4-0", "done"],
        ["rank2-1", "done"],
        ["rank4-1", "done"],
    ]
    assert told[4].endswith("0:00")
    assert [line.split()[0] for line in told[5:7]] == ["rank2", "rank4"]
    assert told[7:] == ["table    comparisons/1/compare.md", "page     comparisons/1/compare.html"]
    assert done.stderr == ""


def test_all_arms_of_a_seed_meet_the_same_clients_in_the_same_order(finished):
    out, _ = finished
    partitions, cohorts = {}, {}
    for cell in (out / "cells").iterdir():
        partitions[cell.name] = (cell / "partition.json").read_bytes()
        cohorts[cell.name] = [(row["round"], row["client"]) for row in lines(cell / "clients.jsonl")]
    assert len(cohorts) == 4
    for seed in (0, 1):
        assert partitions[f"rank2-{seed}"] == partitions[f"rank4-{seed}"]
        assert cohorts[f"rank2-{seed}"] == cohorts[f"rank4-{seed}"]
    assert cohorts["rank2-0"] != cohorts["rank2-1"]
    assert json.loads((out / "compare.json").read_text())["unpaired"] == []


def test_the_table_is_that_of_the_run_folders(finished):
    out, _ = finished
    content = json.loads((out / "compare.json").read_text())
    assert content["target"] == 0.1
    for cell in content["cells"]:
        folder = out / "cells" / f"{cell['label']}-{cell['seed']}"
        assert cell.items() >= json.loads((folder / "summary.json").read_text()).items()
        assert json.loads((folder / "config.json").read_text())["seed"] == cell["seed"]
    for place, arm in enumerate(content["arms"]):
        accuracies = [cell["test_accuracy"] for cell in content["cells"][place::2]]
        assert arm["accuracy"]["mean"] == pytest.approx(sum(accuracies) / 2)
        assert arm["slots"]["mean"] == 18 * int(arm["label"].removeprefix("rank"))
        assert arm["reached"] == 2
    assert content["arms"][0]["bytes_up"] < content["arms"][1]["bytes_up"]
    text = (out / "compare.md").read_text()
    assert "**arm rank2**: adapter.rank = 2\n" in text
    assert "partition.clients = 4" in text


def test_the_page_is_one_file_for_light_and_dark(finished):
    page = (finished[0] / "compare.html").read_text()

    links = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: links.extend(v for k, v in attrs if k in ("src", "href"))
    parser.feed(page)
    assert all(link.startswith("#") for link in links)
    assert page.count("<svg") == 3
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    assert "#0102" not in page


def test_only_the_cell_that_is_missing_runs_again(finished, words, tmp_path, monkeypatch, capsys):
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    before = json.loads((out / "compare.json").read_text())
    missing = out / "cells" / "rank4-0"
    (missing / "summary.json").unlink()
    times = {p: p.stat().st_mtime_ns for p in (out / "cells").rglob("*") if missing not in (p, *p.parents)}
    monkeypatch.setattr(sys, "argv", ["polyrank", *words, "--out", str(out), "--json"])
    with pytest.raises(SystemExit) as ended:
        app()
    assert ended.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed.pop("comparison") == str(out)
    assert printed["target"] is None  # another target is not another comparison
    assert printed == json.loads((out / "compare.json").read_text())
    now = {p: p.stat().st_mtime_ns for p in (out / "cells").rglob("*") if missing not in (p, *p.parents)}
    assert now == times
    for old, new in zip(before["cells"], printed["cells"], strict=True):
        assert new["adapter_sha256"] == old["adapter_sha256"]  # also of the cell that ran again
        assert (new["wall_s"] == old["wall_s"]) == ((new["label"], new["seed"]) != ("rank4", 0))


def test_another_comparison_in_the_same_folder_is_refused(finished, words, monkeypatch, capsys):
    out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    for more in (["--set", "rounds=3"], ["--seeds", "3"]):
        monkeypatch.setattr(sys, "argv", ["polyrank", *words, *more, "--out", str(out)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err == (
            f"polyrank: --out = '{out}': exists already and holds another comparison; name a new folder\n"
        )
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["fedit", "--seeds", "0"], "polyrank: --seeds = []: must be at least one seed"),
        (["fedit", "--target", "80"], "polyrank: --target = 80.0: must be an accuracy above 0 and at most 1"),
        (["fedit", "nowhere.toml"], "polyrank: nowhere: CONFIG = 'nowhere.toml': cannot be read"),
        (
            ["fedit", "--set", "data.source=nowhere.csv", "--out", "out"],
            "polyrank: fedit: data.source = 'now",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(more, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["polyrank", "compare", *more])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(line)
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_failed_cells_are_told_and_the_others_are_written(finished, words, tmp_path, monkeypatch, capsys):
    import polyrank.compare as comparison
    from polyrank.errors import RunError

    def fail(config, out):
        out.mkdir(parents=True)
        raise RunError("round 0: no client gave a usable update")

    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    shutil.rmtree(out / "cells" / "rank4-1")
    monkeypatch.setattr(comparison, "run", fail)
    monkeypatch.setattr(sys, "argv", ["polyrank", *words, "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    told = capsys.readouterr()
    assert told.err == (
        "polyrank: 1 of 4 cells failed and are left out (rank4-1: round 0: no client gave a usable update)\n"
    )
    assert "rank4-1    failed" in told.out
    assert json.loads((out / "compare.json").read_text())["unfinished"] == ["rank4-1"]
    shutil.rmtree(out / "cells")
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "every cell failed (rank2-0: round 0" in capsys.readouterr().err
