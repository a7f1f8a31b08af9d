"""The client of the Flower simulation; a module of its own, so that each actor keeps one resident model.

transformers and PEFT are imported where a client trains, so that the server's process does without them.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from benchmarks.sides.work import Work, mark_session, read_work

app = ClientApp()


@app.train()
def train_one(message: Message, context: Context) -> Message:
    """One client's part in one round; the server says whose."""
    from benchmarks.sides.peft_loop import put_in, take_out, train

    config = message.content["config"]
    work, model, parameters = resident(config["work"])
    mark_session(Path(config["out"]))
    session = work.plan.rounds[config["server-round"] - 1][config["place"]]
    put_in(parameters, message.content["arrays"].to_torch_state_dict())
    train(model, parameters, work, session)
    arrays, counts = ArrayRecord(take_out(parameters)), MetricRecord({"num-examples": session.num_examples})
    return Message(RecordDict({"arrays": arrays, "metrics": counts}), reply_to=message)


@cache
def resident(folder: str) -> tuple[Work, Any, dict[str, Any]]:
    """Work and model of this process."""
    from benchmarks.sides.peft_loop import resident_model

    torch.set_num_threads(1)
    work = read_work(Path(folder))
    return work, *resident_model(work)
