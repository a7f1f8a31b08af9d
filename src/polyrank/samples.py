"""samples.json: what a language model says to some test prompts before the first round and after the last."""

from __future__ import annotations

from polyrank.adapter import restrict
from polyrank.assemble import Experiment
from polyrank.client import keep_up
from polyrank.config import Config
from polyrank.generation import exact_match, respond
from polyrank.ledger import RunFolder
from polyrank.state import ServerState

SAMPLES = "samples.json"


def begin_samples(experiment: Experiment, folder: RunFolder) -> None:
    """Write down the prompts, the responses of the data, and those of the model a run starts from."""
    if not _asked(experiment.config):
        return
    test, count = experiment.corpus.test, experiment.config.evaluation.responses
    assert test.pairs is not None
    said = _responses(experiment, experiment.start)
    rows = zip(test.texts[:count], test.pairs[:count], said, strict=True)
    folder.write(
        SAMPLES,
        [{"prompt": turns[-1][1], "response": text, "before": before} for turns, text, before in rows],
    )


def end_samples(experiment: Experiment, folder: RunFolder, state: ServerState) -> dict[str, float]:
    """Add what the final model says; returns shares of right final numbers where the answers have some."""
    if not _asked(experiment.config):
        return {}
    said = _responses(experiment, state)
    rows = [{**row, "after": text} for row, text in zip(folder.read(SAMPLES), said, strict=True)]
    folder.write(SAMPLES, rows)
    found, expected = {}, [row["response"] for row in rows]
    for name, when in (("exact_match_before", "before"), ("exact_match", "after")):
        if (share := exact_match([row[when] for row in rows], expected)) is not None:
            found[name] = share
    return found


def _asked(config: Config) -> bool:
    return config.task == "causal_lm" and config.evaluation.responses > 0


def _responses(experiment: Experiment, state: ServerState) -> list[str]:
    keep_up(experiment.model, state.folds)
    table, test = experiment.config.evaluation, experiment.corpus.test
    adapter, longest = restrict(state.adapter, state.active), experiment.config.model.max_length
    prompts = [turns for turns in test.texts[: table.responses] if not isinstance(turns, str)]
    return respond(experiment.model, adapter, prompts, table.max_new_tokens, longest)
