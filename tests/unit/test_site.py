"""A site: what it reads, what it checks before it joins, what it refuses."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from pydantic import ValidationError

from polyrank import wire
from polyrank.adapter import restrict
from polyrank.assemble import prepare
from polyrank.client import handle
from polyrank.data.tokens import TextSizes
from polyrank.engine.base import Client
from polyrank.engine.flare import FlareEngine
from polyrank.errors import InputError
from polyrank.messages import EvaluateTask, Folds
from polyrank.round import drawn_as, federated_round, make_task
from polyrank.session import ClientError
from polyrank.site import (
    Joined,
    Limits,
    Site,
    SiteTable,
    check_readable,
    kept_aside,
    read_table,
    refuse_too_much,
    tokenizer_digest,
)
from polyrank.wire import WireError, decode_task, encode_task
from tests.builders import random_adapter
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

    def __init__(self, folder, table="site.toml"):
        self.sites = {name: Site(read_table(folder / name / table)) for name in SITES}

    def open(self, terms):
        self.terms = terms
        joined = {name: site.join(name, terms) for name, site in self.sites.items()}
        population = [Client(name, one.num_examples) for name, one in joined.items()]
        sites = {n: lambda *, timeout, s=s: s for n, s in self.sites.items()}
        engine = FlareEngine(population, sites, 9.0, OSError, lambda: False)
        sizes = {n: TextSizes(one.num_examples, one.num_tokens, one.num_taught) for n, one in joined.items()}
        return engine, sizes


@pytest.mark.parametrize("key", ["num_examples", "num_tokens", "num_taught", "num_holdout"])
@pytest.mark.parametrize("count", ["-5", "1e15", "1000000000000001", "9" * 400])
def test_a_site_has_no_number_of_texts_without_end(key, count):
    """Its own word: 1e12 texts would own every mean, and 10^400 are no float."""
    told = {"num_examples": 5, "num_tokens": 45, "num_taught": 5, "num_holdout": 0}
    text = json.dumps(told | {"device": "cpu", "threads": 1, "pid": 7, "loads": 1})
    assert Joined.model_validate_json(text).num_examples == 5
    with pytest.raises(ValidationError):
        Joined.model_validate_json(text.replace(f'"{key}": {told[key]}', f'"{key}": {count}'))


EDGE = ("fleet.name=edge3", "fleet.ignore_memory=true")


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("voting", ()),
        ("plain", MIXED),
        ("plain", ("method=legend", *EDGE)),
        ("causal", MIXED),
        ("causal", ("method=legend", *EDGE)),
    ],
    ids=["voting", "mixed", "legend", "causal-mixed", "causal-legend"],
)
def test_sites_with_their_own_files_give_the_bits_of_the_embedded_engine(folder, name, more):
    runs, table = [], "speaker.toml" if name == "causal" else "site.toml"
    for engine in ("embedded", "flare"):
        experiment = prepare(
            config_of(folder, engine, name, *more), Direct(folder, table) if engine == "flare" else None
        )
        state, records = experiment.start, []
        for _ in range(3):
            state, record = federated_round(experiment.federation, state)
            records.append([(r.client, r.bytes_down, r.bytes_up, r.error) for r in record.replies])
        runs.append((state, records))
    (here, told), (there, same) = runs
    assert told == same
    assert list(here.clients) == list(SITES)
    for module, factors in here.adapter.modules.items():
        assert factors.B.equal(there.adapter.modules[module].B)
        assert factors.A.equal(there.adapter.modules[module].A)
    assert all(value.equal(there.head[name]) for name, value in here.head.items())
    assert here.adapter.num_parameters() > 0
    assert here.clients == there.clients  # what devices are taken for, response tokens included


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


def test_sites_compute_blocks_again_where_the_run_says_so(folder):
    for said in ("false", "true"):
        network = Direct(folder)
        prepare(config_of(folder, "flare", "plain", f"model.gradient_checkpointing={said}"), network)
        assert {site.env.model.recomputes for site in network.sites.values()} == {said == "true"}


def test_as_few_test_texts_are_drawn_as_for_the_embedded_engine(folder):
    here = prepare(config_of(folder, "embedded", "plain", "data.max_test=7")).test
    there = prepare(config_of(folder, "flare", "plain", "data.max_test=7"), Direct(folder)).test
    assert len(here) == 7
    assert there.ids.tolist() == here.ids.tolist()


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


def test_what_a_site_tells_of_its_rows_holds_none_of_them(folder, caplog):
    rows = "text,label\nall is well,kind 0\nDear Dr. Smith, my result, is bad,kind 1\n"
    path = folder / "site-a" / "broken.csv"
    path.write_text(rows)
    line = refused(folder, "data.source", data__source=str(path))
    assert line == "data.source = 'broken.csv': cannot be used; the site's own log says why"
    assert "Dear Dr. Smith" in caplog.text
    line = refused(folder, "data.label", data__label="body")  # the texts, taken for labels
    assert line.startswith("data.label = '(a longer text)': unknown label")


def test_what_a_site_tells_of_its_model_holds_no_path(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    for name in ("~/empty", str(folder / "empty")):
        (folder / "empty").mkdir(exist_ok=True)
        line = refused(folder, "model.name", model__name=name)
        assert line == "model.name = 'empty': cannot be used; the site's own log says why"


def test_prompts_and_responses_are_found_or_named_before_the_server_is_asked(folder):
    path = folder / "site-a" / "speaker.toml"
    check_readable(read_table(path))
    named = folder / "site-a" / "named.toml"
    named.write_text(path.read_text() + 'prompt = "question"\nresponse = "reply"\n')
    with pytest.raises(InputError, match="data.response = 'reply': no such column"):
        check_readable(read_table(named))
    named.write_text(path.read_text() + 'prompt = "question"\n')
    with pytest.raises(InputError, match="data.prompt and data.response go together"):
        read_table(named)


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


def evaluation(state, mask, batch_size=4, **changes):
    adapter = restrict(state.adapter, mask)
    return EvaluateTask(0, "site-a", mask, adapter, state.head, batch_size, **changes)


def test_limits_hold_for_evaluation_too(folder):
    network = Direct(folder)
    experiment = prepare(config_of(folder, "flare"), network)
    state, site = experiment.start, network.sites["site-a"]
    mask = experiment.federation.allocation.allocate(state, ["site-a"])["site-a"]

    def needed(batch_size):
        """The least memory that the site must allow for it, in GB."""
        limits = Limits(max_memory_gb=1e-9)
        with pytest.raises(ClientError, match="memory in GB") as caught:
            refuse_too_much(evaluation(state, mask, batch_size), site.env, limits)
        return float(str(caught.value).split()[4])

    assert site.answer(encode_task(evaluation(state, mask)))
    assert needed(12) > needed(1)
    room = (needed(1) + needed(12)) / 2
    site.table = site.table.model_copy(update={"limits": Limits(max_memory_gb=room)})
    assert site.answer(encode_task(evaluation(state, mask, 1)))
    with pytest.raises(ClientError, match="max_memory_gb"):
        site.answer(encode_task(evaluation(state, mask, 12)))


def test_limits_hold_for_folds_too(folder):
    network = Direct(folder)
    experiment = prepare(config_of(folder, "flare"), network)
    state, env = experiment.start, network.sites["site-a"].env
    mask = experiment.federation.allocation.allocate(state, ["site-a"])["site-a"]
    shapes = {name: (f.B.shape[0], f.A.shape[1]) for name, f in state.adapter.modules.items()}
    folds = Folds(0, [random_adapter(0, 9, shapes=shapes)] * 40)
    task = evaluation(state, mask, folds=folds)
    with pytest.raises(ClientError, match="rank 9 is more than limits.max_rank, 8"):
        refuse_too_much(task, env, Limits(max_rank=8))
    room = Limits(max_memory_gb=4e-9 * 40 * folds.adapters[0].num_parameters())  # for the folds alone
    refuse_too_much(evaluation(state, mask), env, room)
    with pytest.raises(ClientError, match="max_memory_gb"):
        refuse_too_much(task, env, room)


@pytest.mark.parametrize("grown", ["sent", "drawn"])
def test_a_request_that_takes_too_much_memory_is_not_even_read(folder, monkeypatch, grown):
    network = Direct(folder)
    experiment = prepare(config_of(folder, "flare", "plain", "method=ffa"), network)
    fed, state, site = experiment.federation, experiment.start, network.sites["site-a"]
    mask = fed.allocation.allocate(state, ["site-a"])["site-a"]
    request = encode_task(make_task(fed, state, mask, "site-a", drawn_as(fed, state)))
    assert b"drawn" in request
    limits = Limits(max_memory_gb=0.01)
    if grown == "sent":
        limits = Limits(max_memory_gb=(len(request) - 1) / 1e9)
    else:  # the same task, whose A would be drawn with a million columns
        meaning, tensors = wire._decode(request)
        meaning["modules"] = [
            [name, out, 10**6, scale, slots] for name, out, _, scale, slots in meaning["modules"]
        ]
        request = wire._encode(meaning, tensors)
        drawn = sum(10**6 * slots for *_, slots in meaning["modules"])
        assert wire.task_bytes(request) == len(request) + 12 * drawn  # A, and the places of its columns
    site.table = site.table.model_copy(update={"limits": limits})
    monkeypatch.setattr("polyrank.site.decode_task", None)  # it would fail in another way
    with pytest.raises(ClientError, match="max_memory_gb"):
        site.answer(request)


def test_outputs_without_end_take_no_memory_before_they_are_refused(folder, monkeypatch):
    """B does not come from a seed, so that it need not be made to be thrown away."""
    network = Direct(folder)
    experiment = prepare(config_of(folder, "flare", "plain", "method=ffa"), network)
    fed, state = experiment.federation, experiment.start
    mask = fed.allocation.allocate(state, ["site-a"])["site-a"]
    request = encode_task(make_task(fed, state, mask, "site-a", drawn_as(fed, state)))
    meaning, tensors = wire._decode(request)
    meaning["modules"] = [[name, 10**7, *rest] for name, _, *rest in meaning["modules"]]
    made, zeros = [], torch.zeros

    def watched(*shape, **settings):
        made.append(shape)
        return zeros(*shape, **settings)

    monkeypatch.setattr(torch, "zeros", watched)
    with pytest.raises(WireError):
        decode_task(wire._encode(meaning, tensors))
    assert made
    assert all(10**7 not in shape for shape in made)


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
