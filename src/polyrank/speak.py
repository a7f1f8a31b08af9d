"""`polyrank generate`: the language model of a finished run responds to prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from polyrank.assemble import load_model
from polyrank.checkpoint import STATE_FILE, load_state
from polyrank.errors import InputError
from polyrank.export import read_config, served_adapter
from polyrank.generation import respond
from polyrank.ledger import RunFolder
from polyrank.models.load import pick_device


def speak(run: Path, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """The responses of a run's model, each to one prompt, always the likeliest next token.

    Raises: InputError when the run is not finished, classifies texts, or leaves a prompt no room.
    """
    folder = RunFolder(run)
    folder.read("summary.json")  # told as not finished when it is not there
    config = read_config(folder)
    if config.task != "causal_lm":
        raise InputError("RUN", str(run), f"has task = {config.task!r}; only 'causal_lm' responds to prompts")
    model, state = load_model(config, (), pick_device(config.device)), load_state(run / STATE_FILE)
    turns = [(("user", prompt),) for prompt in prompts]
    return respond(model, served_adapter(state), turns, max_new_tokens, config.model.max_length)
