"""A memory on a model whose weights accelerate offloads."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from models import CLOSE, backbone, logits, one_thread, remembering, tokens
from transformers import DynamicCache

from deltamem_kernels.integrations.transformers import attach_memory, memory_layers
from deltamem_kernels.nn import DeltaMemConfig
from deltamem_kernels.testing import relative_error

__all__ = ["one_thread"]


def offload(model, kind, folder):
    if kind == "cpu_offload":
        cpu_offload(model, execution_device=torch.device("cpu"))
    elif kind == "disk_offload":
        disk_offload(model, str(folder), execution_device=torch.device("cpu"))
    else:
        layers = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
        rest = {"model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "disk"}
        dispatch_model(model, {**layers, **rest}, main_device="cpu", offload_dir=str(folder), force_hooks=True)


KINDS = pytest.mark.parametrize("kind", ["cpu_offload", "disk_offload", "dispatch_model"])


@KINDS
def test_an_offloaded_model_with_a_memory_gives_the_same_logits(kind, tmp_path):
    plain = remembering(delta_heads=("q", "k", "v", "o"))
    model = copy.deepcopy(plain)
    offload(model, kind, tmp_path)
    ids = tokens(2, 12)
    assert any(weight.is_meta for weight in model.parameters())
    wanted = logits(plain, ids)
    assert relative_error(logits(model, ids), wanted) <= CLOSE
    cache = DynamicCache(config=model.config)
    parts = [logits(model, part, cache=cache) for part in (ids[:, :7], *ids[:, 7:].split(1, 1))]
    assert relative_error(torch.cat(parts, 1), wanted) <= CLOSE


@KINDS
def test_attaching_to_offloaded_weights_raises(kind, tmp_path):
    model = backbone()
    offload(model, kind, tmp_path)
    with pytest.raises(ValueError, match="meta device"):
        attach_memory(model, DeltaMemConfig())
    assert not memory_layers(model)
