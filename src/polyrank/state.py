"""All that a policy may look at and all that a run must keep between two rounds."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from polyrank.adapter import Adapter, Head, RankMask, fingerprint
from polyrank.messages import ClientId


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the server expects of one device: seconds of a session that adapts so many blocks and slots.

        seconds(k) = compute_fixed_s + k block_s + link_fixed_s + slots slot_s

    Args:
        max_depth: blocks with all their slots that its memory has room for.
    """

    compute_fixed_s: float
    block_s: float
    link_fixed_s: float
    slot_s: float
    max_depth: int

    def seconds(self, depth: int, slots: int) -> float:
        """Predicted seconds of one round."""
        return self.compute_fixed_s + depth * self.block_s + self.link_fixed_s + slots * self.slot_s


@dataclass(frozen=True, slots=True)
class ClientRecord:
    """What the server remembers about one client.

    Args:
        folds: how many folds it has received.
        rank_limit: slots per module it gave up to (HetLoRA's self-pruning); None means no limit.
        loss: its last score, for loss-based allocation; None before the first.
        device: what kind of device it is, where a fleet is simulated.
        capacity: how fast it is and how much it holds, as far as the server knows.
        stored: blocks whose output it keeps for its texts; None before its first session.
    """

    folds: int = 0
    rank_limit: int | None = None
    loss: float | None = None
    device: str | None = None
    capacity: Capacity | None = None
    stored: int | None = None


@dataclass(frozen=True, slots=True)
class ServerState:
    """The server between two rounds.

    Args:
        round: the next round, from 0.
        seed: root of every random draw of the run.
        adapter: the bank with all R slots of every module.
        active: the slots still in use; a policy never hands out others.
        clients: a record of every client of the population.
        folds: updates that belong to the frozen weights by now (stacking), oldest first.
        shares: of each slot, the share of votes it got last; empty before the first vote.
    """

    round: int
    seed: int
    adapter: Adapter
    active: RankMask
    head: Head
    clients: Mapping[ClientId, ClientRecord] = field(default_factory=dict)
    folds: Sequence[Adapter] = ()
    shares: Mapping[str, Tensor] = field(default_factory=dict)


def version(state: ServerState) -> str:
    """A short digest of what clients start from: the round, the bank, the head and the folds."""
    digest = hashlib.blake2b(f"{state.round} {len(state.folds)}".encode(), digest_size=8)
    digest.update(fingerprint(state.adapter).encode())
    for tensor in state.head.values():
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
