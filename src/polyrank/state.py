"""All that a policy may look at and all that a run must keep between two rounds."""

from __future__ import annotations

from dataclasses import dataclass

from polyrank.adapter import Adapter, Head, RankMask


@dataclass(frozen=True, slots=True)
class ServerState:
    """The server between two rounds.

    Args:
        round: the next round, from 0.
        seed: root of every random draw of the run.
        adapter: the bank with all R slots of every module.
        active: the slots still in use; a policy never hands out others.
    """

    round: int
    seed: int
    adapter: Adapter
    active: RankMask
    head: Head
