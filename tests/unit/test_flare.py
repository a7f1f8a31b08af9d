"""The engine for real sites, with sites that are plain objects."""

from __future__ import annotations

import dataclasses
import threading
import time

import pytest

from polyrank.engine.base import Client
from polyrank.engine.flare import AT_ONCE, FlareEngine


class AbortedError(Exception):
    pass


class FakeSite:
    """Stands for a Collab proxy: ``site(timeout=...)`` gives what can be called."""

    def __init__(self, reply):
        self.reply, self.timeouts, self.requests = reply, [], []

    def __call__(self, *, timeout):
        self.timeouts.append(timeout)
        return self

    def answer(self, request):
        self.requests.append(request)
        if isinstance(self.reply, Exception):
            raise self.reply
        return self.reply(request) if callable(self.reply) else self.reply


def engine(deadline_s=7.0, **replies):
    sites = {name: FakeSite(reply) for name, reply in replies.items() if reply is not None}
    population = [Client(name, 5) for name in replies]
    return FlareEngine(population, sites, deadline_s, AbortedError, lambda: False), sites


def answers(engine, requests):
    return {answer.client: answer for answer in engine.exchange(requests)}


def test_bytes_go_to_the_site_they_are_for_and_come_back_as_they_are():
    flare, sites = engine(a=lambda request: b"a:" + request, b=lambda request: b"b:" + request)
    found = answers(flare, [("a", b"one"), ("b", b"two")])
    assert {name: answer.payload for name, answer in found.items()} == {"a": b"a:one", "b": b"b:two"}
    assert [site.timeouts for site in sites.values()] == [[7.0], [7.0]]
    assert all(answer.error is None and answer.wall_s >= 0 for answer in found.values())


def test_whatever_a_site_does_the_others_go_on():
    flare, _ = engine(
        good=b"fine",
        absent=None,
        slow=TimeoutError("timed out after 7 seconds"),
        refuses="ClientError: rank 9 is more than limits.max_rank, 4",
        strange={"payload": 1},
    )
    found = answers(flare, [(name, b"") for name in ("good", "absent", "slow", "refuses", "strange")])
    assert found["good"].payload == b"fine"
    assert all(answer.payload is None for name, answer in found.items() if name != "good")
    assert found["absent"].error == "the site is not connected"
    assert found["slow"].error.startswith("timed out after 7 seconds (after 0 s)")
    assert found["refuses"].error == "ClientError: rank 9 is more than limits.max_rank, 4"
    assert found["strange"].error == "the site answered with dict"


def test_the_end_of_the_job_is_not_taken_for_a_failure_of_the_site():
    """A call that ends because the job does is no answer that a round could do without."""
    cut, _ = engine(a=TimeoutError("timed out after 300 seconds"), b=b"fine")
    with pytest.raises(AbortedError, match="the job ends"):
        answers(dataclasses.replace(cut, ending=lambda: True), [("a", b""), ("b", b"")])
    flare, _ = engine(a=AbortedError())
    with pytest.raises(AbortedError):
        list(flare.exchange([("a", b"")]))


def test_a_site_that_never_finishes_is_given_up_at_the_deadline_and_its_answer_is_lost():
    """FLARE's own timeout begins anew with every byte that comes."""
    let_go = threading.Event()
    flare, _ = engine(0.5, drips=lambda _: let_go.wait(20) and b"late", good=b"fine")
    start = time.monotonic()
    found = answers(flare, [("drips", b""), ("good", b"")])
    assert 0.5 <= time.monotonic() - start < 5
    assert found["good"].payload == b"fine"
    assert (found["drips"].payload, found["drips"].error) == (None, "no answer within 0.5 s")
    let_go.set()
    assert [answer.payload for answer in flare.exchange([("good", b"")])] == [b"fine"]


def test_what_comes_after_its_deadline_is_not_taken_for_another_answer():
    """The first of two is given up; its answer comes while the second is awaited."""
    given_up, came = threading.Event(), threading.Event()

    def late(request):
        if request == b"one":
            assert given_up.wait(20)
            return request
        assert came.wait(20)
        return request

    flare, _ = engine(1.0, a=late)

    def requests():
        yield "a", b"one"
        time.sleep(0.5)  # so that the second is due later
        yield "a", b"two"

    found = flare.exchange(requests())
    assert next(found).payload is None
    given_up.set()
    threading.Timer(0.1, came.set).start()
    assert [answer.payload for answer in found] == [b"two"]


def test_sites_work_side_by_side():
    together = threading.Barrier(3, timeout=20)

    def meet(_):
        together.wait()
        return b"met"

    flare, _ = engine(a=meet, b=meet, c=meet)
    assert {answer.payload for answer in flare.exchange([(name, b"") for name in "abc"])} == {b"met"}


def test_requests_of_a_large_cohort_never_exist_at_once():
    gate, made = threading.Event(), []

    def requests():
        for number in range(3 * AT_ONCE):
            made.append(number)
            yield "a", b""

    flare, _ = engine(a=lambda _: b"x" if gate.wait(30) else b"")
    count = []
    reader = threading.Thread(target=lambda: count.append(len(list(flare.exchange(requests())))))
    reader.start()
    until = time.monotonic() + 20
    while len(made) < AT_ONCE and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(made) == AT_ONCE
    gate.set()
    reader.join(20)
    assert count == [3 * AT_ONCE]
