"""Joining over a network, and what kits and jobs hold; the sites are plain objects."""

from __future__ import annotations

import json
import os
import stat
import threading
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("nvflare")

from nvflare.collab.api.decorators import get_object_final_funcs
from nvflare.collab.api.exceptions import RunAborted
from nvflare.fuel.f3.comm_config import VarName
from nvflare.fuel.f3.streaming.byte_receiver import RxTask
from nvflare.security.logging import SECURE_LOGGING_VAR_NAME

from polyrank import cli_network, remote
from polyrank.errors import InputError
from polyrank.kit import restrict, settings_for
from polyrank.ledger import RunFolder
from polyrank.models.prefix import PrefixCache
from polyrank.network import SITE_VARIABLE, SITES, SiteEnd, Sites, write_job
from polyrank.provision import provision
from polyrank.site import Joined, Site, Terms
from polyrank.streams import share_clock

TERMS = Terms(model="m", digest="d", tokenizer="t", labels=("a", "b"), seed=0, max_length=8)


def joined(count):
    sizes = {"num_examples": count, "num_tokens": 9 * count, "num_taught": count, "num_holdout": 0}
    return Joined(**sizes, device="cpu", threads=1, pid=7, loads=1).model_dump_json()


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
    assert texts == {"site-a": (5, 45, 5), "site-b": (3, 27, 3)}


def test_a_job_that_ends_while_sites_are_asked_does_not_go_on_with_fewer(tmp_path):
    opened(tmp_path, site_a=joined(5), site_b=joined(3))
    proxies = {"site-a": Proxy(joined(5)), "site-b": Proxy(TimeoutError("timed out"))}
    with pytest.raises(RunAborted):
        Sites(proxies, RunFolder(tmp_path), 5.0, lambda: True).open(TERMS)
    assert json.loads((tmp_path / SITES).read_text())["site-b"]["connected"]


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


def test_a_site_with_as_many_but_longer_texts_is_left_out_and_its_device_is_plain_text(tmp_path):
    odd = joined(5).replace('"cpu"', '"\\u001b[2Jcpu"')
    opened(tmp_path, site_a=odd, site_b=joined(3))
    assert json.loads((tmp_path / SITES).read_text())["site-a"]["device"] == " [2Jcpu"
    _, there, _ = opened(
        tmp_path, site_a=joined(5).replace('"num_tokens":45', '"num_tokens":46'), site_b=joined(3)
    )
    assert there == ["site-b"]


def test_at_the_end_the_sites_say_again_which_process_answered(tmp_path):
    network = Sites({name: Proxy(joined(5)) for name in ("site-a", "site-b")}, RunFolder(tmp_path), 5.0)
    network.open(TERMS)
    network.proxies["site-a"].reply = (
        joined(5).replace('"pid":7', '"pid":8').replace('"loads":1', '"loads":2')
    )
    network.proxies["site-b"].reply = TimeoutError("no answer")
    network.ask_again()
    told = json.loads((tmp_path / SITES).read_text())
    assert [(row["pid"], row["loads"], row["connected"]) for row in told.values()] == [
        (8, 2, True),
        (7, 1, False),
    ]


def site_end(tmp_path, monkeypatch, table):
    (tmp_path / "secret.toml").write_text(table)
    monkeypatch.setenv(SITE_VARIABLE, str(tmp_path / "secret.toml"))
    return SiteEnd()


@pytest.mark.parametrize("table", ["[data\n", "[data]\nsource = 'x.csv'\nfolder = '/secret'\n", "[data]\n"])
def test_a_table_that_was_spoilt_after_joining_is_one_line_and_no_end_of_the_job(
    tmp_path, monkeypatch, table
):
    line = site_end(tmp_path, monkeypatch, table)._join("site-a", TERMS.model_dump_json())
    assert line.startswith("--data = ")
    assert line.endswith("the table cannot be used as it is now; the site's own log says why")
    assert "secret" not in line


def test_no_path_reaches_the_server_with_an_error_that_nobody_foresaw(tmp_path, monkeypatch, caplog):
    end = site_end(tmp_path, monkeypatch, "[data]\nsource = 'x.csv'\n")
    failure = OSError(28, "No space left on device", "/secret/p")
    monkeypatch.setattr(Site, "join", lambda *_: (_ for _ in ()).throw(failure))
    assert end._join("site-a", TERMS.model_dump_json()) == "OSError"
    monkeypatch.setattr(Site, "answer", lambda *_: (_ for _ in ()).throw(failure))
    assert end.answer(b"") == "OSError"
    assert "/secret/p" in caplog.text  # the site's own log says more
    assert SiteEnd().answer(b"") == "the site has not joined this run"


def test_a_site_leaves_nothing_on_disk_at_the_end_of_a_job(tmp_path, monkeypatch):
    end = site_end(tmp_path, monkeypatch, "[data]\nsource = 'x.csv'\n")
    (tmp_path / "prefix").mkdir()
    monkeypatch.setattr(Site, "join", lambda *_: Joined.model_validate_json(joined(5)))
    end._join("site-a", TERMS.model_dump_json())
    end.site.env = SimpleNamespace(prefix=PrefixCache(tmp_path / "prefix", 10, "fp32"))
    assert len(get_object_final_funcs(end)) == 1  # FLARE calls it
    end.leave()
    assert not (tmp_path / "prefix").exists()


def test_messages_are_forgotten_in_time_without_a_thread_for_each():
    share_clock()
    before = threading.active_count()
    tasks = [RxTask(number, "origin", None, reliable=True) for number in range(50)]
    for task in tasks:
        RxTask.rx_task_map["origin", task.sid] = task
        task._schedule_remove_task(3)
    assert threading.active_count() <= before
    assert len(RxTask.rx_task_map) >= 50
    tasks[0]._remove_task()  # earlier than planned
    until = time.monotonic() + 20
    while any(("origin", task.sid) in RxTask.rx_task_map for task in tasks):
        assert time.monotonic() < until
        time.sleep(0.05)


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


def test_flare_knows_the_settings_that_are_made_for_it(tmp_path, monkeypatch):
    provision("demo", "localhost", ["site-a"], tmp_path / "kits")
    (tmp_path / "own.csv").write_text("text,label\nx,y\n")
    (tmp_path / "site.toml").write_text('[data]\nsource = "own.csv"\n[limits]\nmax_memory_gb = 2\n')
    names = {f"NVFLARE_{value}".upper() for name, value in vars(VarName).items() if not name.startswith("_")}
    for name in settings_for("client", 0):
        assert name in {*names, SECURE_LOGGING_VAR_NAME}
        monkeypatch.setenv(name, "")  # so that it is as it was, afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv(SITE_VARIABLE, "")
    monkeypatch.setattr("polyrank.kit._knock", lambda *_: None)
    begun = []
    monkeypatch.setattr(os, "execv", lambda *_: begun.append(dict(os.environ)))
    cli_network.join(tmp_path / "kits" / "site-a", tmp_path / "site.toml")
    (given,) = begun
    assert given["NVFLARE_SECURE_LOGGING"] == given["NVFLARE_STREAMING_RELIABLE"] == "true"
    assert given["NVFLARE_STREAMING_MAX_BLOB_SIZE"] == "2000000000"
    assert float(given["NVFLARE_STREAMING_RETRY_TIMEOUT"]) >= 300
    assert "NVFLARE_SECURE_LOGGING" not in settings_for("server", 0)  # it says whom it refused, and why


@pytest.mark.parametrize("sites", [[], ["a", "a"], ["server"], ["A b"], ["localhost"], ["private"], ["a.b"]])
def test_names_that_cannot_be_used(tmp_path, sites):
    with pytest.raises(InputError, match="--site"):
        provision("demo", "localhost", sites, tmp_path / "kits")
    assert not (tmp_path / "kits").exists()


def test_a_server_or_a_folder_that_cannot_be(tmp_path):
    with pytest.raises(InputError, match="--server = 'a..b'"):
        provision("demo", "a..b", ["site-a"], tmp_path / "kits")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--out = .*file/kits': cannot be made .Not a directory."):
        provision("demo", "localhost", ["site-a"], tmp_path / "file" / "kits")


def test_a_kit_whose_certificate_is_none_is_no_kit_to_run_with(tmp_path):
    provision("demo", "localhost", ["site-a"], tmp_path / "kits")
    admin = tmp_path / "kits" / "admin"
    assert remote.kit_sites(admin) == ["site-a"]
    (admin / "startup" / "client.crt").write_text("no certificate")
    with pytest.raises(InputError, match="engine.kit = .*startup/client.crt is no certificate"):
        remote.kit_sites(admin)
