"""What aggregation costs at the shapes of a 7B model, against plain code, in CPU-seconds of one thread.

    python benchmarks/aggregation.py --out DATED.json
    python benchmarks/aggregation.py --clients 50 --blocks 2 --matrices 2 --width 512 --pairs 1

Updates are those of q and v of every block, 4096 x 4096, bf16. Both sides take turns within one process;
medians of the ratios over the pairs, with the least and the most. Every row first checks that both sides
agree. Small updates (MiniLM) show what the round's aggregation error costs beside the rules.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from polyrank.adapter import Adapter, Factors, delta_weight, full_mask, new_adapter, prefix_mask
from polyrank.aggregation import FedAvg, LayerWise, SvdRedistribution
from polyrank.aggregation.error import aggregation_error
from polyrank.aggregation.product import stack, truncated_svd
from polyrank.ledger import versions
from polyrank.messages import ClientUpdate
from polyrank.state import ServerState

MIXED = (4, 8, 16, 32, 64)
Row = dict[str, Any]
Work = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--clients", type=int, default=1_000, help="of the means")
    parser.add_argument("--blocks", type=int, default=32, help="of the means, two modules each")
    parser.add_argument("--matrices", type=int, default=64, help="of the SVD rule; 0 leaves it out")
    parser.add_argument("--width", type=int, default=4_096)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        mean_row("r = 16", FedAvg(), [16] * 16, given),
        mean_row("r = 4 to 64", LayerWise(), MIXED * 2, given),
    ]
    if given.matrices:
        rows.append(svd_row(given))
    rows += [error_row(clients, given.pairs) for clients in (10, 100)]
    print("| work | ratio (least to most) | CPU-s | plain CPU-s |\n|---|---|---|---|")
    for row in rows:
        span = f"{row['ratio']:.2f} ({row['least']:.2f} to {row['most']:.2f})"
        print(f"| {row['work']} | {span} | {row['cpu_s']:.3g} | {row['plain_cpu_s']:.3g} |")
        print("".join(f"    {key}: {value:.3g}\n" for key, value in row["beside"].items()), end="")
    if given.out is not None:
        ratios = {row["work"]: row["ratio"] for row in rows}
        content = {"date": str(datetime.date.today()), "versions": versions(), "ratios": ratios, "rows": rows}
        given.out.write_text(json.dumps(content, indent=2) + "\n")


class Repeated(Sequence[ClientUpdate]):
    """Many updates that are a few over and over, and the memory in use along the way."""

    def __init__(self, few: Sequence[ClientUpdate], count: int) -> None:
        self._few, self._count = few, count
        self.peaks_gib: dict[int, float] = {}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if index >= self._count:
            raise IndexError(index)
        if index in (self._count // 10, self._count - 1):
            self.peaks_gib[index] = peak_gib()
        return self._few[index % len(self._few)]


def mean_row(name: str, rule: FedAvg | LayerWise, ranks: Sequence[int], given: Any) -> Row:
    """One mean over many updates, against a loop of `acc += w * update.float()`."""
    shapes = {
        f"model.layers.{block}.self_attn.{m}_proj": (given.width, given.width)
        for block in range(given.blocks)
        for m in "qv"
    }
    bank = new_adapter(shapes, form="lora", rank=max(ranks), scale=2.0, seed=0)
    state, few = state_of(bank), updates_of(bank, ranks, torch.bfloat16)
    updates = Repeated(few, given.clients)
    ours = rule.aggregate(state, updates)
    memory = {f"GiB at most, update {number + 1}": peak for number, peak in updates.peaks_gib.items()}
    plain = plain_mean(bank, updates)
    difference = max(
        float((f.tensors()[part] - mean).abs().max())
        for name, f in ours.adapter.modules.items()
        for part, mean in plain[name].items()
    )
    assert difference < 1e-4, difference
    into = torch.empty(sum(t.numel() for t in tensors_of(few[-1])))
    bounds = {
        "CPU-s to read the updates once": lambda: read_all(updates),
        "CPU-s to copy them to float32": lambda: widen_all(updates, into),
    }
    row = compare(
        f"mean of {given.clients} updates, {len(shapes)} modules, {name}",
        given.pairs,
        lambda: rule.aggregate(state, updates),
        lambda: plain_mean(bank, updates),
        beside=bounds,
    )
    row["beside"] |= memory | {"largest difference": difference}
    return row


def plain_mean(bank: Adapter, updates: Sequence[ClientUpdate]) -> dict[str, dict[str, torch.Tensor]]:
    """Per slot, the mean over the clients that hold it, update by update and tensor by tensor."""
    sums = {
        name: {part: torch.zeros_like(t) for part, t in f.tensors().items()}
        for name, f in bank.modules.items()
    }
    mass = {name: torch.zeros(f.rank) for name, f in bank.modules.items()}
    for update in updates:
        w = update.num_examples
        for name, f in update.adapter.modules.items():
            mass[name][: f.rank] += w
            sums[name]["B"][:, : f.rank] += w * f.B.float()
            sums[name]["A"][: f.rank] += w * f.A.float()
    return {
        name: {"B": total["B"] / mass[name], "A": total["A"] / mass[name][:, None]}
        for name, total in sums.items()
    }


def svd_row(given: Any) -> Row:
    """FlexLoRA's rule with 32 clients of r = 16, against the dense SVD of one module, times the modules."""
    shapes = {str(number): (given.width, given.width) for number in range(given.matrices)}
    bank = new_adapter(shapes, form="lora", rank=64, scale=2.0, seed=0)
    state, updates = state_of(bank), updates_of(bank, [16] * 32, torch.bfloat16)

    def dense() -> torch.Tensor:
        products = (delta_weight(wide(u.adapter.modules["0"])) for u in updates)
        total = sum(u.num_examples * product for u, product in zip(updates, products, strict=True))
        _, s, _ = torch.linalg.svd(total / sum(u.num_examples for u in updates), full_matrices=False)
        return s

    merged = SvdRedistribution().aggregate(state, updates).adapter.modules["0"]
    s, exact = merged.B.norm(dim=0) * merged.A.norm(dim=1) * merged.scale, dense()[:64]
    assert float((s - exact).abs().max() / exact[0]) < 1e-5
    row = compare(
        f"SVD rule, {given.matrices} modules, sum of ranks 512",
        given.pairs,
        lambda: SvdRedistribution().aggregate(state, updates),
        dense,
        plain_times=given.matrices,
    )
    row["beside"] = {f"error of s, {name}": error for name, error in value_errors(given.width)}
    return row


def value_errors(width: int) -> Iterator[tuple[str, float]]:
    """Largest error of the first 64 singular values, as a share of the largest, against dense float64."""
    draw = torch.Generator().manual_seed(0)
    for name, last in (("flat spectrum", 0), ("falling to 1e-10", -5)):
        fall = torch.logspace(0, last, 512)
        left = torch.randn(width, 512, generator=draw) * fall
        right = fall[:, None] * torch.randn(512, width, generator=draw)
        _, s, _ = truncated_svd(*stack([(Factors(left, right, 1.0), torch.ones(512))]), 64)
        exact = torch.linalg.svdvals(left.double() @ right.double())
        yield name, float((s - exact[:64]).abs().max() / exact[0])


def error_row(clients: int, pairs: int) -> Row:
    """The aggregation error of a MiniLM round, against the dense mean; and the rules beside it."""
    shapes = {f"encoder.layer.{number}": (384, 384) for number in range(18)}
    bank = new_adapter(shapes, form="lora", rank=32, scale=2.0, seed=0)
    ranks = [(8, 16, 24, 32)[number % 4] for number in range(clients)]
    state, updates = state_of(bank), updates_of(bank, ranks, torch.float32)
    merged = LayerWise().aggregate(state, updates)

    def plain() -> float:
        far = near = 0.0
        for name, served in merged.adapter.modules.items():
            products = (u.num_examples * delta_weight(u.adapter.modules[name]) for u in updates)
            mean = sum(products, torch.zeros(())) / sum(u.num_examples for u in updates)
            near += float(mean.double().square().sum())
            far += float((mean - delta_weight(served)).double().square().sum())
        return math.sqrt(far / near)

    def ours() -> float:
        return aggregation_error(bank, state.active, merged, updates, False)

    assert abs(ours() - plain()) < 1e-5
    rules = (LayerWise(), SvdRedistribution())
    beside = {f"CPU-s of {r.kind}": lambda r=r: r.aggregate(state, updates) for r in rules}
    work = f"aggregation error, {clients} clients of MiniLM, r = 8 to 32"
    return compare(work, pairs, ours, plain, beside=beside)


def updates_of(bank: Adapter, ranks: Sequence[int], dtype: torch.dtype) -> list[ClientUpdate]:
    """One random update per rank, which holds the first so many slots of each module."""
    draw = torch.Generator().manual_seed(0)
    updates = []
    for number, rank in enumerate(ranks):
        modules = {}
        for name, f in bank.modules.items():
            B = torch.randn(f.B.shape[0], rank, generator=draw).to(dtype)
            A = torch.randn(rank, f.A.shape[1], generator=draw).to(dtype)
            modules[name] = Factors(B, A, f.scale)
        mask, adapter = prefix_mask(bank, rank), Adapter("lora", modules)
        updates.append(ClientUpdate(0, str(number), mask, adapter, {}, 1 + number % 3, {}))
    return updates


def state_of(bank: Adapter) -> ServerState:
    return ServerState(0, 0, bank, full_mask(bank), {})


def wide(factors: Factors) -> Factors:
    return factors.with_tensors({part: t.float() for part, t in factors.tensors().items()})


def tensors_of(update: ClientUpdate) -> list[torch.Tensor]:
    return [t for f in update.adapter.modules.values() for t in f.tensors().values()]


def read_all(updates: Sequence[ClientUpdate]) -> None:
    """The least that any rule must do: every byte once."""
    for update in updates:
        for tensor in tensors_of(update):
            tensor.view(-1).view(torch.int32).max()


def widen_all(updates: Sequence[ClientUpdate], memory: torch.Tensor) -> None:
    """What a rule does that widens in one go: read two bytes, write four, of every number."""
    for update in updates:
        tensors = tensors_of(update)
        parts = memory[: sum(t.numel() for t in tensors)].split([t.numel() for t in tensors])
        for part, tensor in zip(parts, tensors, strict=True):
            part.copy_(tensor.view(-1))


def compare(
    work: str,
    pairs: int,
    ours: Work,
    plain: Work,
    *,
    plain_times: int = 1,
    beside: Mapping[str, Work] | None = None,
) -> Row:
    """One row: both sides in turns, and what is measured beside them.

    Args:
        plain_times: the plain side does one part of so many.
    """
    sides = {"ours": ours, "plain": plain, **(beside or {})}
    turns = [{side: seconds(run) for side, run in sides.items()} for _ in range(pairs)]
    spent = [(turn["ours"], plain_times * turn["plain"]) for turn in turns]
    ratios = [plain_s / ours_s for ours_s, plain_s in spent]
    return {
        "work": work,
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "cpu_s": statistics.median(ours_s for ours_s, _ in spent),
        "plain_cpu_s": statistics.median(plain_s for _, plain_s in spent),
        "beside": {side: statistics.median(turn[side] for turn in turns) for side in beside or {}},
    }


def seconds(work: Work) -> float:
    """CPU-seconds of this process for one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def peak_gib() -> float:
    """Largest resident size so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
