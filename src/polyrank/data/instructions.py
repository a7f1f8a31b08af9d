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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyrank.data.texts import Data, Texts, Turns
from polyrank.data.tokens import Tokens
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
        allowed = f"must hold lists of messages with role and content, which text {number} (from 1) does not"
        raise InputError("data.messages", column, allowed)
    if message["role"] not in HEADINGS:
        raise InputError("data.messages", message["role"], f"unknown role; {choices('', HEADINGS)}")
    return message["role"], message["content"] or ""


def render(turns: Turns, tokenizer: Any) -> str:
    """The prompt as the model reads it, up to where its response begins.

    Raises: InputError when the chat template refuses the turns.
    """
    if tokenizer.chat_template is None:
        return "".join(_plain(role, text) for role, text in turns) + f"### {HEADINGS['assistant']}:\n"
    return _templated(turns, tokenizer, add_generation_prompt=True)


def prompt_ids(turns: Turns, tokenizer: Any) -> list[int]:
    """The token ids of a prompt; a plain one begins as the tokenizer begins its texts."""
    plain, text = tokenizer.chat_template is None, render(turns, tokenizer)
    ids: list[int] = tokenizer(text, add_special_tokens=plain)["input_ids"]
    return ids[:-1] if plain and ids and ids[-1] == tokenizer.eos_token_id else ids


def tokenize_instructions(texts: Texts, tokenizer: Any, max_length: int) -> Tokens:
    """Encode all examples, each cut to ``max_length`` tokens.

    What is too long loses the beginning of its prompt (but not the token that begins a text) down to a
    quarter of the length, and then the end of its response.
    """
    limit = min(max_length, tokenizer.model_max_length)
    rows, firsts = list[list[int]](), list[int]()
    assert texts.pairs is not None
    for turns, response in zip(texts.texts, texts.pairs, strict=True):
        assert not isinstance(turns, str)
        prompt = prompt_ids(turns, tokenizer)
        prompt, answer = _cut(
            prompt, _response_ids(turns, response, tokenizer), limit, tokenizer.bos_token_id
        )
        rows.append(prompt + answer)
        firsts.append(len(prompt))
    return Tokens(
        np.concatenate([np.asarray(row, dtype=np.int32) for row in rows]),
        None,
        np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64),
        np.asarray(texts.labels, dtype=np.int64),
        int(tokenizer.pad_token_id),
        np.asarray(firsts, dtype=np.int64),
    )


def _response_ids(turns: Turns, response: str, tokenizer: Any) -> list[int]:
    """The token ids that are learned: the response and what ends it; never none."""
    if tokenizer.chat_template is not None:
        prompt = _templated(turns, tokenizer, add_generation_prompt=True)
        whole = _templated((*turns, ("assistant", response)), tokenizer, add_generation_prompt=False)
        if whole.startswith(prompt) and len(whole) > len(prompt):
            ids: list[int] = tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
            return ids
    ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    ended = ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]
    return ended or [int(tokenizer.pad_token_id)]


def _cut(prompt: list[int], answer: list[int], limit: int, bos: int | None) -> tuple[list[int], list[int]]:
    answer = answer[: limit - min(len(prompt), max(1, limit // 4))]
    room = limit - len(answer)
    if len(prompt) <= room:
        return prompt, answer
    if prompt[0] == bos and room > 1:
        return [prompt[0], *prompt[len(prompt) - room + 1 :]], answer
    return prompt[len(prompt) - room :], answer


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
