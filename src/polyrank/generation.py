"""Responses in a model's own words, and whether their final number is the right one."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from polyrank.adapter import Adapter
from polyrank.data.instructions import cut_prompt, prompt_ids
from polyrank.data.texts import Turns
from polyrank.errors import InputError
from polyrank.evaluation import precision
from polyrank.lowrank import installed
from polyrank.models.load import BaseModel, quiet

_MARK = "####"
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def respond(
    model: BaseModel,
    adapter: Adapter,
    prompts: Sequence[Turns],
    max_new_tokens: int,
    max_length: int | None = None,
    batch_size: int = 8,
) -> list[str]:
    """What base model + adapter say to some prompts, always the likeliest next token.

    Args:
        max_new_tokens: where a response is cut that does not end by itself.
        max_length: tokens of a prompt; a longer one loses its beginning as in training, and so does one that
            leaves the response no room among the model's positions.
        batch_size: prompts that go through the model together, padded on the left.

    Raises: InputError when so many new tokens leave a prompt no room at all.
    """
    said, room, bos = list[str](), _room(model, max_new_tokens, max_length), model.tokenizer.bos_token_id
    with installed(model.network, [adapter]), torch.inference_mode(), precision(model.device), quiet():
        for start in range(0, len(prompts), batch_size):
            rows = prompt_ids(prompts[start : start + batch_size], model.tokenizer)
            said += _continued(model, [cut_prompt(row, room, bos) for row in rows], max_new_tokens)
    return said


def _room(model: BaseModel, max_new_tokens: int, max_length: int | None) -> int | None:
    """Tokens that a prompt may have; None without any limit."""
    positions: int | None = getattr(model.network.config, "max_position_embeddings", None)
    if positions is None:
        return max_length
    if max_new_tokens >= positions:
        allowed = f"at most {positions - 1}, which leaves a prompt one of the model's {positions} positions"
        raise InputError("max_new_tokens", max_new_tokens, allowed)
    return min(positions - max_new_tokens, max_length or positions)


def _continued(model: BaseModel, rows: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
    longest, pad = max(map(len, rows)), int(model.tokenizer.pad_token_id)
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows])
    seen = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    found = model.network.generate(
        input_ids=ids.to(model.device),
        attention_mask=seen.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=_ends(model),
    )
    texts: list[str] = model.tokenizer.batch_decode(found[:, longest:], skip_special_tokens=True)
    return [text.strip() for text in texts]


def _ends(model: BaseModel) -> list[int] | None:
    """The tokens that end a response: those of the checkpoint, and the tokenizer's."""
    known = model.network.generation_config.eos_token_id
    ends = {*(known if isinstance(known, list) else [known]), model.tokenizer.eos_token_id} - {None}
    return sorted(ends) or None


def final_number(text: str) -> float | None:
    """The number after ``####``, as GSM8K marks its answers, or the last one where nothing is marked."""
    marked = text.rpartition(_MARK)[2] if _MARK in text else text
    numbers = _NUMBER.findall(marked)
    if not numbers:
        return None
    chosen = numbers[0] if _MARK in text else numbers[-1]
    return float(chosen.replace(",", ""))


def exact_match(said: Sequence[str], expected: Sequence[str]) -> float | None:
    """Share of responses with the right final number; None where not every answer is marked by ``####``."""
    answers = [final_number(text) if _MARK in text else None for text in expected]
    if not answers or None in answers:
        return None
    right = sum(final_number(text) == answer for text, answer in zip(said, answers, strict=True))
    return right / len(answers)
