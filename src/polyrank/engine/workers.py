"""All clients on this machine, in several processes that share one resident base model by fork.

Every worker is a copy of this process with one thread; what nobody writes (weights, token ids) exists
once in memory. A session depends on its request and its client alone, so any number of workers gives the
same bits. Requests and answers travel as raw bytes over pipes. A client that remembers something between
sessions (folds) stays with the worker that holds its memory; all others go to whoever is free.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import struct
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from polyrank.engine.base import Answer, Client
from polyrank.engine.embedded import EmbeddedEngine, Request, groups
from polyrank.errors import RunError, first_line
from polyrank.messages import ClientId
from polyrank.session import ClientEnv

_HEAD = struct.Struct("<cbd")  # how it went, whether the client remembers something, seconds
_DONE, _FAILED, _CRASHED = b"d", b"f", b"c"


@dataclass(eq=False)
class Worker:
    """One process, the clients it works for at the moment, and requests that only it can answer."""

    process: BaseProcess
    pipe: Connection
    clients: list[ClientId] = field(default_factory=list)
    queue: deque[list[Request]] = field(default_factory=deque)


@dataclass
class WorkerEngine:
    """Simulated devices in several processes; a worker that dies is replaced.

    Args:
        fuse: how many clients at most go through the base model in one pass.
    """

    environments: Mapping[ClientId, ClientEnv]
    count: int
    fuse: int = 1
    pause_s: float = 0.0
    workers: list[Worker] = field(default_factory=list)
    home: dict[ClientId, Worker] = field(default_factory=dict)

    def clients(self) -> Sequence[Client]:
        """The population, in a fixed order."""
        return EmbeddedEngine(self.environments).clients()

    def exchange(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """One answer per request, as they come.

        Raises: RunError when a client's code failed in a way that is not the client's.
        """
        while len(self.workers) < self.count:
            self.workers.append(self._start())
        waiting = groups(requests, self.fuse)
        for worker in self.workers:
            self._give(worker, waiting)
        while busy := [worker for worker in self.workers if worker.clients]:
            for pipe in wait([worker.pipe for worker in busy]):
                worker = next(worker for worker in busy if worker.pipe is pipe)
                yield from self._take(worker)
            for worker in self.workers:
                if not worker.clients:
                    self._give(worker, waiting)

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

    def _give(self, worker: Worker, waiting: Iterator[list[Request]]) -> None:
        """Send the worker its next requests: first those that only it can answer."""
        together = worker.queue.popleft() if worker.queue else self._next(worker, waiting)
        worker.clients = [client for client, _ in together]
        if together:
            parts = [part for client, request in together for part in (client.encode(), request)]
            with contextlib.suppress(OSError):  # a dead worker is found out when its answer is taken
                worker.pipe.send_bytes(_pack(parts))

    def _next(self, worker: Worker, waiting: Iterator[list[Request]]) -> list[Request]:
        """The next requests for this worker; what belongs to another one is put into its queue."""
        for together in waiting:
            home = next((self.home[client] for client, _ in together if client in self.home), worker)
            if home is worker:
                return together
            home.queue.append(together)
        return []

    def _take(self, worker: Worker) -> Iterator[Answer]:
        clients, worker.clients = worker.clients, []
        try:
            frames = _unpack(worker.pipe.recv_bytes())
        except (EOFError, OSError):
            self._replace(worker)
            yield from (Answer(client, None, 0.0, "the worker process died") for client in clients)
            return
        for client, frame in zip(clients, frames, strict=False):
            outcome, remembers, wall_s = _HEAD.unpack_from(frame)
            body = frame[_HEAD.size :]
            if outcome == _CRASHED:
                raise RunError(f"{client}: {body.decode()}")
            if remembers:
                self.home[client] = worker
            if outcome == _FAILED:
                yield Answer(client, None, wall_s, body.decode())
            else:
                yield Answer(client, body, wall_s)

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
    known = {client: len(env.folds) for client, env in environments.items()}
    try:
        while True:
            parts = _unpack(pipe.recv_bytes())
            names = [name.decode() for name in parts[::2]]
            requests = list(zip(names, parts[1::2], strict=True))
            pipe.send_bytes(_pack(_answers(EmbeddedEngine(environments, len(requests)), requests, known)))
    except (EOFError, OSError, KeyboardInterrupt):
        os._exit(0)


def _answers(
    engine: EmbeddedEngine, requests: Sequence[Request], known: Mapping[ClientId, int]
) -> list[bytes]:
    """Framed answers.

    Args:
        known: folds that each client had when the process began: with more it is at home here.
    """
    try:
        answers = list(engine.exchange(requests))
    except Exception as error:  # told to the server, which stops the run; the place goes to stderr
        traceback.print_exc()
        reason = f"{type(error).__name__}: {first_line(error)}"
        return [_HEAD.pack(_CRASHED, 0, 0.0) + reason.encode()]
    folds = {client: len(engine.environments[client].folds) for client, _ in requests}
    return [_frame(answer, folds[answer.client] > known[answer.client]) for answer in answers]


def _frame(answer: Answer, remembers: bool) -> bytes:
    if answer.payload is None:
        return _HEAD.pack(_FAILED, remembers, answer.wall_s) + (answer.error or "").encode()
    return _HEAD.pack(_DONE, remembers, answer.wall_s) + answer.payload


def _pack(parts: Sequence[bytes]) -> bytes:
    """Some pieces of bytes as one: their number, their sizes, and then they."""
    return struct.pack(f"<{1 + len(parts)}Q", len(parts), *map(len, parts)) + b"".join(parts)


def _unpack(data: bytes) -> list[bytes]:
    (count,) = struct.unpack_from("<Q", data)
    sizes = struct.unpack_from(f"<{count}Q", data, 8)
    ends = list(itertools.accumulate(sizes, initial=8 * (1 + count)))
    return [data[start:end] for start, end in itertools.pairwise(ends)]
