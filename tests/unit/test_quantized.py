"""Language models whose weights are int8 on a CPU; skipped without torchao (`make quantized` installs it)."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from polyrank.errors import InputError
from polyrank.models.speaker import load_speaker
from polyrank.session import ClientEnv, train
from tests.builders import largest_difference
from tests.conftest import CPU, stored_speaker
from tests.unit.test_client import prompts, task_for

pytest.importorskip("torchao")


def test_a_base_of_int8_weights_trains_an_fp32_adapter(tmp_path):
    """A quarter of the bytes inside the blocks, and an adapter close to that of the wide base."""
    name = stored_speaker("llama", tmp_path)
    wide, narrow = load_speaker(name, CPU), load_speaker(name, CPU, bits="8bit")
    assert (narrow.packs, narrow.digest) == (True, wide.digest)
    weight = narrow.network.get_submodule("model.layers.1.mlp.up_proj").weight
    assert (weight.qdata.dtype, weight.qdata.shape) == (torch.int8, weight.shape)
    upper = "model.layers.1.self_attn.q_proj"
    data, task = prompts(8), task_for(wide, only=upper, optimizer="sgd", learning_rate=1.0, local_steps=8)
    reference = train(task, ClientEnv(wide, data)).adapter
    update = train(task, ClientEnv(narrow, data))
    moved = largest_difference(reference, task.adapter)
    assert 0 < largest_difference(update.adapter, reference) < 0.1 * moved
    assert {t.dtype for f in update.adapter.modules.values() for t in f.tensors().values()} == {torch.float32}


def test_maps_that_torchao_does_not_know_are_told_in_one_line(tmp_path):
    with pytest.raises(InputError, match="model.quantize = '8bit': needs CUDA for a model whose maps"):
        load_speaker(stored_speaker("gpt2", tmp_path), CPU, bits="8bit")


def test_a_library_that_looks_for_gpu_kernels_keeps_it_to_itself():
    done = subprocess.run([sys.executable, "-c", "import polyrank.export"], capture_output=True, check=True)
    assert done.stderr == b""
