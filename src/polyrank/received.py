"""The updates of one round: kept as bytes on disk and decoded one at a time, whenever a rule reads one.

So a cohort of a thousand takes no more memory than a cohort of ten. In a run the file is the round's journal:
it outlives a killed server, and the round that is resumed asks only for what it lacks. It is not synced: what
a power cut takes of it is asked for again.

    record   digest of the rest, 16 bytes | sizes of note and payload, 4 + 8 bytes | note, JSON | payload
"""

from __future__ import annotations

import hashlib
import json
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO, overload

from polyrank.durable import disk_errors
from polyrank.gate import decode_update
from polyrank.messages import ClientId, ClientUpdate, TrainTask

_SIZES = struct.Struct("<IQ")
_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Note:
    """What the journal says about a payload: who sent it, at which attempt, at what cost."""

    client: ClientId
    attempt: int
    bytes_down: int
    wall_s: float


class Received:
    """What clients sent this round.

    Args:
        task: what a client is asked, made anew whenever its answer is read.
        journal: a file that is gone on with; without one, an unnamed file that goes with the object.
    """

    def __init__(self, task: Callable[[ClientId], TrainTask], journal: Path | None = None) -> None:
        self._task = task
        self.attempts: dict[ClientId, int] = {}
        self.path = journal or Path(tempfile.gettempdir())
        self._spans: dict[ClientId, tuple[int, int]] = {}
        self._found: dict[tuple[ClientId, int], tuple[Note, int, int]] = {}
        with disk_errors(self.path):
            self._file: BinaryIO = tempfile.TemporaryFile() if journal is None else _opened(journal)  # noqa: SIM115
            end = 0
            for note, start, size in _records(self._file):
                self._found[note.client, note.attempt] = (note, start, size)
                end = start + size
            self._file.truncate(end)

    def ask(self, clients: Sequence[ClientId]) -> None:
        """Note that these are asked now, for the first time or again."""
        for client in clients:
            self.attempts[client] = self.attempts.get(client, -1) + 1

    def task(self, client: ClientId) -> TrainTask:
        """What a client was asked last."""
        return replace(self._task(client), attempt=self.attempts.get(client, 0))

    def keep(self, note: Note, payload: bytes) -> None:
        """Keep a payload that was checked.

        Raises: RunError when the disk does not take it.
        """
        told = json.dumps(asdict(note)).encode()
        body = _SIZES.pack(len(told), len(payload)) + told
        digest = hashlib.blake2b(body + payload, digest_size=_DIGEST_BYTES).digest()
        with disk_errors(self.path):
            end = self._file.seek(0, 2)
            self._file.write(digest + body + payload)
            self._file.flush()
        self._spans[note.client] = end + len(digest) + len(body), len(payload)

    def journalled(self, client: ClientId, attempt: int) -> tuple[Note, bytes] | None:
        """What the journal holds of an earlier try at this round."""
        if (client, attempt) not in self._found:
            return None
        note, start, size = self._found[client, attempt]
        self._file.seek(start)
        return note, self._file.read(size)

    def take(self, note: Note) -> None:
        """Count a payload of the journal as received."""
        _, *span = self._found[note.client, note.attempt]
        self._spans[note.client] = span[0], span[1]

    def read(self, client: ClientId) -> ClientUpdate:
        """Decode one client's update."""
        start, size = self._spans[client]
        self._file.seek(start)
        return decode_update(self._file.read(size), self.task(client))

    def close(self) -> None:
        """Close the file; one without a name is gone then.

        Raises: RunError when the disk does not take what it still refuses.
        """
        with disk_errors(self.path):
            self._file.close()


class Updates(Sequence[ClientUpdate]):
    """The updates of some clients in a fixed order. Every access decodes: go through it once."""

    def __init__(self, received: Received, clients: Sequence[ClientId]) -> None:
        self.received = received
        self.clients = clients

    def __len__(self) -> int:
        return len(self.clients)

    @overload
    def __getitem__(self, index: int) -> ClientUpdate: ...
    @overload
    def __getitem__(self, index: slice) -> Updates: ...
    def __getitem__(self, index: int | slice) -> ClientUpdate | Updates:
        if isinstance(index, slice):
            return Updates(self.received, self.clients[index])
        return self.received.read(self.clients[index])

    def __iter__(self) -> Iterator[ClientUpdate]:
        return map(self.received.read, self.clients)


def _opened(path: Path) -> BinaryIO:
    path.parent.mkdir(exist_ok=True)
    path.touch()
    return path.open("r+b")


def _records(file: BinaryIO) -> Iterator[tuple[Note, int, int]]:
    """Note, start and size of each payload, up to the first record that is not whole."""
    lead = _DIGEST_BYTES + _SIZES.size
    left = file.seek(0, 2)
    file.seek(0)
    while left >= lead:
        head = file.read(lead)
        told, size = _SIZES.unpack(head[_DIGEST_BYTES:])
        left -= lead + told + size
        if left < 0:
            return
        note = file.read(told)
        start, payload = file.tell(), file.read(size)
        body = head[_DIGEST_BYTES:] + note + payload
        if hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest() != head[:_DIGEST_BYTES]:
            return
        yield Note(**json.loads(note)), start, size
