"""One federation for all tests of a module."""

from __future__ import annotations

import pytest

from tests.network.federation import Federation
from tests.site_runs import SITES


@pytest.fixture(scope="module", params=["classification"])
def federation(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest):
    made = Federation.made_in(tmp_path_factory.mktemp("federation"), task=request.param)
    for name in ("server", *SITES):
        made.start(name)
    yield made
    for name in list(made.running):
        made.kill(name)
