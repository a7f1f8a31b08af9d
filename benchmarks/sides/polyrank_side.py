"""polyrank: its own rounds, the embedded engine with one worker, prefix cache on."""

from __future__ import annotations

import dataclasses
import tempfile
from itertools import accumulate
from pathlib import Path

import torch

from benchmarks.sides.work import State, Work, folders, mark_session, read_work, write_final
from polyrank.adapter import Adapter, Factors, Head, full_mask
from polyrank.aggregation import FedAvg
from polyrank.allocation import Uniform
from polyrank.config import Embedded
from polyrank.data.tokens import Tokens
from polyrank.engine.embedded import EmbeddedEngine
from polyrank.messages import Training
from polyrank.models.load import load_base
from polyrank.models.prefix import PrefixCache, can_skip
from polyrank.round import Federation, federated_round
from polyrank.sampling import SampleCount
from polyrank.session import ClientEnv
from polyrank.state import ClientRecord, ServerState


def main() -> None:
    folder, out = folders()
    work = read_work(folder)
    with tempfile.TemporaryDirectory() as cache:
        federation, state = federation_of(work, Path(cache))
        mark_session(out)
        for _ in work.plan.rounds:
            state, _ = federated_round(federation, state)
    write_final(state_of(state), out)


def federation_of(work: Work, cache: Path) -> tuple[Federation, ServerState]:
    """The federation as `polyrank.experiment.prepare` would set it up, on the tokens of the work."""
    plan = work.plan
    labels = [str(number) for number in range(plan.classes)]
    model = load_base(plan.model, labels, plan.seed, torch.device("cpu"))
    model = dataclasses.replace(model, skips=can_skip(model))
    tokens = Tokens(work.ids.numpy(), None, work.starts.numpy(), work.labels.numpy(), plan.pad_id)
    prefix = PrefixCache(cache, int(Embedded().prefix_gb * 1e9))
    ends = list(accumulate(plan.sizes))
    environments = {
        client_name(number): ClientEnv(model, tokens.select(range(end - size, end)), prefix=prefix)
        for number, (size, end) in enumerate(zip(plan.sizes, ends, strict=True))
    }
    adapter, head = adapter_and_head(work)
    federation = Federation(
        engine=EmbeddedEngine(environments),
        sampling=SampleCount(count=plan.cohort),
        allocation=Uniform(),
        aggregation=FedAvg(),
        training=Training(**plan.training),
        rounds=len(plan.rounds),
    )
    records = {client: ClientRecord() for client in environments}
    return federation, ServerState(0, plan.seed, adapter, full_mask(adapter), head, records)


def adapter_and_head(work: Work) -> tuple[Adapter, Head]:
    """The start of the work as polyrank's own types."""
    modules = {
        name: Factors(work.start[f"{name}/B"], work.start[f"{name}/A"], work.plan.scale)
        for name in work.modules
    }
    head = {name.removeprefix("head/"): t for name, t in work.start.items() if name.startswith("head/")}
    return Adapter("lora", modules), head


def client_name(number: int) -> str:
    """What polyrank calls a client of the work."""
    return f"client-{number:02d}"


def state_of(state: ServerState) -> State:
    """Adapter and head by the names of the work."""
    adapter = {
        f"{name}/{part}": tensor
        for name, factors in state.adapter.modules.items()
        for part, tensor in factors.tensors().items()
    }
    return adapter | {f"head/{name}": tensor for name, tensor in state.head.items()}


if __name__ == "__main__":
    main()
