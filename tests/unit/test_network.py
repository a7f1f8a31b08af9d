"""Joining over a network, and what kits and jobs hold; the sites are plain objects."""

from __future__ import annotations

import json
import stat

import pytest

pytest.importorskip("nvflare")

from polyrank import remote
from polyrank.errors import InputError
from polyrank.ledger import RunFolder
from polyrank.network import SITES, Sites, write_job
from polyrank.provision import provision, restrict
from polyrank.site import Joined, Terms

TERMS = Terms(model="m", digest="d", tokenizer="t", labels=("a", "b"), seed=0, max_length=8)


def joined(count):
    told = {"num_examples": count, "num_tokens": 9 * count, "num_holdout": 0, "device": "cpu"}
    return Joined(**told, threads=1, pid=7, loads=1).model_dump_json()


class Proxy:
    def __init__(self, reply):
        self.reply = reply

    def __call__(self, *, timeout):
        return self

    def join(self, terms):
        assert Terms.model_validate_json(terms) == TERMS
        if isinstance(self.reply, Exception):
            raise self.reply
        return self.reply


def opened(folder, **replies):
    proxies = {name.replace("_", "-"): Proxy(reply) for name, reply in replies.items()}
    engine, texts = Sites(proxies, RunFolder(folder), 5.0).open(TERMS)
    return [(client.id, client.num_examples) for client in engine.clients()], sorted(engine.sites), texts


def test_a_run_begins_with_all_its_sites_or_with_one_clear_line(tmp_path):
    line = "data.label = 'x': unknown label; one of: a, b"
    with pytest.raises(InputError, match="site = 'site-b': does not take part: data.label = 'x': unknown"):
        opened(tmp_path, site_a=joined(5), site_b=line)
    assert not (tmp_path / SITES).exists()
    population, there, texts = opened(tmp_path, site_b=joined(3), site_a=joined(5))
    assert population == [("site-a", 5), ("site-b", 3)]  # by name, as a natural partition has them
    assert there == ["site-a", "site-b"]
    assert texts == {"site-a": (5, 45), "site-b": (3, 27)}


def test_a_run_goes_on_with_the_sites_that_are_there_and_keeps_its_population(tmp_path):
    opened(tmp_path, site_a=joined(5), site_b=joined(3), site_c=joined(4))
    population, there, texts = opened(tmp_path, site_c=joined(4), site_b=TimeoutError("no answer"))
    assert [name for name, _ in population] == ["site-a", "site-b", "site-c"]
    assert there == ["site-c"]
    assert len(texts) == 3
    told = json.loads((tmp_path / SITES).read_text())
    assert [row["connected"] for row in told.values()] == [False, False, True]


def test_a_site_with_other_texts_than_the_run_began_with_is_left_out(tmp_path):
    opened(tmp_path, site_a=joined(5), site_b=joined(3))
    population, there, _ = opened(tmp_path, site_a=joined(6), site_b=joined(3))
    assert population == [("site-a", 5), ("site-b", 3)]
    assert there == ["site-b"]


def test_a_job_carries_no_code(tmp_path):
    write_job(tmp_path / "run", ["site-a"], tmp_path / "job")
    files = {
        str(path.relative_to(tmp_path / "job")) for path in (tmp_path / "job").rglob("*") if path.is_file()
    }
    assert files == {"meta.json", "app/config/config_fed_server.json", "app/config/config_fed_client.json"}


def test_kits_hold_one_key_each_and_allow_two_classes_of_ours(tmp_path):
    kits = provision("demo", "localhost", ["site-a", "site-b"], tmp_path / "kits", 8100)
    assert [kit.name for kit in kits] == ["server", "admin", "site-a", "site-b"]
    assert all(len(list(kit.rglob("*.key"))) == 1 for kit in kits)
    assert remote.kit_sites(tmp_path / "kits" / "admin") == ["site-a", "site-b"]
    assert stat.S_IMODE((tmp_path / "kits" / "private").stat().st_mode) == 0o700
    restrict(kits[2])
    allowed = json.loads((kits[2] / "local" / "resources.json").read_text())
    assert [name for name in allowed["class_allow_list"] if not name.startswith("nvflare.collab.")] == [
        "polyrank.network.ServerEnd",
        "polyrank.network.SiteEnd",
    ]
    assert not allowed["allow_log_streaming"]
    rights = json.loads((kits[2] / "local" / "authorization.json").read_text())["permissions"]
    assert rights["project_admin"]["byoc"] == "none"
    assert rights["project_admin"]["get_job_log"] == "any"
    with pytest.raises(InputError, match="exists already"):
        provision("demo", "localhost", ["site-a"], tmp_path / "kits")


@pytest.mark.parametrize("sites", [[], ["a", "a"], ["server"], ["A b"], ["localhost"]])
def test_names_that_cannot_be_used(tmp_path, sites):
    with pytest.raises(InputError, match="--site"):
        provision("demo", "localhost", sites, tmp_path / "kits")
