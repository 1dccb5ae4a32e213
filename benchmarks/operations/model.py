"""Whole models and one attention layer, frozen and with a memory: prefill, decoding, and a training step.

T = 1 is one decoding step after CACHED tokens, always from the same cache. Larger T is a prefill that ends with the
last token's logits. A training step is the forward, the loss of all tokens, and the backward to the memory's weights
and to the embeddings. Real training needs no gradient of the embeddings; here it gives the frozen model a backward to
compare with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import QWEN3_4B, SMOLLM2, TINY_QWEN3, Backbone, frozen, model, upstream_why_not
from ..registry import Implementation, Operation, Shape, Tensors

KINDS = ("frozen", "ours", "upstream", "upstream, patched")
CACHED = 512


def _inputs(backbone: Backbone, shape: Shape) -> Tensors:
    """Return the embeddings of random tokens `[B, T, hidden]`, and the tokens `[B, T]`."""
    ids = torch.randint(backbone.vocabulary, (shape.batch, shape.tokens), generator=torch.Generator().manual_seed(5))
    ids = ids.to(shape.device)
    return {"x": frozen(backbone, shape.dtype, shape.device).get_input_embeddings()(ids), "ids": ids}


def _layer_inputs(backbone: Backbone, shape: Shape) -> Tensors:
    x = torch.randn(shape.batch, shape.tokens, backbone.hidden, generator=torch.Generator().manual_seed(5))
    return {"x": x.to(shape.device, shape.dtype)}


def _forward(kind: str, backbone: Backbone, inputs: Tensors, shape: Shape) -> Tensors:
    llm, x = model(kind, backbone, shape), inputs["x"]
    if shape.tokens > 1:
        _reset_states(kind, llm)
        cache = _new_cache(llm)
    else:
        cache = _cached_context(kind, backbone, shape)
    return {"logits": llm(inputs_embeds=x, use_cache=True, logits_to_keep=1, **_cache_argument(llm, cache)).logits}


def _training(kind: str, backbone: Backbone, inputs: Tensors, shape: Shape) -> Tensors:
    llm, x = model(kind, backbone, shape), inputs["x"]
    ids = inputs["ids"].to(x.device, torch.int64)
    _reset_states(kind, llm)
    logits = llm(inputs_embeds=x, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    trained = [p for p in llm.parameters() if p.requires_grad]
    d_x, *_ = torch.autograd.grad(loss, [x, *trained], allow_unused=True)
    return {"loss": loss, "d_x": d_x}


def _attention(kind: str, backbone: Backbone, inputs: Tensors, shape: Shape) -> Tensors:
    llm, cache, first = model(kind, backbone, shape), None, 0
    if shape.tokens > 1:
        _reset_states(kind, llm)
    else:
        cache, first = _cached_context(kind, backbone, shape), CACHED
    rotary = _rotary(backbone, first, shape.tokens, shape.dtype, shape.device)
    attention = llm.model.layers[0].self_attn
    options = {"position_embeddings": rotary, "attention_mask": None, **_cache_argument(attention, cache)}
    return {"out": attention(inputs["x"], **options)[0]}


@functools.cache
def _rotary(backbone: Backbone, first: int, tokens: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    positions = torch.arange(first, first + tokens, device=device)[None]
    return frozen(backbone, dtype, device).model.rotary_emb(torch.zeros(1, dtype=dtype, device=device), positions)


def _cached_context(kind: str, backbone: Backbone, shape: Shape):
    """Return the cache of CACHED tokens, with its original keys and values.

    The memory's state is not restored, since the cost of a step does not depend on it.
    """
    cache, original = _make_context(kind, backbone, shape)
    for layer, (keys, values) in zip(cache.layers, original, strict=True):
        layer.keys, layer.values = keys, values
    return cache


@functools.cache
def _make_context(kind: str, backbone: Backbone, shape: Shape):
    """Return a cache of CACHED tokens, and its keys and values, which calls replace but never modify."""
    llm = model(kind, backbone, shape)
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(backbone.vocabulary, (shape.batch, CACHED), generator=generator).to(shape.device)
    _reset_states(kind, llm)
    cache = _new_cache(llm)
    llm(input_ids=ids, use_cache=True, logits_to_keep=1, **_cache_argument(llm, cache))
    return cache, [(layer.keys, layer.values) for layer in cache.layers]


def _cache_argument(module: nn.Module, cache: object) -> dict[str, object]:
    """Return the cache as a keyword argument of a model or an attention module."""
    return {_cache_keyword(module): cache}


@functools.cache
def _cache_keyword(module: nn.Module) -> str:
    from deltamem_kernels.integrations.transformers.cache_keyword import cache_keyword

    return cache_keyword(module)


def _new_cache(llm: nn.Module):
    from transformers import DynamicCache

    return DynamicCache(config=llm.config)


def _reset_states(kind: str, llm: nn.Module) -> None:
    """Reset the states of the authors' code, which its layers keep."""
    if kind == "upstream":
        from deltamem.core.delta import reset_delta_mem_states

        reset_delta_mem_states(llm)


def _patched(run: Callable[[Tensors, Shape], Tensors]) -> Callable[[Tensors, Shape], Tensors]:
    def run_patched(inputs: Tensors, shape: Shape) -> Tensors:
        namespace, theirs, ours = _patched_functions()
        namespace.update(ours)
        try:
            return run(inputs, shape)
        finally:
            namespace.update(theirs)

    return run_patched


@functools.cache
def _patched_functions() -> tuple[dict, dict, dict]:
    """Return the namespace of the authors' layer, and the functions in it that patch() replaces: theirs and ours.

    Swapping only these is fast. patch() itself searches all modules, which would be timed with every call.
    """
    from deltamem.core import delta_impl

    from deltamem_kernels.integrations.upstream import patch, unpatch

    namespace, before = vars(delta_impl), dict(vars(delta_impl))
    patch()
    ours = {name: x for name, x in namespace.items() if x is not before[name]}
    unpatch()
    return namespace, {name: before[name] for name in ours}, ours


def _why_not(kind: str, backbone: Backbone, least: int, shape: Shape) -> str | None:
    if shape.tokens < least:
        return f"a loss needs at least {least} tokens"
    if shape.source != "random":
        return "its inputs are random token ids: needs --input random"
    return backbone.why_not(shape.device) or (upstream_why_not() if kind.startswith("upstream") else None)


def _oracle(run: Callable[[Tensors, Shape], Tensors], inputs: Tensors, shape: Shape) -> Tensors:
    """Run the frozen model in its own dtype. A memory with zero corrections must return the same."""
    outputs = run(inputs | {"x": inputs["x"].to(shape.device, shape.dtype)}, shape)
    return {name: x.to("cpu", torch.float64) for name, x in outputs.items()}


def _with_weights(backbone: Backbone, inputs: Tensors) -> Tensors:
    """Add the weights to the inputs, so that they do not count as kept for backward."""
    x = inputs["x"]
    return inputs | dict(frozen(backbone, x.dtype, x.device.type).named_parameters())


def _bytes(backbone: Backbone, times: int, shape: Shape) -> int:
    """Return the bytes of the weights and the embeddings, once for each pass."""
    return times * shape.dtype.itemsize * (backbone.parameters + shape.batch * shape.tokens * backbone.hidden)


def _layer_bytes(shape: Shape) -> int:
    """Return the bytes of the layer's weights, its inputs and outputs, and the cached keys and values."""
    width, query, key = TINY_QWEN3.hidden, 512, 256
    cached = 2 * shape.batch * key * (CACHED if shape.tokens == 1 else 0)
    return (2 * width * (query + key) + 2 * shape.batch * shape.tokens * width + cached) * shape.dtype.itemsize


def _operation(name: str, backbone: Backbone, run: Callable, inputs: Callable, **fields) -> Operation:
    runs = {kind: functools.partial(run, kind, backbone) for kind in KINDS}
    runs["upstream, patched"] = _patched(runs["upstream"])
    least = 2 if "gradients_of" in fields else 1
    implementations = tuple(
        Implementation(
            kind,
            runs[kind],
            functools.partial(_why_not, kind, backbone, least),
            slow_start=True,
            prepare=functools.partial(_with_weights, backbone),
        )
        for kind in KINDS
    )
    return Operation(
        name,
        functools.partial(inputs, backbone),
        functools.partial(_oracle, runs["frozen"]),
        implementations=implementations,
        baseline="frozen",
        **fields,
    )


def _whole(backbone: Backbone) -> tuple[Operation, Operation]:
    forward = {"bytes_moved": functools.partial(_bytes, backbone, 1), "tokens": (1, 128, 512, 2048)}
    training = {"bytes_moved": functools.partial(_bytes, backbone, 2), "tokens": (512,), "gradients_of": ("x",)}
    name = f"model {backbone.name}"
    return (
        _operation(name, backbone, _forward, _inputs, **forward),
        _operation(f"{name} training", backbone, _training, _inputs, **training),
    )


OPERATIONS = (
    *_whole(SMOLLM2),
    *_whole(TINY_QWEN3),
    *_whole(QWEN3_4B),
    _operation(
        f"model {TINY_QWEN3.name} attention", TINY_QWEN3, _attention, _layer_inputs,
        bytes_moved=_layer_bytes, tokens=(1, 512),
    ),
)  # fmt: skip
