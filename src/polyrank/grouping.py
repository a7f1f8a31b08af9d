"""Whether clients may share a pass of the base model: a probe of two of them, together and alone.

The pass tells whose rows are whose by their number (`fused.py`). A map that sees others than those of the
texts, in their order, would give one client's texts another's factors: XLNet hands its tokens on by place,
DeBERTa-v3 sends relative positions through the maps to queries and keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from polyrank.adapter import Adapter, new_adapter
from polyrank.data.tokens import Tokens, join
from polyrank.fused import Shares, own_heads
from polyrank.lowrank import installed
from polyrank.models.load import BaseModel, logits_of, read_head
from polyrank.models.packing import told
from polyrank.models.prefix import probe_texts

_TEXTS = ((6,), (3, 4))
"""Token counts of two clients' texts, so that texts, tokens and padded tokens differ in number."""
_CLOSE = 0.05  # relative; weights of few bits differ a little with the batch, factors of another client a lot


def why_alone(model: BaseModel, shapes: Mapping[str, tuple[int, int]]) -> str:
    """What keeps clients from sharing a pass, empty when nothing does.

    Args:
        shapes: (O, I) of the adapted maps by name.
    """
    clients = range(len(_TEXTS))
    texts = [probe_texts(model, lengths) for lengths in _TEXTS]
    adapters = [_strong(shapes, client) for client in clients]
    try:
        with torch.inference_mode():
            alone = torch.cat([_logits(model, [texts[n]], [adapters[n]]) for n in clients])
            together = _logits(model, texts, adapters)
            apart = float((alone - together).abs().max() / alone.abs().max())
    except Exception as error:  # whatever a foreign model does on the probe, it only means one by one
        return told(error)
    return "" if apart <= _CLOSE else f"logits differ by {apart:.0e}"


def _strong(shapes: Mapping[str, tuple[int, int]], seed: int) -> Adapter:
    """An adapter of one slot a map whose product is about as large as what it is added to."""
    adapter = new_adapter(shapes, form="lora", rank=1, scale=1.0, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    strong = {
        name: f.with_tensors({"A": f.A, "B": torch.randn(f.B.shape, generator=draw)})
        for name, f in adapter.modules.items()
    }
    return Adapter("lora", strong)


def _logits(model: BaseModel, texts: Sequence[Tokens], adapters: Sequence[Adapter]) -> Tensor:
    shares, joined, head = Shares(), join(texts), read_head(model)
    inputs, _ = joined.batch(range(len(joined)), model.device)
    shares.begin([own.lengths.tolist() for own in texts])
    with (
        installed(model.network, adapters, shares=shares),
        own_heads(model.network, model.head_modules, [head] * len(texts), shares),
    ):
        return logits_of(model, inputs)
