"""On the device: bytes -> local training -> bytes. The same functions on every engine.

`handle` is the whole client. Read it first; `session.py` holds the training itself.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

from polyrank.adapter import Adapter, fingerprint, num_slots
from polyrank.evaluation import evaluate
from polyrank.lowrank import fold
from polyrank.messages import ClientScores, EvaluateTask, Folds, TrainTask
from polyrank.models.load import BaseModel
from polyrank.models.prefix import trains_below
from polyrank.session import ClientEnv, ClientError, session_depth, train_together
from polyrank.wire import WireError, decode_task, encode_scores, encode_update


class MissingFoldsError(ClientError):
    """The server believes that this device has folds which it does not have, e.g. after a restart."""


def handle(request: bytes, env: ClientEnv) -> bytes:
    """Answer one request of the server.

    Raises:
        WireError: the request is not a task.
        ClientError: the task could not be done.
    """
    (answer,) = answer_together([request], [env])
    if isinstance(answer, Exception):
        raise answer
    return answer


def answer_together(
    requests: Sequence[bytes], environments: Sequence[ClientEnv]
) -> list[bytes | ClientError | WireError]:
    """The answer of each of some clients that share one resident base model, or why there is none.

    Training tasks that run the same steps from the same block upward go through the model as one.
    """
    answers: dict[int, bytes | ClientError | WireError] = {}
    groups: dict[Hashable, list[tuple[int, TrainTask]]] = {}
    for place, (request, env) in enumerate(zip(requests, environments, strict=True)):
        try:
            task = decode_task(request)
            catch_up(env.model, env.folds, task.folds)
            if isinstance(task, TrainTask):
                if not task.head and not num_slots(task.trained):
                    raise ClientError("the task has nothing to train: no slot and no head")
                groups.setdefault(_group(place, task, env), []).append((place, task))
            else:
                answers[place] = encode_scores(score(task, env))
        except (ClientError, WireError) as error:
            answers[place] = error
    for group in groups.values():
        tasks = [task for _, task in group]
        results = train_together(tasks, [environments[place] for place, _ in group])
        for (place, task), result in zip(group, results, strict=True):
            answers[place] = result if isinstance(result, ClientError) else encode_update(result, task)
    return [answers[place] for place in range(len(requests))]


def _group(place: int, task: TrainTask, env: ClientEnv) -> Hashable:
    """Tasks of one group may train in one pass; one that draws its own random numbers stays alone."""
    training, inside = task.training, tuple(f"{block}." for block in env.model.blocks)
    trains_inside = any(n.startswith(inside) for n in env.model.head_modules) or trains_below(env.model)
    if training.adapter_dropout > 0 or training.base_dropout or trains_inside:
        return place
    # each client votes for a number of its own
    ballot = None if task.ballot is None else replace(task.ballot, budget=0)
    return training.model_dump_json(), ballot, session_depth(task, env)


def score(task: EvaluateTask, env: ClientEnv) -> ClientScores:
    """Score the adapter and head on the client's held-out examples.

    Raises: ClientError when it has none.
    """
    if env.holdout is None or len(env.holdout) == 0:
        raise ClientError("the client keeps no examples aside for evaluation")
    size = task.batch_size
    metrics = evaluate(env.model, task.adapter, task.head, env.holdout, size, env.prefix)
    return ClientScores(task.round, task.client, len(env.holdout), metrics)


def catch_up(model: BaseModel, received: list[str], folds: Folds) -> None:
    """Add the folds that a device has missed to its frozen weights, each exactly once.

    Clients that share one resident model share its folds; each still keeps its own list, so that a
    fold the server forgot to send is found out.

    Args:
        received: fingerprints of the folds this device got; grows in place.

    Raises: ClientError when a fold is missing or is not the one that came before.
    """
    if folds.first > len(received):
        raise MissingFoldsError(f"folds {len(received)} to {folds.first - 1} never came")
    for number, adapter in enumerate(folds.adapters, folds.first):
        name = fingerprint(adapter)
        if number < len(received) and received[number] != name:
            raise ClientError(f"fold {number} is not the one that came before")
        if number == len(received):
            received.append(name)
        if number == len(model.folded):
            fold(model.network, adapter)
            model.folded.append(name)
    if model.folded != received:
        raise MissingFoldsError(
            f"the base model holds {len(model.folded)} folds, this client {len(received)}"
        )


def keep_up(model: BaseModel, folds: Sequence[Adapter]) -> None:
    """Add what the server's own copy of the model lacks of all folds so far.

    Raises: MissingFoldsError when it is ahead of them.
    """
    known = model.folded[: len(folds)]
    catch_up(model, known, Folds(len(known), folds[len(known) :]))
