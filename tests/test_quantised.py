"""A memory on a backbone that torchao quantised to int8 weights."""

from __future__ import annotations

import copy

import pytest
import torch
from models import CLOSE, backbone, logits, one_thread, remembering, states_of, tokens
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import DynamicCache

from deltamem_kernels.integrations.transformers import attach_memory, load_adapter, memory_layers, save_adapter
from deltamem_kernels.nn import DeltaMemConfig
from deltamem_kernels.testing import relative_error

__all__ = ["one_thread"]


def rounded(model):
    """Return a plain copy of a model whose linear weights are rounded as torchao rounds them."""
    quantised, copied = copy.deepcopy(model), copy.deepcopy(model)
    quantize_(quantised, Int8WeightOnlyConfig())
    with torch.no_grad():
        for name, module in copied.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(quantised.get_submodule(name).weight.dequantize())
    return copied


@pytest.mark.parametrize("order", ["before the memory", "after the memory"])
def test_a_quantised_backbone_gives_what_its_rounded_weights_give(order, tmp_path):
    plain = backbone()
    expected, model = rounded(plain), copy.deepcopy(plain)
    save_adapter(remembering(delta_heads=("q", "k", "v", "o")), tmp_path)
    load_adapter(expected, tmp_path)
    if order == "before the memory":
        quantize_(model, Int8WeightOnlyConfig())
        load_adapter(model, tmp_path)
    else:
        load_adapter(model, tmp_path)
        quantize_(model, Int8WeightOnlyConfig())
    for projection in ("q_proj", "o_proj"):
        assert type(getattr(model.model.layers[0].self_attn, projection).weight.data) is not torch.Tensor
    for (_, found), (_, wanted) in zip(memory_layers(model), memory_layers(expected), strict=True):
        for name, weight in wanted.delta_memory.named_parameters():
            kept = found.delta_memory.get_parameter(name)
            assert type(kept.data) is torch.Tensor, name
            assert kept.dtype == torch.float32
            assert torch.equal(kept, weight), name
    ids = tokens(2, 12)
    wanted = logits(expected, ids)
    assert relative_error(logits(rounded(plain), ids), wanted) > 100 * CLOSE
    assert relative_error(logits(model, ids), wanted) <= CLOSE
    cache = DynamicCache(config=model.config)
    parts = [logits(model, part, cache=cache) for part in (ids[:, :7], *ids[:, 7:].split(1, 1))]
    assert relative_error(torch.cat(parts, 1), wanted) <= CLOSE
    assert all(state.any() for state in states_of(cache).values())


def test_correction_weights_start_from_slices_of_the_dequantised_weights():
    config = DeltaMemConfig(output_init="base_slice")
    plain = backbone()
    expected, model = rounded(plain), copy.deepcopy(plain)
    quantize_(model, Int8WeightOnlyConfig())
    for each in (expected, model):
        attach_memory(each, config)
    for (_, found), (_, wanted) in zip(memory_layers(model), memory_layers(expected), strict=True):
        for head in "qkvo":
            weight = getattr(wanted.delta_memory, f"delta_{head}_proj")
            assert weight.any()
            assert torch.equal(getattr(found.delta_memory, f"delta_{head}_proj"), weight)
