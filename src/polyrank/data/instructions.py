"""Instructions and their responses: their columns, how they read as one text, what is learned of it.

An example is a list of turns and the response to them. Where a tokenizer brings a chat template, that renders
them; otherwise every turn stands under a heading, and the token that ends a text follows the response:

    ### Instruction:
    How many legs have two cats?

    ### Response:
    8

Only the response is learned: loss and scores count the tokens that come after the prompt. A conversation is
learned for its last response; what stands before it is prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyrank.data.texts import Data, Texts, Turns
from polyrank.data.tokens import Tokens, tokenize
from polyrank.errors import InputError, choices, first_line

HEADINGS = {"system": "System", "user": "Instruction", "assistant": "Response"}
"""What a turn stands under where the tokenizer has no chat template."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of a table hold the examples: one of whole conversations, or prompts and responses."""

    prompt: tuple[str, ...] = ()
    response: str = ""
    messages: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.messages,) if self.messages else (*self.prompt, self.response)


KNOWN = (
    Columns(messages="messages"),
    Columns(("prompt",), "response"),
    Columns(("prompt",), "completion"),
    Columns(("instruction", "input"), "output"),
    Columns(("instruction",), "output"),
    Columns(("question",), "answer"),
)
"""Tried in this order where the config names no columns."""


def columns_of(data: Data, there: Sequence[str]) -> Columns:
    """The columns that a config names, or the first known ones that are all there.

    Raises: InputError when none are.
    """
    if data.messages is not None:
        return Columns(messages=data.messages)
    if data.prompt is not None and data.response is not None:
        prompt = (data.prompt,) if isinstance(data.prompt, str) else tuple(data.prompt)
        return Columns(prompt, data.response)
    for columns in KNOWN:
        if set(columns.names) <= set(there):
            return columns
    known = ", ".join("+".join(columns.names) for columns in KNOWN)
    allowed = f"holds none of {known}, only {', '.join(there)}; name columns by data.prompt and data.response"
    raise InputError("data.source", data.source, allowed)


def from_columns(prompts: Sequence[Sequence[str]], responses: Sequence[str]) -> tuple[list[Turns], list[str]]:
    """Turns and responses of a table with a column per part of the prompt; empty parts are left out."""
    joined = ["\n\n".join(part for part in parts if part.strip()) for parts in zip(*prompts, strict=True)]
    return [(("user", prompt),) for prompt in joined], list(responses)


def from_messages(conversations: Sequence[Any], column: str) -> tuple[list[Turns], list[str]]:
    """Turns and responses of a column of conversations; what follows the last response is left out.

    Raises: InputError when a conversation has no response to anything, or is no list of messages.
    """
    turns, responses = list[Turns](), list[str]()
    for number, messages in enumerate(conversations, 1):
        if not isinstance(messages, list | tuple | None):
            raise _no_messages(column, number)
        spoken = [_turn(message, column, number) for message in messages or ()]
        last = max((place for place, (role, _) in enumerate(spoken) if role == "assistant"), default=0)
        if last == 0:
            allowed = f"text {number} (from 1) has no message of the role 'assistant' after another"
            raise InputError("data.messages", column, allowed)
        turns.append(tuple(spoken[:last]))
        responses.append(spoken[last][1])
    return turns, responses


def _turn(message: Any, column: str, number: int) -> tuple[str, str]:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise _no_messages(column, number)
    role, content = message["role"], message["content"]
    if not isinstance(role, str | None) or not isinstance(content, str | None):
        raise _no_messages(column, number)
    if role not in HEADINGS:
        raise InputError("data.messages", role, f"unknown role; {choices('', HEADINGS)}")
    return role, content or ""


def _no_messages(column: str, number: int) -> InputError:
    allowed = f"must hold lists of messages with role and content, which text {number} (from 1) does not"
    return InputError("data.messages", column, allowed)


def render(turns: Turns, tokenizer: Any) -> str:
    """The prompt as the model reads it, up to where its response begins.

    Raises: InputError when the chat template refuses the turns.
    """
    if tokenizer.chat_template is None:
        return "".join(_plain(role, text) for role, text in turns) + f"### {HEADINGS['assistant']}:\n"
    return _templated(turns, tokenizer, add_generation_prompt=True)


def prompt_ids(prompts: Sequence[Turns], tokenizer: Any) -> list[list[int]]:
    """The token ids of some prompts; a plain one begins as the tokenizer begins its texts, and has no end."""
    plain = tokenizer.chat_template is None
    texts = [render(turns, tokenizer) for turns in prompts]
    rows: list[list[int]] = tokenizer(texts, add_special_tokens=plain)["input_ids"]
    special = set(tokenizer.all_special_ids) if plain else set()
    return [row[: _end(row, special)] for row in rows]


def _end(row: Sequence[int], special: set[int]) -> int:
    """Where the special tokens begin that the tokenizer put behind a text."""
    end = len(row)
    while end > 1 and row[end - 1] in special:
        end -= 1
    return end


def tokenize_instructions(texts: Texts, tokenizer: Any, max_length: int) -> Tokens:
    """Encode all examples, each cut to ``max_length`` tokens.

    What is too long loses the beginning of its prompt (but not the token that begins a text) down to a
    quarter of the length, and then the end of its response.
    """
    limit = min(max_length, tokenizer.model_max_length)
    turns = [prompt for prompt in texts.texts if not isinstance(prompt, str)]
    assert texts.pairs is not None
    prompts, answers = prompt_ids(turns, tokenizer), _response_ids(turns, texts.pairs, tokenizer)
    bos = tokenizer.bos_token_id
    cut = [_cut(prompt, answer, limit, bos) for prompt, answer in zip(prompts, answers, strict=True)]
    return Tokens(
        np.concatenate([np.asarray(prompt + answer, dtype=np.int32) for prompt, answer in cut]),
        None,
        np.cumsum([0, *(len(prompt) + len(answer) for prompt, answer in cut)]),
        np.asarray(texts.labels, dtype=np.int64),
        int(tokenizer.pad_token_id),
        np.asarray([len(prompt) for prompt, _ in cut], dtype=np.int64),
    )


ENCODERS: Mapping[str, Callable[[Texts, Any, int], Tokens]] = {
    "classification": tokenize,
    "causal_lm": tokenize_instructions,
}
"""By task."""


def _response_ids(prompts: Sequence[Turns], responses: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """The token ids that are learned: each response and what ends it; never none."""
    spoken = [_spoken(turns, text, tokenizer) for turns, text in zip(prompts, responses, strict=True)]
    rows = tokenizer([text for text, _ in spoken], add_special_tokens=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    whole = [row if ended else row + end for row, (_, ended) in zip(rows, spoken, strict=True)]
    return [row or [int(tokenizer.pad_token_id)] for row in whole]


def _spoken(turns: Turns, response: str, tokenizer: Any) -> tuple[str, bool]:
    """A response as it follows its prompt, and whether the chat template has ended it."""
    if tokenizer.chat_template is None:
        return response, False
    prompt = _templated(turns, tokenizer, add_generation_prompt=True)
    whole = _templated((*turns, ("assistant", response)), tokenizer, add_generation_prompt=False)
    if whole.startswith(prompt) and len(whole) > len(prompt):
        return whole[len(prompt) :], True
    return response, False


def _cut(prompt: list[int], answer: list[int], limit: int, bos: int | None) -> tuple[list[int], list[int]]:
    answer = answer[: limit - min(len(prompt), max(1, limit // 4))]
    return cut_prompt(prompt, limit - len(answer), bos), answer


def cut_prompt(prompt: list[int], room: int | None, bos: int | None) -> list[int]:
    """A prompt without so much of its beginning that it fits; the token that begins a text stays."""
    if room is None or len(prompt) <= room:
        return prompt
    if prompt[0] == bos and room > 1:
        return [prompt[0], *prompt[len(prompt) - room + 1 :]]
    return prompt[len(prompt) - room :]


def _plain(role: str, text: str) -> str:
    return f"### {HEADINGS[role]}:\n{text}\n\n"


def _templated(turns: Turns, tokenizer: Any, *, add_generation_prompt: bool) -> str:
    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template is a program of its own, and says itself what it refuses
        allowed = (
            f"has a chat template that refuses roles {[role for role, _ in turns]} ({first_line(error)})"
        )
        raise InputError("model.name", tokenizer.name_or_path, allowed) from error
    return text
