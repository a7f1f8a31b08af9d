"""A language model over a real network: its texts stay with the sites, and the bits are the same."""

from __future__ import annotations

import pytest

pytest.importorskip("nvflare")

from tests.network.test_network import METHODS
from tests.small_runs import results

pytestmark = pytest.mark.network
SPOKEN = ("rounds=3", "model.max_length=30", "evaluation.responses=2", "evaluation.max_new_tokens=4")


@pytest.mark.parametrize("federation", ["causal_lm"], indirect=True)
@pytest.mark.parametrize("method", METHODS)
def test_sites_and_simulated_clients_end_with_the_same_language_model(federation, method):
    here, there = federation.folder / f"{method}-embedded", federation.folder / f"{method}-network"
    settings = (*METHODS[method], *SPOKEN)
    federation.run(here, *settings, network=False)
    federation.run(there, *settings)
    assert results(here) == results(there)
    assert results(here)["samples"]
