"""The work that every side gets: tokens, start, and who trains on which rows in which order."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

State = dict[str, Tensor]
"""What is trained: ``MODULE/A`` and ``MODULE/B`` of each adapted module, and ``head/NAME``."""


@dataclass(frozen=True)
class Session:
    """One client's part in one round: the rows of each local step's batch."""

    client: int
    num_examples: int
    batches: list[list[int]]


@dataclass(frozen=True)
class Plan:
    """What the work is, apart from its tensors.

    Args:
        sizes: examples of each client; client 0 holds the first rows, and so on.
        pad_to: tokens that peers pad every text to; None pads to the longest text of the batch.
    """

    model: str
    classes: int
    rank: int
    scale: float
    seed: int
    cohort: int
    training: dict[str, Any]
    sizes: list[int]
    pad_to: int | None
    pad_id: int
    rounds: list[list[Session]]


@dataclass(frozen=True)
class Work:
    """Plan and tensors: token ids [sum T], where each text starts [N + 1], labels [N], and the start."""

    plan: Plan
    ids: Tensor
    starts: Tensor
    labels: Tensor
    start: State

    @property
    def modules(self) -> list[str]:
        """Names of the adapted modules."""
        return [name.removesuffix("/A") for name in self.start if name.endswith("/A")]

    def batch(self, rows: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        """Padded model inputs [B, T] and labels [B], as a peer would make them."""
        texts = [self.ids[self.starts[row] : self.starts[row + 1]].long() for row in rows]
        longest = self.plan.pad_to or max(len(text) for text in texts)
        ids = torch.full((len(texts), longest), self.plan.pad_id)
        seen = torch.zeros_like(ids)
        for line, text in enumerate(texts):
            ids[line, : len(text)] = text
            seen[line, : len(text)] = 1
        return {"input_ids": ids, "attention_mask": seen}, self.labels[rows]


def write_work(work: Work, folder: Path) -> None:
    """Leave the work in a folder."""
    start = {f"start/{name}": t.contiguous() for name, t in work.start.items()}
    save_file(
        {"ids": work.ids, "starts": work.starts, "labels": work.labels, **start}, folder / "work.safetensors"
    )
    (folder / "plan.json").write_text(json.dumps({**asdict(work.plan), "names": list(work.start)}))


def read_work(folder: Path) -> Work:
    """The work of a folder."""
    content = json.loads((folder / "plan.json").read_text())
    names = content.pop("names")  # safetensors sorts its names; the order is that of the model
    rounds = [[Session(**session) for session in round_] for round_ in content.pop("rounds")]
    tensors = load_file(folder / "work.safetensors")
    start = {name: tensors[f"start/{name}"] for name in names}
    plan = Plan(**content, rounds=rounds)
    return Work(plan, tensors["ids"], tensors["starts"], tensors["labels"], start)


def folders() -> tuple[Path, Path]:
    """The two folders on the command line of a side; one thread from here on."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    return given.work, given.out


def mark_session(out: Path) -> None:
    """Note when the first client of the run begins to train; later calls change nothing."""
    path = out / "first_session"
    if not path.exists():
        path.write_text(str(time.time()))


def weighted_mean(states: Sequence[Mapping[str, Tensor]], counts: Sequence[int]) -> State:
    """Mean of some states, tensor by tensor, weighted by examples."""
    shares = [count / sum(counts) for count in counts]
    return {
        name: torch.stack([share * state[name] for share, state in zip(shares, states, strict=True)]).sum(0)
        for name in states[0]
    }


def write_final(state: Mapping[str, Tensor], out: Path) -> None:
    """Leave the trained state where the benchmark looks for it."""
    save_file({name: t.detach().contiguous() for name, t in state.items()}, out / "final.safetensors")
