"""The updates of one round: kept as bytes on disk and decoded one at a time, whenever a rule reads one.

So a cohort of a thousand takes no more memory than a cohort of ten.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import overload

from polyrank.messages import ClientId, ClientUpdate, TrainTask
from polyrank.wire import decode_update


class Received:
    """What clients sent this round; an unnamed temporary file that goes with the object.

    Args:
        task: what a client was asked, made anew whenever its answer is read.
    """

    def __init__(self, task: Callable[[ClientId], TrainTask]) -> None:
        self.task = task
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._spans: dict[ClientId, tuple[int, int]] = {}

    def keep(self, client: ClientId, payload: bytes) -> None:
        """Keep a payload that was checked."""
        start = self._file.seek(0, 2)
        self._file.write(payload)
        self._spans[client] = start, len(payload)

    def read(self, client: ClientId) -> ClientUpdate:
        """Decode one client's update."""
        start, size = self._spans[client]
        self._file.seek(start)
        return decode_update(self._file.read(size), self.task(client))

    def close(self) -> None:
        """Delete the file."""
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
