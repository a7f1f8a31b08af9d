"""Measures training steps on this machine and fits a device profile to them.

    seconds of a step = flop / f + bytes / b + operations x l        f, b, l > 0: least relative squares

The steps are those of the real client (`session.train`) on the packaged MiniLM, over depths, ranks and
batch sizes; CPU-seconds of one thread, so that a busy machine fails nothing (on a GPU, seconds on the clock).
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import nnls

from polyrank.adapter import full_mask, new_adapter
from polyrank.cost import Demand, Workload, backward, forward
from polyrank.data.tokens import Tokens
from polyrank.device import Device, Mode
from polyrank.messages import Training, TrainTask
from polyrank.models.load import PACKAGED, BaseModel, load_base, pick_device, read_head
from polyrank.models.prefix import PrefixCache, can_skip
from polyrank.models.shape import ModelShape, shape_of
from polyrank.models.targets import resolve_targets
from polyrank.session import ClientEnv, session_depth, train


@dataclass(frozen=True, slots=True)
class Step:
    """One kind of training step.

    Args:
        depth: adapted blocks, counted from the output.
        length: tokens of every text.
        stored: whether the blocks below are taken from a stored prefix.
    """

    depth: int
    rank: int
    batch: int = 8
    length: int = 64
    stored: bool = False


CALIBRATION = (
    *(Step(depth, rank) for depth in (1, 3, 6) for rank in (2, 32)),
    *(Step(depth, 8, batch, 32) for depth in (1, 6) for batch in (4, 16)),
    Step(6, 8, 16, 64),
    Step(1, 2, stored=True),
    Step(2, 8, stored=True),
)
"""What a machine is calibrated on; `benchmarks/devices.py` predicts other steps from it."""


def measure(model: BaseModel, step: Step, cache: PrefixCache | None = None, steps: int = 6) -> float:
    """Seconds of one training step: the least of five sessions after one that is thrown away."""
    task, env = session_of(model, step, cache, steps)
    train(task, env)
    return min(seconds(task, env) / steps for _ in range(5))


def seconds(task: TrainTask, env: ClientEnv) -> float:
    """Seconds of one session, as this module counts them."""
    clock = time.process_time if env.model.device.type == "cpu" else time.perf_counter
    start = clock()
    train(task, env)
    return clock() - start


def session_of(
    model: BaseModel, step: Step, cache: PrefixCache | None, steps: int
) -> tuple[TrainTask, ClientEnv]:
    """A session of random texts that takes such steps."""
    draw, texts = np.random.default_rng(0), step.batch * 2
    ids = draw.integers(5, model.network.config.vocab_size, texts * step.length).astype(np.int32)
    starts = np.arange(texts + 1) * step.length
    data = Tokens(ids, None, starts, draw.integers(0, 2, texts), 0)
    adapter = new_adapter(modules_of(model, step.depth), form="lora", rank=step.rank, scale=2.0, seed=0)
    mask = full_mask(adapter)
    training = Training(local_steps=steps, batch_size=step.batch)
    task = TrainTask(0, "this", 0, mask, mask, adapter, read_head(model), training)
    return task, ClientEnv(model, data, prefix=cache if step.stored else None)


def modules_of(model: BaseModel, depth: int) -> dict[str, tuple[int, int]]:
    """The maps to queries, keys and values of the top blocks."""
    upper = tuple(f"{block}." for block in model.blocks[len(model.blocks) - depth :])
    shapes = resolve_targets(model.network, model.blocks, "attention")
    return {name: shape for name, shape in shapes.items() if name.startswith(upper)}


def workload_of(model: BaseModel, shape: ModelShape, step: Step) -> Workload:
    """The same step as the cost model sees it."""
    ranks = dict.fromkeys(modules_of(model, step.depth), step.rank)
    skipped = shape.blocks - step.depth if step.stored else 0
    return Workload(shape, ranks, 1, step.batch, step.batch * step.length, skipped=skipped)


def fit(demands: Sequence[Demand], taken: Sequence[float]) -> tuple[float, float, float]:
    """FLOP per second, bytes per second and seconds per operation that explain some steps best.

    Raises: ValueError when the steps do not tell the speed of the machine.
    """
    rows = np.array([[d.flop, d.moved_bytes, d.operations] for d in demands])
    scale = rows.max(axis=0)
    relative = rows / scale / np.array(taken)[:, None]
    found, _ = nnls(relative, np.ones(len(taken)))
    per_flop, per_byte, per_operation = found / scale
    if per_flop == 0:
        raise ValueError("the measured steps do not depend on their FLOP")
    return 1 / per_flop, 1 / per_byte if per_byte else float("inf"), float(per_operation)


def demand_of(work: Workload) -> Demand:
    """Forward and backward part of a session."""
    return forward(work) + backward(work)


def calibrate(model: BaseModel, cache: PrefixCache | None, memory_gb: float, compute_w: float) -> Device:
    """The profile of this machine, from measured steps.

    Args:
        cache: for the steps that take their lower blocks from store; without one they are left out.
        compute_w: power drawn while computing, which is not measured here.
    """
    shape = shape_of(model)
    steps = [step for step in CALIBRATION if step.depth <= shape.blocks and (cache or not step.stored)]
    steps = [step for step in steps if not step.stored or _is_stored(model, step, cache)]
    taken = [measure(model, step, cache) for step in steps]
    demands = [demand_of(workload_of(model, shape, step)) for step in steps]
    flop_per_s, bytes_per_s, launch_s = fit(demands, taken)
    errors = [
        abs(d.flop / flop_per_s + d.moved_bytes / bytes_per_s + d.operations * launch_s - s) / s
        for d, s in zip(demands, taken, strict=True)
    ]
    return Device(
        title=f"calibrated {platform.machine()}, {model.device.type}",
        source=f"polyrank device calibrate: {len(steps)} kinds of step, fitted within {max(errors):.0%}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; watts and memory as given",
        peak_gflop_per_s=flop_per_s / 1e9,
        achieved_share=1.0,
        bandwidth_gb_per_s=min(bytes_per_s / 1e9, 1e6),
        launch_s=launch_s,
        memory_gb=memory_gb,
        usable_share=0.8,
        cuda=model.device.type == "cuda",
        modes=(Mode(name="measured", speed=1.0, compute_w=compute_w),),
    )


def calibrate_here(compute_w: float) -> Device:
    """The profile of this machine with one thread, from the packaged MiniLM."""
    torch.set_num_threads(1)
    device = pick_device("auto")
    model = load_base(PACKAGED, ["no", "yes"], 0, device)
    model = replace(model, skips=can_skip(model))
    with tempfile.TemporaryDirectory(prefix="polyrank-prefix-") as folder:
        return calibrate(model, PrefixCache(Path(folder), 10**9), _memory_gb(device), compute_w)


def _memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 1e9
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def profile_toml(name: str, device: Device) -> str:
    """A fleet file of this one device on a wired network."""
    given = device.model_dump()
    modes = given.pop("modes")
    lines = ["[fleet]", f'members = [{{ device = "{name}", link = "lan" }}]', "", f"[devices.{name}]"]
    lines += [f"{key} = {json.dumps(value)}" for key, value in given.items()]
    rows = (", ".join(f"{key} = {json.dumps(value)}" for key, value in mode.items()) for mode in modes)
    return "\n".join([*lines, f"modes = [{', '.join(f'{{ {row} }}' for row in rows)}]"]) + "\n"


def _is_stored(model: BaseModel, step: Step, cache: PrefixCache | None) -> bool:
    task, env = session_of(model, step, cache, 1)
    return session_depth(task, env) == len(model.blocks) - step.depth
