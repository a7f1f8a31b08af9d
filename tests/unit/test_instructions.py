"""Prompts and responses: found in any usual columns, rendered, cut, and the response alone is learned."""

from __future__ import annotations

import json
from typing import ClassVar

import numpy as np
import pytest
import torch

from polyrank.config import load_config
from polyrank.data.instructions import prompt_ids, render, tokenize_instructions
from polyrank.data.source import load_instructions
from polyrank.data.texts import Data, Texts
from polyrank.data.tokens import Tokens, join
from polyrank.errors import InputError
from tests.unit.test_data import write

QA = [{"question": f"q{i}", "answer": f"a{i}", "site": f"s{i % 3}", "label": "xy"[i % 2]} for i in range(20)]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Letters:
    """A tokenizer with a token per letter; 1 begins a text and 2 ends it."""

    model_max_length, pad_token_id, bos_token_id, eos_token_id, name_or_path = 10**6, 0, 1, 2, "letters"

    def __init__(self, template=None):
        self.chat_template = template

    all_special_ids: ClassVar = [0, 1, 2, 3]

    def __call__(self, texts, add_special_tokens=True):
        rows = [[ord(letter) for letter in text] for text in texts]
        return {"input_ids": [[1, *row, 3, 2] for row in rows] if add_special_tokens else rows}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        import jinja2

        rendered = jinja2.Template(self.chat_template)
        return rendered.render(messages=messages, add_generation_prompt=add_generation_prompt)


def text_of(ids):
    return "".join({1: "^", 2: "$"}.get(i) or chr(i) for i in ids)


def parts(tokens, row=0):
    """Prompt and response of one example as text."""
    ids = tokens.ids[tokens.starts[row] : tokens.starts[row + 1]].tolist()
    first = int(tokens.responses[row])
    return text_of(ids[:first]), text_of(ids[first:])


@pytest.mark.parametrize(
    ("row", "turns", "response"),
    [
        ({"prompt": "p", "response": "r"}, [("user", "p")], "r"),
        ({"prompt": "p", "completion": "r"}, [("user", "p")], "r"),
        ({"instruction": "do", "input": "it", "output": "r"}, [("user", "do\n\nit")], "r"),
        ({"instruction": "do", "input": "", "output": "r"}, [("user", "do")], "r"),
        ({"instruction": "do", "output": "r"}, [("user", "do")], "r"),
        ({"question": "q", "answer": "r"}, [("user", "q")], "r"),
        (
            {
                "messages": [
                    {"role": "system", "content": "be kind"},
                    {"role": "user", "content": "p"},
                    {"role": "assistant", "content": "first"},
                    {"role": "user", "content": "more"},
                    {"role": "assistant", "content": "r"},
                    {"role": "user", "content": "thanks"},
                ]
            },
            [("system", "be kind"), ("user", "p"), ("assistant", "first"), ("user", "more")],
            "r",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_usual_columns_are_found(tmp_path, kind, row, turns, response):
    corpus = load_instructions(Data(source=write(tmp_path / f"x.{kind}", [row] * 10, kind)), 0)
    assert (len(corpus.train), len(corpus.test), corpus.label_names) == (8, 2, ("texts",))
    assert corpus.train.texts[0] == tuple(turns)
    assert corpus.train.pairs[0] == response


def test_columns_by_name_groups_and_labels(tmp_path):
    source = write(tmp_path / "x.csv", QA)
    named = Data(source=source, prompt=("site", "question"), response="label")
    found = load_instructions(named, 0).train
    assert {turns[0][1] for turns in found.texts} <= {f"{row['site']}\n\n{row['question']}" for row in QA}
    assert set(found.pairs) == {"x", "y"}
    owned = load_instructions(Data(source=source), 0, group="site").train
    assert all(
        int(turns[0][1][1:]) % 3 == int(g[1]) for turns, g in zip(owned.texts, owned.groups, strict=True)
    )
    labelled = load_instructions(Data(source=source), 0, skewed="dirichlet")
    assert labelled.label_names == ("x", "y")
    assert all(
        int(t[0][1][1:]) % 2 == y for t, y in zip(labelled.train.texts, labelled.train.labels, strict=True)
    )


@pytest.mark.parametrize(
    ("rows", "options", "skewed", "complaint"),
    [
        (
            [{"a": "1", "b": "2"}],
            {},
            None,
            r"data.source = .*holds none of messages, prompt\+response.* only a, b",
        ),
        (QA, {"prompt": "questoin", "response": "answer"}, None, "data.prompt = 'questoin': no such column"),
        (QA, {"messages": "question"}, None, "data.messages = 'question': must hold lists of messages"),
        (
            [{k: r[k] for k in ("question", "answer")} for r in QA],
            {},
            "dirichlet",
            "'dirichlet': needs labels",
        ),
        (
            [{"messages": [{"role": "assistant", "content": "hi"}]}],
            {},
            None,
            "no message of the role 'assistant'",
        ),
        ([{"messages": [{"role": "robot", "content": "hi"}]}], {}, None, "'robot': unknown role"),
        ([{"messages": [{"who": "robot"}]}], {}, None, "lists of messages with role and content"),
    ],
)
def test_every_defect_is_one_clear_line(tmp_path, rows, options, skewed, complaint):
    data = Data(source=write(tmp_path / "x.jsonl", rows, "jsonl"), **options)
    with pytest.raises(InputError, match=complaint) as told:
        load_instructions(data, 0, skewed=skewed)
    assert "\n" not in str(told.value)


def test_the_built_in_texts_have_no_responses():
    with pytest.raises(InputError, match="data.source = 'docstrings': has no responses"):
        load_instructions(Data(), 0)


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("data.prompt=p", "data.prompt and data.response go together"),
        ('data={messages="m", prompt="p", response="r"}', "data.messages goes without"),
        ("task=translation", "task = 'translation': must be 'classification' or 'causal_lm'"),
    ],
)
def test_keys_that_do_not_go_together(setting, complaint):
    with pytest.raises(InputError, match=complaint):
        load_config(settings=[setting])


def test_the_task_changes_what_nobody_said():
    config = load_config(settings=["task=causal_lm", "partition.clients=7"])
    assert (config.partition.kind, config.partition.clients, config.model.max_length) == ("iid", 7, 512)
    told = load_config(settings=["task=causal_lm", "partition.kind=dirichlet", "model.max_length=9"])
    assert (told.partition.kind, told.model.max_length) == ("dirichlet", 9)
    assert load_config().partition.kind == "dirichlet"


def test_the_plain_template_and_a_chat_template():
    turns = (("system", "be kind"), ("user", "hello"))
    assert render(turns, Letters()) == "### System:\nbe kind\n\n### Instruction:\nhello\n\n### Response:\n"
    plain = tokenize_instructions(Texts([turns], ["hi"], [0]), Letters(), 200)
    assert parts(plain) == ("^" + render(turns, Letters()), "hi$")
    chat = tokenize_instructions(Texts([turns], ["hi"], [0]), Letters(TEMPLATE), 200)
    assert parts(chat) == ("<system>be kind</s><user>hello</s><assistant>", "hi</s>")
    assert text_of(prompt_ids([turns], Letters(TEMPLATE))[0]) == parts(chat)[0]
    with pytest.raises(
        InputError, match=r"chat template that refuses roles \['user'\] \(Encountered unknown tag"
    ):
        tokenize_instructions(Texts([turns[1:]], ["hi"], [0]), Letters("{% no %}"), 200)


def test_what_is_too_long_loses_the_beginning_of_its_prompt():
    def cut(limit, response="xyz"):
        return parts(tokenize_instructions(Texts([(("user", "abc"),)], [response], [0]), Letters(), limit))

    whole = "^" + render((("user", "abc"),), Letters())
    assert cut(99) == (whole, "xyz$")
    assert cut(20) == ("^" + whole[-15:], "xyz$")
    assert cut(5) == ("\n", "xyz$")
    assert cut(8, "x" * 50) == ("^\n", "xxxxxx")
    assert cut(2, "x" * 50) == ("\n", "x")


def test_a_response_is_never_empty():
    tokens = tokenize_instructions(Texts([(("user", "abc"),)], [""], [0]), Letters(), 99)
    assert parts(tokens)[1] == "$"


def small():
    """Three examples of 4, 2 and 3 tokens, of which 2, 1 and 1 respond."""
    ids = np.arange(10, 19, dtype=np.int32)
    responses = np.array([2, 1, 2])
    return Tokens(ids, None, np.array([0, 4, 6, 9]), np.zeros(3, dtype=np.int64), 0, responses)


def test_a_batch_asks_at_the_tokens_before_a_response_token():
    inputs, labels = small().batch([0, 1, 2], torch.device("cpu"))
    assert inputs["asked"].int().tolist() == [[0, 1, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0]]
    assert labels.tolist() == [12, 13, 15, 18]
    assert small().targets([0, 2]) == 3
    assert small().targets([]) == 0
    assert small().select([2, 1]).responses.tolist() == [2, 1]
    assert join([small(), small()]).batch([5, 3], torch.device("cpu"))[1].tolist() == [18, 12, 13]


def test_the_digest_and_json_of_a_corpus_hold_the_responses(tmp_path):
    from polyrank.data.texts import corpus_digest

    first = load_instructions(Data(source=write(tmp_path / "x.csv", QA)), 0)
    changed = [{**row, "answer": row["answer"] + "!"} if row["question"] == "q3" else row for row in QA]
    other = load_instructions(Data(source=write(tmp_path / "y.csv", changed)), 0)
    assert corpus_digest(first) != corpus_digest(other)
    assert json.dumps(first.train.texts)
