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
_PATHS = ("data.source", "data.test", "model.name", "fleet.name")


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
{_privacy(config, summary)}
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
base_model: {_base_name(model)}
tags: [polyrank, lora, federated]
---"""


def _base_name(model: BaseModel) -> str:
    """A hub id, or the last part of a folder's path."""
    name = public_name(model.source)
    path = Path(name)
    return path.name if path.is_absolute() or path.is_dir() else name


def _data(config: Config, partition: Mapping[str, Any]) -> str:
    source = config.data.source
    shown = source if source.startswith("hub:") else Path(source).name
    labels = "" if len(partition["labels"]) < 2 else f" Labels: {', '.join(partition['labels'])}."
    return (
        f"`{shown}`, {_train_texts(config, partition)}, {partition['num_test']} test texts. "
        f"Texts stayed with their clients; what they trained was averaged.{labels}"
    )


def _train_texts(config: Config, partition: Mapping[str, Any]) -> str:
    """Who had how many texts; of a private run only what may be told: the number of clients."""
    sizes, kind = [client["num_train"] for client in partition["clients"]], config.partition.kind
    if config.privacy is not None:
        return f"texts of {len(sizes)} clients ({kind})"
    spread = f"{min(sizes)} to {max(sizes)}" if min(sizes) < max(sizes) else f"{sizes[0]}"
    return f"{sum(sizes)} train texts on {len(sizes)} clients ({spread} each, {kind})"


def _privacy(config: Config, summary: Mapping[str, Any]) -> str:
    """What was spent, which is what holds, not what might have been."""
    if config.privacy is None:
        return ""
    weak = "" if config.privacy.noise_seed is None else "; its noise follows from a number in the config"
    spent = f"epsilon {summary['epsilon']:.4g} at delta {summary['delta']:g} for each client{weak}"
    return f"\n**Differential privacy**: {spent}.\n"


def _result(summary: Mapping[str, Any]) -> str:
    numbers = [f"loss {summary['test_loss']:.4f}"]
    numbers += [f"{m.title} {summary[m.on_test]:.4f}" for m in judged(summary)]
    known = {"majority_rate": "always the most frequent label", "exact_match": "right final number"}
    numbers += [f"{name} {summary[key]:.4f}" for key, name in known.items() if key in summary]
    return ", ".join(numbers) + "."


def _usage(model: BaseModel, merged: bool) -> str:
    kind, name = _CLASSES[model.task], _base_name(model)
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
    """No paths of the machine that trained it, and nothing else of that machine."""
    defaults = dotted(Config(task=config.task).model_dump(mode="json"))
    own = dotted(config.model_dump(mode="json"))
    apart = {k: v for k, v in own.items() if defaults.get(k) != v and not k.startswith("engine.")}
    lines = [f"- `{key} = {value}`" for key, value in apart.items() if key not in _PATHS]
    return "\n".join(lines) or "none"
