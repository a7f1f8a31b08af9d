"""uniform: every client holds the same slots.

Source: FedIT (Zhang et al., arXiv 2305.05644), and every federated LoRA that gives all devices one rank.

``depth`` leaves out the lower blocks for everybody; ``"weakest"`` goes as deep as the device with the least
memory can, which is the baseline of methods that fit each device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field

from polyrank.adapter import RankMask, top_blocks
from polyrank.messages import ClientId
from polyrank.schema import Schema
from polyrank.state import ServerState
from polyrank.voting import best_slots

Count = Annotated[int, Field(ge=1)]


class Uniform(Schema):
    """The first ``rank`` slots of every module for everybody; without ``rank``, all slots."""

    kind: Literal["uniform"] = "uniform"
    rank: Count | None = None
    depth: Count | Literal["weakest"] | None = None
    """Blocks counted from the output; none: all."""

    @property
    def max_rank(self) -> int | None:
        """The largest rank that is handed out."""
        return self.rank

    def opening(self, state: ServerState) -> RankMask:
        """The slots that are active from the start where devices vote: those that are held."""
        mask = state.active if self.rank is None else best_slots(state, self.rank)
        if self.depth is None:
            return mask
        return top_blocks(mask, weakest(state) if self.depth == "weakest" else self.depth)

    def allocate(self, state: ServerState, cohort: Sequence[ClientId]) -> Mapping[ClientId, RankMask]:
        """What is active and held, the same for everybody."""
        return dict.fromkeys(cohort, self.opening(state))


def weakest(state: ServerState) -> int:
    """Blocks that the device with the least memory has room for, at least one.

    Raises: ValueError when the server knows no device.
    """
    known = [r.capacity.max_depth for r in state.clients.values() if r.capacity is not None]
    if not known:
        raise ValueError("nothing is known of the devices")
    return max(1, min(known))
