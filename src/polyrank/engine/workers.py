"""All clients on this machine, in several processes that share one resident base model by fork.

Every worker is a copy of this process with one thread; what nobody writes (weights, token ids) exists
once in memory. A session depends on its request and its client alone, so any number of workers gives the
same bits. Requests and answers travel as raw bytes over pipes. A client that remembers something between
sessions (folds) stays with the worker that holds its memory; all others go to whoever is free.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import struct
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from polyrank.client import ClientEnv
from polyrank.engine.base import Answer, Client
from polyrank.engine.embedded import EmbeddedEngine
from polyrank.errors import RunError, first_line
from polyrank.messages import ClientId

_HEAD = struct.Struct("<cbd")  # how it went, whether the client remembers something, seconds
_DONE, _FAILED, _CRASHED = b"d", b"f", b"c"


@dataclass(eq=False)
class Worker:
    """One process, and the client it works for at the moment."""

    process: BaseProcess
    pipe: Connection
    client: ClientId | None = None
    queue: deque[ClientId] = field(default_factory=deque)


@dataclass
class WorkerEngine:
    """Simulated devices in several processes; a worker that dies is replaced."""

    environments: Mapping[ClientId, ClientEnv]
    count: int
    workers: list[Worker] = field(default_factory=list)
    home: dict[ClientId, Worker] = field(default_factory=dict)

    def clients(self) -> Sequence[Client]:
        """The population, in a fixed order."""
        return EmbeddedEngine(self.environments).clients()

    def exchange(self, requests: Mapping[ClientId, bytes]) -> Iterator[Answer]:
        """One answer per request, as they come.

        Raises: RunError when a client's code failed in a way that is not the client's.
        """
        while len(self.workers) < self.count:
            self.workers.append(self._start())
        free: deque[ClientId] = deque()
        for client in requests:
            worker = self.home.get(client)
            (free if worker is None else worker.queue).append(client)
        for worker in self.workers:
            self._give(worker, requests, free)
        while busy := [worker for worker in self.workers if worker.client is not None]:
            for pipe in wait([worker.pipe for worker in busy]):
                worker = next(worker for worker in busy if worker.pipe is pipe)
                yield self._take(worker)
            for worker in self.workers:
                if worker.client is None:
                    self._give(worker, requests, free)

    def close(self) -> None:
        """Let the workers go."""
        for worker in self.workers:
            worker.pipe.close()
            worker.process.join(timeout=5)
        self.workers.clear()
        self.home.clear()

    def _start(self) -> Worker:
        ours, theirs = multiprocessing.Pipe()
        others = [worker.pipe for worker in self.workers] + [ours]
        arguments = (theirs, others, self.environments)
        process = multiprocessing.get_context("fork").Process(target=_serve, args=arguments, daemon=True)
        process.start()
        theirs.close()
        return Worker(process, ours)

    def _give(self, worker: Worker, requests: Mapping[ClientId, bytes], free: deque[ClientId]) -> None:
        """Send the worker its next request: first those that only it can answer."""
        waiting = worker.queue or free
        if not waiting:
            return
        worker.client = waiting.popleft()
        name = worker.client.encode()
        with contextlib.suppress(OSError):  # a dead worker is found out when its answer is taken
            worker.pipe.send_bytes(struct.pack("<I", len(name)) + name + requests[worker.client])

    def _take(self, worker: Worker) -> Answer:
        client, worker.client = worker.client, None
        assert client is not None
        try:
            frame = worker.pipe.recv_bytes()
        except (EOFError, OSError):
            self._replace(worker)
            return Answer(client, None, 0.0, "the worker process died")
        outcome, remembers, wall_s = _HEAD.unpack_from(frame)
        body = frame[_HEAD.size :]
        if outcome == _CRASHED:
            raise RunError(f"{client}: {body.decode()}")
        if remembers:
            self.home[client] = worker
        if outcome == _FAILED:
            return Answer(client, None, wall_s, body.decode())
        return Answer(client, body, wall_s)

    def _replace(self, dead: Worker) -> None:
        """Put a new worker in the place of a dead one; what its clients remembered is lost."""
        dead.pipe.close()
        self.home = {client: worker for client, worker in self.home.items() if worker is not dead}
        self.workers.remove(dead)
        fresh = self._start()
        fresh.queue = dead.queue
        self.workers.append(fresh)


def _serve(
    pipe: Connection, others: Sequence[Connection], environments: Mapping[ClientId, ClientEnv]
) -> None:
    """A worker's whole life: answer requests until the pipe closes."""
    for other in others:
        other.close()
    engine = EmbeddedEngine(environments)
    try:
        while True:
            frame = pipe.recv_bytes()
            (size,) = struct.unpack_from("<I", frame)
            client = frame[4 : 4 + size].decode()
            pipe.send_bytes(_answer(engine, client, frame[4 + size :]))
    except (EOFError, OSError, KeyboardInterrupt):
        os._exit(0)


def _answer(engine: EmbeddedEngine, client: ClientId, request: bytes) -> bytes:
    try:
        (answer,) = engine.exchange({client: request})
    except Exception as error:  # told to the server, which stops the run; the place goes to stderr
        traceback.print_exc()
        reason = f"{type(error).__name__}: {first_line(error)}"
        return _HEAD.pack(_CRASHED, 0, 0.0) + reason.encode()
    remembers = bool(engine.environments[client].folds)
    if answer.payload is None:
        return _HEAD.pack(_FAILED, remembers, answer.wall_s) + (answer.error or "").encode()
    return _HEAD.pack(_DONE, remembers, answer.wall_s) + answer.payload
