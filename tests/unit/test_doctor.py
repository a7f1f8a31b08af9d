"""What the doctor says about a model's paths, and that it says what the model does."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from polyrank.doctor import examine
from polyrank.errors import InputError
from polyrank.models import frozen
from polyrank.models.load import packaged_model, pick_device
from tests.conftest import tiny_network


@pytest.mark.parametrize(
    ("family", "packed", "pooled", "prefix"),
    [
        ("bert", "yes", "first token, without keys and values of the others", "yes"),
        ("gpt2", "yes", "last token", "yes"),
        ("deberta", "no: its blocks do not get the layout", "no: it is not packed", "yes"),
        ("albert", "yes", "no: first token: logits differ by ", "no: it has one block"),
    ],
)
def test_the_paths_of_a_model_in_a_folder(family, packed, pooled, prefix, tmp_path):
    AutoTokenizer.from_pretrained(packaged_model()).save_pretrained(tmp_path)
    tiny_network(family, vocab_size=31000).save_pretrained(tmp_path)
    found = examine(str(tmp_path))
    assert (found["paths of"], found["packed"], found["prefix"]) == (str(tmp_path), packed, prefix)
    assert found["pooled"].startswith(pooled)
    beside = "no: a map sees 12 rows that are neither the texts nor their tokens"
    assert found["fused"] == f"attention: yes; all-linear: {beside if family == 'deberta' else 'yes'}"


@pytest.mark.skipif(pick_device("auto").type != "cpu", reason="only a CPU packs")
@pytest.mark.parametrize(
    ("gains", "fp32", "bf16"),
    [
        ({"fp32": 1.0, "bf16": 0.5}, "the default library", "the default library"),
        ({"fp32": 1.5, "bf16": 0.5}, "packed once in float32", "packed once in float32"),
        ({"fp32": 1.0, "bf16": 2.0}, "the default library", "packed once in bf16"),
    ],
)
def test_the_way_of_the_frozen_maps(gains, fp32, bf16, monkeypatch):
    monkeypatch.setattr(frozen, "_remembered_gains", lambda: gains)
    assert examine()["frozen maps"] == f"base_dtype = 'fp32': {fp32}; base_dtype = 'bf16': {bf16}"


def test_a_model_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(InputError, match="model.name"):
        examine(str(tmp_path / "nowhere"))


def test_without_a_name_it_is_the_packaged_model_if_there_is_one(monkeypatch):
    found = examine()
    assert found["paths of"] == found["model minilm"] == str(packaged_model())
    monkeypatch.setattr("polyrank.models.load._PACKAGED_IN", "no_such_package")
    assert "packed" not in examine()
