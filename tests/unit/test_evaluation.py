"""Scores against scikit-learn, and predictions that do not depend on the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, log_loss

from polyrank.evaluation import majority_rate, predict, scores
from tests.conftest import tiny_model
from tests.unit.test_client import tokens


@pytest.mark.parametrize("present", [4, 2])
def test_scores_equal_scikit_learn(present):
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 4, generator=draw)
    labels = torch.randint(0, present, (50,), generator=draw)
    got, guess = scores(logits, labels), logits.argmax(1)
    assert got["accuracy"] == pytest.approx(accuracy_score(labels, guess))
    assert got["macro_f1"] == pytest.approx(f1_score(labels, guess, average="macro"))
    expected = log_loss(labels, torch.softmax(logits.double(), 1).numpy(), labels=[0, 1, 2, 3])
    assert got["loss"] == pytest.approx(expected, rel=1e-5)


def test_predictions_stand_in_the_order_of_the_examples():
    model, data = tiny_model(), tokens(11)
    together, alone = predict(model, data, 4), predict(model, data, 1)
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(predict(model, data.select([7, 2]), 2), together[[7, 2]], atol=1e-5)


def test_majority_rate():
    assert majority_rate(np.array([0, 1, 1, 2]), 3) == 0.5
