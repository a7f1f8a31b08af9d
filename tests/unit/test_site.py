"""A site: what it reads, what it checks before it joins, what it refuses."""

from __future__ import annotations

import hashlib
import json

import pytest
from pydantic import ValidationError

from polyrank.assemble import prepare
from polyrank.client import handle
from polyrank.engine.base import Client
from polyrank.engine.flare import FlareEngine
from polyrank.errors import InputError
from polyrank.round import federated_round, make_task
from polyrank.session import ClientError
from polyrank.site import Joined, Site, SiteTable, kept_aside, read_table, tokenizer_digest
from polyrank.wire import WireError, encode_task
from tests.site_runs import MIXED, SITES, make_sites, site_config
from tests.small_runs import small_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_sites(tmp_path_factory.mktemp("sites"))


def config_of(folder, engine, method="plain", *more):
    flare = ["engine.kind=flare", "engine.kit=kit"] if engine == "flare" else []
    return site_config(folder, method, *flare, *more)


class Direct:
    """The network without a network: each site in this process, reached by a call."""

    def __init__(self, folder):
        self.sites = {name: Site(read_table(folder / name / "site.toml")) for name in SITES}

    def open(self, terms):
        self.terms = terms
        joined = {name: site.join(name, terms) for name, site in self.sites.items()}
        population = [Client(name, one.num_examples) for name, one in joined.items()]
        engine = FlareEngine(
            population, {n: lambda *, timeout, s=s: s for n, s in self.sites.items()}, 9.0, OSError
        )
        return engine, {name: (one.num_examples, one.num_tokens) for name, one in joined.items()}


@pytest.mark.parametrize("key", ["num_examples", "num_tokens", "num_holdout"])
@pytest.mark.parametrize("count", ["-5", "1e15", "1000000000000001", "9" * 400])
def test_a_site_has_no_number_of_texts_without_end(key, count):
    """Its own word: 1e12 texts would own every mean, and 10^400 are no float."""
    told = {"num_examples": 5, "num_tokens": 45, "num_holdout": 0, "device": "cpu", "threads": 1, "pid": 7}
    text = json.dumps(told | {"loads": 1})
    assert Joined.model_validate_json(text).num_examples == 5
    with pytest.raises(ValidationError):
        Joined.model_validate_json(text.replace(f'"{key}": {told[key]}', f'"{key}": {count}'))


@pytest.mark.parametrize("method", ["voting", "mixed"])
def test_sites_with_their_own_files_give_the_bits_of_the_embedded_engine(folder, method):
    more = MIXED if method == "mixed" else ()
    name = "plain" if method == "mixed" else method
    runs = []
    for engine in ("embedded", "flare"):
        experiment = prepare(
            config_of(folder, engine, name, *more), Direct(folder) if engine == "flare" else None
        )
        state, records = experiment.start, []
        for _ in range(3):
            state, record = federated_round(experiment.federation, state)
            records.append([(r.client, r.bytes_down, r.bytes_up, r.error) for r in record.replies])
        runs.append((state, records))
    (here, told), (there, same) = runs
    assert told == same
    assert list(here.clients) == list(SITES)
    for name, factors in here.adapter.modules.items():
        assert factors.B.equal(there.adapter.modules[name].B)
        assert factors.A.equal(there.adapter.modules[name].A)
    assert all(value.equal(there.head[name]) for name, value in here.head.items())


def test_the_base_model_is_loaded_once_however_often_a_site_joins(folder):
    network = Direct(folder)
    prepare(config_of(folder, "flare"), network)
    site = network.sites["site-a"]
    assert site.join("site-a", network.terms).loads == 1
    assert site.join("site-a", network.terms).num_examples == len(site.env.train)


def test_texts_kept_aside_are_those_of_the_embedded_engine(folder):
    network = Direct(folder)
    prepare(config_of(folder, "flare"), network)
    embedded = prepare(config_of(folder, "embedded"))
    for name, site in network.sites.items():
        there = embedded.environments[name]
        assert (site.env.train.ids == there.train.ids).all()
        assert (site.env.holdout.ids == there.holdout.ids).all()
    assert len(kept_aside(10, network.terms, "x")[1]) == 2


def refused(folder, key, terms=None, name="site-a", **changes):
    network = Direct(folder)
    prepare(config_of(folder, "flare"), network)
    given = read_table(folder / name / "site.toml").model_dump()
    for path, value in changes.items():
        table, _, leaf = path.partition("__")
        given[table] = {**given[table], leaf: value}
    site = Site(SiteTable.model_validate(given))
    with pytest.raises(InputError) as caught:
        site.join(name, network.terms.model_copy(update=terms or {}))
    assert caught.value.key == key
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_site_that_does_not_agree_says_so_in_one_line(folder):
    other = {"digest": "0" * 64}
    assert "base model model differs from the server's, 000000000000" in refused(folder, "model.name", other)
    assert "tokenizer of model differs" in refused(folder, "model.name", {"tokenizer": "f" * 64})
    assert "unknown label" in refused(folder, "data.label", {"labels": ("kind 0", "kind 1")})
    assert "expected 00ff" in refused(folder, "model.sha256", model__sha256="00ff")
    assert "no such column" in refused(folder, "data.text", data__text="words")


def test_what_a_site_tells_of_a_missing_file_holds_no_path(folder):
    line = refused(folder, "data.source", data__source=str(folder / "site-a" / "gone.csv"))
    assert "gone.csv" in line
    assert str(folder) not in line


def test_the_pinned_hash_is_the_one_of_the_weight_file(folder):
    weights = (folder / "model" / "model.safetensors").read_bytes()
    network = Direct(folder)
    prepare(config_of(folder, "flare"), network)
    table = read_table(folder / "site-a" / "site.toml")
    pinned = table.model.model_copy(update={"sha256": hashlib.sha256(weights).hexdigest()})
    site = Site(table.model_copy(update={"model": pinned}))
    assert site.join("site-a", network.terms).loads == 1


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"max_rank": 2}, "rank 3 is more than limits.max_rank, 2"),
        ({"max_steps": 1}, "local steps 2 is more than limits.max_steps, 1"),
        ({"max_memory_gb": 1e-6}, "is more than limits.max_memory_gb, 1e-06"),
    ],
)
def test_a_task_that_asks_for_more_than_the_limits_is_refused(folder, limits, reason):
    network = Direct(folder)
    experiment = prepare(config_of(folder, "flare"), network)
    fed, state = experiment.federation, experiment.start
    mask = fed.allocation.allocate(state, ["site-a"])["site-a"]
    request = encode_task(make_task(fed, state, mask, "site-a"))
    site = network.sites["site-a"]
    assert site.answer(request) == handle(request, site.env)
    site.table = site.table.model_copy(update={"limits": site.table.limits.model_copy(update=limits)})
    with pytest.raises(ClientError, match=reason):
        site.answer(request)
    with pytest.raises(WireError):
        site.answer(b"nonsense")


def test_how_a_tokenizer_was_called_last_does_not_change_its_digest(folder):
    from transformers import AutoTokenizer

    first, second = (AutoTokenizer.from_pretrained(folder / "model") for _ in range(2))
    first(["word1 word2"], truncation=True, max_length=1, padding=True)
    assert tokenizer_digest(first) == tokenizer_digest(second)
    second.add_tokens(["new"])
    assert tokenizer_digest(first) != tokenizer_digest(second)


def test_a_table_with_an_unknown_key_is_told_by_name(tmp_path):
    (tmp_path / "site.toml").write_text('[data]\nsource = "x.csv"\n[limits]\nmax_ranks = 3\n')
    with pytest.raises(InputError, match="limits.max_ranks = 3: unknown key; did you mean 'max_rank'"):
        read_table(tmp_path / "site.toml")


def test_a_config_for_sites_asks_for_what_the_server_needs(folder):
    with pytest.raises(InputError, match="partition.kind = 'iid': must be 'natural'"):
        config_of(folder, "flare", "plain", "partition={kind='iid'}")
    with pytest.raises(InputError, match="the server has none"):
        config_of(folder, "flare", "loss_based")
    with pytest.raises(InputError, match="engine.kit = None: must be given"):
        small_config(folder, "plain", "engine.kind=flare", "data.test=x.csv")
    with pytest.raises(InputError, match="engine.kind = 'flare': the run is started by"):
        prepare(config_of(folder, "flare"))
