"""The documentation is true: its code runs, its tables are complete."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from polyrank.adapter import prefix_mask, restrict
from polyrank.aggregation import FedAvg
from polyrank.recipes import recipes
from tests.builders import largest_difference, random_adapter, state_of, update_of

ROOT = Path(__file__).parents[2]


def code_of(page: str) -> str:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)[0]


def test_the_rule_of_the_docs_keeps_and_breaks_the_laws_it_says(tmp_path, monkeypatch):
    (tmp_path / "median.py").write_text(code_of("docs/add-your-own-rule.md"))
    monkeypatch.syspath_prepend(tmp_path)
    rule = importlib.import_module("median").Median()
    assert len(code_of("docs/add-your-own-rule.md").splitlines()) <= 60
    bank = random_adapter(0, 3, "svd")
    state = state_of(bank)
    ranks = [3, 2, 1]
    mixed = [
        update_of(f"c{i}", random_adapter(i + 1, 3, "svd"), prefix_mask(bank, r), i + 1)
        for i, r in enumerate(ranks)
    ]

    def merge(updates):
        return rule.aggregate(state, updates).adapter

    by_hand = torch.stack([u.adapter.modules["block.0.q"].A[0] for u in mixed]).median(dim=0).values
    assert torch.equal(merge(mixed).modules["block.0.q"].A[0], by_hand)
    assert largest_difference(merge(mixed), merge(mixed[::-1])) == 0
    full = [update_of(f"c{i}", random_adapter(i, 3, "svd")) for i in range(3)]
    twice = dataclasses.replace(full[0], client="again")
    assert largest_difference(merge(full), merge([*full, twice])) > 0.01
    assert largest_difference(merge([update_of(f"c{i}", bank) for i in range(3)]), bank) == 0
    assert largest_difference(merge(full), FedAvg().aggregate(state, full).adapter) > 0.01
    low = [u for u in mixed if u.client != "c0"]
    tail = {name: torch.tensor([False, False, True]) for name in bank.modules}
    assert largest_difference(restrict(merge(low), tail), restrict(bank, tail)) == 0


def test_every_method_has_a_page():
    pages = {path.stem for path in (ROOT / "docs" / "methods").glob("*.md")}
    assert set(recipes()) <= pages
    for name in recipes():
        assert f'method = "{name}"' in (ROOT / "docs" / "methods" / f"{name}.md").read_text()


def test_the_readme_shows_the_example_that_is_run():
    example = (ROOT / "examples" / "quickstart.py").read_text().partition('"""\n\n')[2]
    shown = code_of("README.md")
    assert sorted(shown.split()) == sorted(example.split())
    assert len([line for line in shown.splitlines() if line.strip()]) <= 20


def test_every_key_of_the_config_is_documented():
    from polyrank.config import Config

    page = (ROOT / "docs" / "configuration.md").read_text()
    for name, field in Config.model_fields.items():
        tables = [field.default] if hasattr(field.default, "model_dump") else []
        keys = [key for table in tables for key in type(table).model_fields if key != "kind"]
        for key in keys:
            assert re.search(rf"`{name}\.{key}\b", page), f"{name}.{key}"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here")
def test_the_units_of_the_docs_are_units(tmp_path):
    page = (ROOT / "docs" / "network.md").read_text()
    units = re.findall(r"```ini\n# /etc/systemd/system/(\S+)\n(.*?)```", page, re.DOTALL)
    assert len(units) == 2
    for name, text in units:
        assert "User=polyrank" in text
        (tmp_path / name).write_text(text.replace("/opt/polyrank/bin/polyrank", sys.executable))
    command = ["systemd-analyze", "verify", *(str(tmp_path / name) for name, _ in units)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours = [line for line in done.stderr.splitlines() if any(name in line for name, _ in units)]
    assert not ours  # of other units it may warn
