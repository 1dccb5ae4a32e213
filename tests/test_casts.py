"""A memory keeps the precision of its weights when the model is cast to 16 bits, and follows every other cast."""

from __future__ import annotations

import pytest
import torch
from models import backbone, logits, one_thread, remembering, tokens  # noqa: F401

from deltamem_kernels.integrations.transformers import attach_memory, memory_layers
from deltamem_kernels.nn import DeltaMemConfig, DeltaMemory

SIXTEEN = [torch.float16, torch.bfloat16]
CASTS = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "to float16": lambda model: model.to(torch.float16),
    "to bfloat16": lambda model: model.to(torch.bfloat16),
    "to a tensor": lambda model: model.to(torch.zeros(1, dtype=torch.bfloat16)),
    "type": lambda model: model.type(torch.bfloat16),
}
FIELDS = {"couple_lambda": False, "trainable_delta_scale": True, "delta_o_rmsnorm": True}


def weights(model) -> dict[str, torch.Tensor]:
    """The memory's weights by name, and the objects themselves, not copies."""
    return {f"{n}.{k}": w for n, layer in memory_layers(model) for k, w in layer.delta_memory.named_parameters()}


def backbone_dtypes(model) -> set[torch.dtype]:
    return {w.dtype for name, w in model.named_parameters() if ".delta_memory." not in name}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_of_the_model_to_16_bits_leaves_the_memory_float32(cast, kind):
    model = remembering(kind, **FIELDS)
    before = {name: weight.detach().clone() for name, weight in weights(model).items()}
    CASTS[cast](model)
    assert backbone_dtypes(model) <= set(SIXTEEN)
    after = weights(model)
    assert after.keys() == before.keys()
    for name, weight in after.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, before[name]), name
    read = logits(model, tokens(2, 7))
    assert read.dtype in SIXTEEN
    assert read.isfinite().all()


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_gradients_keep_their_precision_and_training_goes_on(kind):
    model, ids = remembering(kind), tokens(2, 9)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    before = {name: weight.grad.clone() for name, weight in weights(model).items() if weight.requires_grad}
    assert all(grad.any() for grad in before.values())
    model.bfloat16()
    for name, grad in before.items():
        assert torch.equal(weights(model)[name].grad, grad), name
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for name, grad in before.items():
        assert weights(model)[name].grad.dtype == torch.float32
        assert not torch.equal(weights(model)[name].grad, grad), name


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_double_converts_the_memory_and_float_converts_it_back(kind):
    model, ids = remembering(kind), tokens(2, 9)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    before = {name: (w.detach().clone(), w.grad) for name, w in weights(model).items()}
    model.double()
    assert {w.dtype for w in weights(model).values()} == {torch.float64} == backbone_dtypes(model)
    assert {w.grad.dtype for w in weights(model).values() if w.grad is not None} == {torch.float64}
    assert logits(model, ids).dtype == torch.float64
    model.bfloat16()
    assert {w.dtype for w in weights(model).values()} == {torch.float64}
    model.float()
    for name, weight in weights(model).items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, before[name][0]), name
        assert (weight.grad is None) == (before[name][1] is None)
    assert {w.grad.dtype for w in weights(model).values() if w.grad is not None} == {torch.float32}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_a_memory_that_was_attached_with_16_bits_follows_every_cast(dtype, kind):
    model = backbone(kind)
    attach_memory(model, DeltaMemConfig(output_init="base_slice"), dtype=dtype)
    for cast, expected in (
        (lambda: model.bfloat16(), torch.bfloat16),
        (lambda: model.half(), torch.float16),
        (lambda: model.float(), torch.float32),
        (lambda: model.half(), torch.float32),
    ):
        cast()
        assert {w.dtype for w in weights(model).values()} == {expected}


def test_a_move_with_a_cast_to_16_bits_moves_the_memory_and_keeps_float32():
    model = remembering().to("meta", torch.bfloat16)
    assert backbone_dtypes(model) == {torch.bfloat16}
    assert {(w.dtype, w.device.type) for w in weights(model).values()} == {(torch.float32, "meta")}
    assert all(isinstance(w, torch.nn.Parameter) for w in weights(model).values())
    model.to_empty(device="cpu")
    assert {(w.dtype, w.device.type) for w in weights(model).values()} == {(torch.float32, "cpu")}
    if torch.cuda.is_available():
        model = remembering()
        before = {name: weight.detach().clone() for name, weight in weights(model).items()}
        model.to("cuda", torch.bfloat16)
        for name, weight in weights(model).items():
            assert weight.is_cuda
            assert torch.equal(weight.cpu(), before[name]), name


def test_a_memory_of_its_own_keeps_its_precision_too():
    memory = DeltaMemory(DeltaMemConfig(), 24, {"q": 32, "k": 16, "v": 16, "o": 24}).bfloat16()
    assert {w.dtype for w in memory.parameters()} == {torch.float32}
