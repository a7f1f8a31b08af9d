"""How good a model is: on labels, accuracy and macro-F1; on responses, perplexity and token accuracy."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from polyrank.adapter import Adapter, Head
from polyrank.data.tokens import Tokens
from polyrank.lowrank import installed
from polyrank.models.load import BaseModel, logits_of, write_head
from polyrank.models.prefix import PrefixCache, forward_from, usable_depth
from polyrank.schema import Schema

Count = Annotated[int, Field(ge=1)]


class Evaluation(Schema):
    """When and on what the global model is scored."""

    every: Count = 1
    """Rounds between two scorings on the test texts; the last round is always scored."""
    batch_size: Count = 32
    per_client: bool = False
    """Score the final model on each client's own held-out texts too."""
    holdout_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of a client's texts kept aside when ``per_client`` is on."""
    responses: Annotated[int, Field(ge=0)] = 3
    """causal_lm: test prompts that the model responds to before the first round and after the last."""
    max_new_tokens: Count = 64
    """Where such a response is cut."""
    validation_texts: Annotated[int, Field(ge=0)] = 0
    """Train texts the server keeps; 0 means 200 where allocation goes by its own loss, none elsewhere.
    Set it for every arm of a comparison, so that all have the same clients."""


def evaluate(
    model: BaseModel,
    adapter: Adapter,
    head: Head,
    data: Tokens,
    batch_size: int,
    cache: PrefixCache | None = None,
) -> dict[str, float]:
    """Scores of base model + adapter + head on some examples."""
    write_head(model, head)
    depth = usable_depth(model, adapter.modules, data, cache)
    forward = forward_from(model, [data], depth, cache)
    with installed(model.network, [adapter]):
        if data.responses is not None:
            return response_scores(model, data, batch_size, forward)
        logits = predict(model, data, batch_size, lambda rows, inputs: forward([rows], inputs))
    return scores(logits, torch.from_numpy(data.labels))


def predict(
    model: BaseModel,
    data: Tokens,
    batch_size: int,
    forward: Callable[[list[int], Mapping[str, Tensor]], Tensor] | None = None,
) -> Tensor:
    """Logits [B, classes] on the CPU, in the order of the examples.

    Examples of similar length share a batch, so that little is padded.

    Args:
        forward: logits of a batch given its row numbers and inputs, if not the whole model's.
    """
    order = np.argsort(data.lengths, kind="stable")
    run = forward or (lambda rows, inputs: logits_of(model, inputs))
    logits: Tensor | None = None
    with torch.inference_mode(), precision(model.device):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            inputs, _ = data.batch(rows.tolist(), model.device)
            batch = run(rows.tolist(), inputs).float().cpu()
            if logits is None:
                logits = torch.empty(len(order), batch.shape[1])
            logits[torch.from_numpy(rows)] = batch
    assert logits is not None, "there are no examples to score"
    return logits.clone()


def response_scores(
    model: BaseModel,
    data: Tokens,
    batch_size: int,
    forward: Callable[[Sequence[Sequence[int]], Mapping[str, Tensor]], Tensor],
) -> dict[str, float]:
    """Mean cross-entropy of the response tokens, its exponential, and how many were the likeliest next token.

    Each response token counts once, however the texts are batched.
    """
    order = np.argsort(data.lengths, kind="stable")
    loss, hits, count = 0.0, 0, 0
    with torch.inference_mode(), precision(model.device):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size].tolist()
            inputs, labels = data.batch(rows, model.device)
            logits = forward([rows], inputs).float()
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            hits += int((logits.argmax(dim=1) == labels).sum())
            count += len(labels)
    mean = loss / count
    perplexity = math.exp(min(mean, 20.7))  # past 1e9 it says nothing more, and no message holds it
    return {"loss": mean, "perplexity": perplexity, "token_accuracy": hits / count}


def scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Mean cross-entropy, accuracy and macro-F1.

    Macro-F1 is the mean over all classes that occur as a label or a prediction, as in scikit-learn.

    Args:
        logits: [B, classes].
        labels: [B].
    """
    guess = logits.argmax(dim=1)
    loss = F.cross_entropy(logits, labels).item()
    return {
        "loss": loss,
        "accuracy": (guess == labels).float().mean().item(),
        "macro_f1": _macro_f1(labels.numpy(), guess.numpy(), logits.shape[1]),
    }


def majority_rate(labels: Any, num_labels: int) -> float:
    """Accuracy of always answering the most frequent label."""
    return float(np.bincount(labels, minlength=num_labels).max() / len(labels))


@contextlib.contextmanager
def precision(device: torch.device) -> Iterator[None]:
    """bf16 autocast on CUDA; full precision elsewhere."""
    if device.type == "cuda":
        with torch.autocast("cuda", dtype=torch.bfloat16):
            yield
    else:
        yield


def _macro_f1(labels: Any, guess: Any, num_labels: int) -> float:
    confusion = np.bincount(labels * num_labels + guess, minlength=num_labels**2)
    confusion = confusion.reshape(num_labels, num_labels)
    hits, either = np.diag(confusion), confusion.sum(0) + confusion.sum(1)
    return float((2 * hits[either > 0] / either[either > 0]).mean())
