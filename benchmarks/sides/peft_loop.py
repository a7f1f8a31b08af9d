"""Plain transformers + PEFT: one resident model, each client's state copied in and out, a loop of steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from benchmarks.sides.work import (
    Session,
    State,
    Work,
    folders,
    mark_session,
    read_work,
    weighted_mean,
    write_final,
)

Train = Callable[[Any, Mapping[str, nn.Parameter], Work, Session], None]


def main() -> None:
    federate(train)


def federate(train: Train) -> None:
    """All rounds of the work on one resident model, with ``train`` for each client's part in one."""
    folder, out = folders()
    work = read_work(folder)
    model, parameters = resident_model(work)
    state = work.start
    for cohort in work.plan.rounds:
        states = []
        for session in cohort:
            mark_session(out)
            put_in(parameters, state)
            train(model, parameters, work, session)
            states.append(take_out(parameters))
        state = weighted_mean(states, [session.num_examples for session in cohort])
    write_final(state, out)


def resident_model(work: Work) -> tuple[Any, dict[str, nn.Parameter]]:
    """The model with its adapter, and what trains in it by the names of the work."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    plan = work.plan
    base = AutoModelForSequenceClassification.from_pretrained(
        plan.model,
        num_labels=plan.classes,
        dtype=torch.float32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=plan.rank,
        lora_alpha=plan.scale * plan.rank,
        lora_dropout=0.0,
        target_modules=work.modules,
    )
    model = get_peft_model(base, config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters = {name: trained.pop(peft_name(name)) for name in work.start}
    assert not trained, f"the peer would train more: {list(trained)}"
    return model, parameters


def peft_name(name: str) -> str:
    """What PEFT calls a tensor of the work."""
    if name.startswith("head/"):
        module, _, last = name.removeprefix("head/").rpartition(".")
        return f"base_model.model.{module}.modules_to_save.default.{last}"
    module, _, part = name.rpartition("/")
    return f"base_model.model.{module}.lora_{part}.default.weight"


def put_in(parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]) -> None:
    """Give the resident model one client's state."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def take_out(parameters: Mapping[str, nn.Parameter]) -> State:
    """A copy of what the resident model holds now."""
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def train(model: Any, parameters: Mapping[str, nn.Parameter], work: Work, session: Session) -> None:
    """One client's local steps."""
    model.train()
    optimizer = torch.optim.SGD(parameters.values(), lr=work.plan.training["learning_rate"])
    for rows in session.batches:
        inputs, labels = work.batch(rows)
        loss = F.cross_entropy(model(**inputs).logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()


if __name__ == "__main__":
    main()
