"""progressive_depth: adapters in the top blocks first, in more of them as the rounds go by.

Source: FedAdapter (Cai et al., MobiCom 2023, arXiv 2205.10162), its growth from the output downward.

    depth(t) = first_depth + add * floor(t / every)      blocks from the output that hold adapters

Cheap rounds come first: back-propagation stops at the lowest adapted block, and what enters it is stored.
Differs: FedAdapter searches for the next depth and width by trying groups of clients; this is its schedule
without the search. All slots of a held module train.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field

from polyrank.adapter import RankMask, top_blocks
from polyrank.messages import ClientId
from polyrank.schema import Schema
from polyrank.state import ServerState

Count = Annotated[int, Field(ge=1)]


class ProgressiveDepth(Schema):
    """The top blocks, one more every so many rounds."""

    kind: Literal["progressive_depth"] = "progressive_depth"
    first_depth: Count = 1
    add: Count = 1
    every: Count = 5
    """Rounds between two steps."""

    @property
    def max_rank(self) -> None:
        """It follows the bank."""
        return

    def allocate(self, state: ServerState, cohort: Sequence[ClientId]) -> Mapping[ClientId, RankMask]:
        """The same modules for everybody."""
        depth = self.first_depth + self.add * (state.round // self.every)
        return dict.fromkeys(cohort, top_blocks(state.active, depth))
