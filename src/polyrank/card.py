"""The card beside an exported model: what it is, how it was made, on what data, and how good it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyrank import durable
from polyrank.config import Config
from polyrank.measures import judged
from polyrank.models.load import BaseModel, public_name
from polyrank.recipes import recipe
from polyrank.report import dotted

_CLASSES = {"classification": "AutoModelForSequenceClassification", "causal_lm": "AutoModelForCausalLM"}
_PRIVATE = ("data.source", "data.test", "model.name", "fleet.name")


def write_card(
    path: Path, model: BaseModel, config: Config, facts: tuple[Mapping[str, Any], Mapping[str, Any]]
) -> None:
    """Write README.md into an exported folder.

    Args:
        facts: what summary.json and partition.json hold.
    """
    summary, partition = facts
    merged = not (path / "adapter_config.json").exists()
    method, rounds = recipe(config.method), summary["rounds"]
    text = f"""{_front(model, merged)}
# {"Model" if merged else "Low-rank adapter"}, fine-tuned across devices with polyrank

**Method**: {method.title} (`{config.method}`; {method.paper}), {rounds} rounds, seed {config.seed}.

**Data**: {_data(config, partition)}

**Result on the test texts**: {_result(summary)}

{_usage(model, merged)}
<details><summary>Settings that are not the defaults</summary>

{_settings(config)}

</details>
"""
    durable.write(path / "README.md", text.encode())


def _front(model: BaseModel, merged: bool) -> str:
    library = "transformers" if merged else "peft"
    return f"""---
library_name: {library}
base_model: {public_name(model.source)}
tags: [polyrank, lora, federated]
---"""


def _data(config: Config, partition: Mapping[str, Any]) -> str:
    source = config.data.source
    shown = source if source.startswith("hub:") else Path(source).name
    sizes = [client["num_train"] for client in partition["clients"]]
    spread = f"{min(sizes)} to {max(sizes)}" if min(sizes) < max(sizes) else f"{sizes[0]}"
    labels = "" if len(partition["labels"]) < 2 else f" Labels: {', '.join(partition['labels'])}."
    private = "" if config.privacy is None else f" Differential privacy: {config.privacy.model_dump()}."
    return (
        f"`{shown}`, {sum(sizes)} train texts on {len(sizes)} clients ({spread} each, "
        f"{config.partition.kind}), {partition['num_test']} test texts. Texts stayed with their clients; "
        f"what they trained was averaged.{labels}{private}"
    )


def _result(summary: Mapping[str, Any]) -> str:
    numbers = [f"loss {summary['test_loss']:.4f}"]
    numbers += [f"{m.title} {summary[m.on_test]:.4f}" for m in judged(summary)]
    known = {"majority_rate": "always the most frequent label", "exact_match": "right final number"}
    numbers += [f"{name} {summary[key]:.4f}" for key, name in known.items() if key in summary]
    return ", ".join(numbers) + "."


def _usage(model: BaseModel, merged: bool) -> str:
    kind, name = _CLASSES[model.task], public_name(model.source)
    if merged:
        return f"""```python
from transformers import {kind}

model = {kind}.from_pretrained("path/of/this/folder")
```
"""
    labels = f", num_labels={len(model.network.config.id2label)}" if model.task == "classification" else ""
    return f"""```python
from peft import PeftModel
from transformers import {kind}

base = {kind}.from_pretrained("{name}"{labels})
model = PeftModel.from_pretrained(base, "path/of/this/folder")
```
"""


def _settings(config: Config) -> str:
    """No paths of the machine that trained it."""
    defaults = dotted(Config(task=config.task).model_dump(mode="json"))
    own = dotted(config.model_dump(mode="json"))
    lines = [f"- `{k} = {v}`" for k, v in own.items() if defaults.get(k) != v and k not in _PRIVATE]
    return "\n".join(lines) or "none"
