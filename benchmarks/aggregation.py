"""What aggregation costs: streaming means of many large updates, and SVD rules against dense SVD.

    python benchmarks/aggregation.py

Updates are those of a 7B model: q and v of 32 blocks, 4096 x 4096, bf16, ranks 4 to 64. CPU-seconds of one
thread; memory is the largest resident size of this process.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import torch

from polyrank.adapter import Adapter, Factors, new_adapter, prefix_mask, restrict
from polyrank.aggregation.base import SlotSums
from polyrank.aggregation.product import truncated_svd
from polyrank.messages import ClientUpdate

WIDTH, RANKS = 4096, (4, 8, 16, 32, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=int, default=1_000)
    parser.add_argument("--blocks", type=int, default=32)
    given = parser.parse_args()
    torch.set_num_threads(1)
    svd_against_dense()
    mean_of_many(given.clients, given.blocks)


def svd_against_dense() -> None:
    """One 4096 x 4096 module, sum of ranks 512, cut back to rank 64."""
    draw = torch.Generator().manual_seed(0)
    left = torch.randn(WIDTH, 512, generator=draw) * torch.logspace(0, -2, 512)
    right = torch.randn(512, WIDTH, generator=draw)
    truncated_svd(left[:, :64], right[:64], 8)
    factored_s, (_, s, _) = timed(lambda: truncated_svd(left, right, 64))
    dense_s, exact = timed(lambda: torch.linalg.svdvals(left @ right))
    error = float((s - exact[:64]).abs().max() / exact[0])
    print(f"SVD rule, 4096 x 4096, sum r 512: {factored_s:.2f} CPU-s factored, {dense_s:.2f} CPU-s dense")
    print(f"  ratio {dense_s / factored_s:.0f}, largest singular value error {error:.1e} of the largest")


def mean_of_many(clients: int, blocks: int) -> None:
    """Stream updates of mixed rank into one mean; memory after a tenth and after all of them."""
    shapes = {f"model.layers.{b}.self_attn.{m}_proj": (WIDTH, WIDTH) for b in range(blocks) for m in "qv"}
    bank = new_adapter(shapes, form="lora", rank=max(RANKS), scale=2.0, seed=0)
    updates = [update_of(bank, rank) for rank in RANKS]
    sums = SlotSums(bank)
    start, tenth = time.process_time(), 0.0
    for number in range(clients):
        sums.add(updates[number % len(updates)], 1.0 + number % 3)
        if number + 1 == max(1, clients // 10):
            tenth = peak_gib()
    spent = time.process_time() - start
    each_ms = 1e3 * spent / clients
    print(f"mean of {clients} updates, {len(shapes)} modules: {spent:.1f} CPU-s, {each_ms:.1f} ms each")
    print(f"  peak memory {tenth:.2f} GiB after a tenth, {peak_gib():.2f} GiB after all")


def update_of(bank: Adapter, rank: int) -> ClientUpdate:
    """A client's bf16 update that holds the first so many slots."""
    mask = prefix_mask(bank, rank)
    held = restrict(bank, mask)
    modules = {name: Factors(f.B.bfloat16(), f.A.bfloat16(), f.scale) for name, f in held.modules.items()}
    return ClientUpdate(0, f"rank-{rank}", mask, Adapter("lora", modules), {}, 1, {})


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU-seconds of one call, and what it returned."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def peak_gib() -> float:
    """Largest resident size so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
