"""A hundred rounds in the same processes: the base model is loaded once, and memory does not grow."""

from __future__ import annotations

import pytest

pytest.importorskip("nvflare")

from benchmarks.network import memory

pytestmark = pytest.mark.network
MOST_GROWN_MB = 20


def test_a_hundred_rounds_load_the_model_once_and_hold_no_more_memory_than_fifty(federation):
    found = memory(federation, 100)
    assert found["loaded_once"]
    assert set(found["grown_mb"]) == {"server", "site-a", "site-b", "site-c"}
    assert all(grown < MOST_GROWN_MB for grown in found["grown_mb"].values()), found["resident_mb"]
