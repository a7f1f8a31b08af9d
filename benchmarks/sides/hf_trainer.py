"""A transformers.Trainer for each client and round, around one resident PEFT model."""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from benchmarks.sides.peft_loop import federate
from benchmarks.sides.work import Session, Work


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        federate(lambda model, _, work, session: train(model, work, session, scratch))


def train(model: Any, work: Work, session: Session, scratch: str) -> None:
    """One client's local steps by a Trainer of its own that keeps, logs and reports nothing."""
    arguments = TrainingArguments(
        output_dir=scratch,
        optim="sgd",
        learning_rate=work.plan.training["learning_rate"],
        lr_scheduler_type="constant",
        max_steps=len(session.batches),
        max_grad_norm=0.0,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=arguments)
    rows: Any = range(len(work.labels))
    loader: Any = DataLoader(rows, batch_sampler=session.batches, collate_fn=partial(collate, work))
    trainer.get_train_dataloader = lambda: loader  # the very rows of the plan, in their order
    trainer.train()


def collate(work: Work, rows: list[int]) -> dict[str, Tensor]:
    """A batch as a Trainer's model takes it."""
    inputs, labels = work.batch(rows)
    return inputs | {"labels": labels}


if __name__ == "__main__":
    main()
