"""Clients share a pass only where each then gets what it gets alone."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from polyrank.assemble import _fuse
from polyrank.config import load_config
from polyrank.errors import InputError
from polyrank.fused import Shares
from polyrank.grouping import why_alone
from polyrank.models.load import prepare
from polyrank.models.targets import resolve_targets
from polyrank.session import ClientEnv
from tests.conftest import CPU, SPEAKERS, tiny_model, tiny_speaker
from tests.unit.test_client import tokens

SMALL = {"vocab_size": 90, "num_labels": 3, "pad_token_id": 0}


def xlnet():
    config = XLNetConfig(**SMALL, d_model=16, n_layer=2, n_head=2, d_inner=24)
    return prepare(XLNetForSequenceClassification(config).eval(), None, "tiny-xlnet", set(), CPU)


def deberta_v3():
    """Its query and key maps see relative positions as well as tokens."""
    config = DebertaV2Config(
        **SMALL,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        relative_attention=True,
        position_buckets=8,
        share_att_key=True,
        pos_att_type="p2c|c2p",
    )
    return prepare(DebertaV2ForSequenceClassification(config).eval(), None, "tiny-v3", set(), CPU)


def shapes_of(model, targets="all-linear"):
    return resolve_targets(model.network, model.blocks, targets)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def test_texts_that_stay_in_their_order_share_a_pass(family):
    model = tiny_model(family)
    assert why_alone(model, shapes_of(model, "attention")) == ""


@pytest.mark.parametrize("family", SPEAKERS)
def test_prompts_share_a_pass(family):
    model = tiny_speaker(family)
    assert why_alone(model, shapes_of(model)) == ""


def test_tokens_that_are_handed_on_by_place_do_not():
    model = xlnet()
    assert why_alone(model, shapes_of(model)).startswith("logits differ by ")


@pytest.mark.parametrize("targets", ["attention", "all-linear"])
def test_maps_that_see_more_than_the_texts_do_not(targets):
    model = deberta_v3()
    reason = "a map sees 16 rows that are neither the texts nor their tokens"
    assert why_alone(model, shapes_of(model, targets)) == reason


def test_another_clients_factors_would_be_seen(monkeypatch):
    """The control of the first two: one row that goes to the wrong client is enough."""
    begin = Shares.begin

    def shifted(self, lengths):
        begin(self, lengths)
        for counts in self._counts.values():
            if len(counts) > 1:
                counts[0], counts[1] = counts[0] - 1, counts[1] + 1

    monkeypatch.setattr(Shares, "begin", shifted)
    model = tiny_model()
    assert why_alone(model, shapes_of(model, "attention")).startswith("logits differ by ")


def test_a_run_goes_one_by_one_where_it_must_and_refuses_what_must_not_be():
    model = xlnet()
    clients = {"c": ClientEnv(model, tokens(9))}
    assert _fuse(load_config(None, []), clients, shapes_of(model)) == 1
    with pytest.raises(InputError, match="engine.fuse = 4: must be 1: tiny-xlnet .*logits differ by"):
        _fuse(load_config(None, ["engine.fuse=4"]), clients, shapes_of(model))
    bert = tiny_model()
    clients = {"c": ClientEnv(bert, tokens(9))}
    assert _fuse(load_config(None, []), clients, shapes_of(bert)) > 1
    assert _fuse(load_config(None, ["engine.fuse=4"]), clients, shapes_of(bert)) == 4
