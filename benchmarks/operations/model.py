"""Whole models and one attention layer, frozen and with a memory: a prefill, a token after 512 others, a training step.

T = 1 decodes: one step behind CACHED tokens, always the same ones. Larger T is a prefill, up to the last token's
logits. A training step is the forward, the loss of all tokens, and the backward to the inputs of the first layer (the
embeddings, which need no gradient in real training: this way the frozen model has a backward too) and to the memory's
weights.
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
    """The embeddings of random tokens `[B, T, hidden]`, and the tokens `[B, T]`."""
    ids = torch.randint(backbone.vocabulary, (shape.batch, shape.tokens), generator=torch.Generator().manual_seed(5))
    ids = ids.to(shape.device)
    return {"x": frozen(backbone, shape.dtype, shape.device).get_input_embeddings()(ids), "ids": ids}


def _layer_inputs(backbone: Backbone, shape: Shape) -> Tensors:
    x = torch.randn(shape.batch, shape.tokens, backbone.hidden, generator=torch.Generator().manual_seed(5))
    return {"x": x.to(shape.device, shape.dtype)}


def _forward(kind: str, backbone: Backbone, inputs: Tensors, shape: Shape) -> Tensors:
    llm, x = model(kind, backbone, shape), inputs["x"]
    if shape.tokens > 1:
        _from_zero(kind, llm)
        cache = _new_cache(llm)
    else:
        cache = _rewound(*_context(kind, backbone, shape))
    return {"logits": llm(inputs_embeds=x, use_cache=True, logits_to_keep=1, **_keyword(llm, cache)).logits}


def _training(kind: str, backbone: Backbone, inputs: Tensors, shape: Shape) -> Tensors:
    llm, x = model(kind, backbone, shape), inputs["x"]
    ids = inputs["ids"].to(x.device, torch.int64)
    _from_zero(kind, llm)
    logits = llm(inputs_embeds=x, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    trained = [p for p in llm.parameters() if p.requires_grad]
    d_x, *_ = torch.autograd.grad(loss, [x, *trained], allow_unused=True)
    return {"loss": loss, "d_x": d_x}


def _attention(kind: str, backbone: Backbone, inputs: Tensors, shape: Shape) -> Tensors:
    llm, cache, first = model(kind, backbone, shape), None, 0
    if shape.tokens > 1:
        _from_zero(kind, llm)
    else:
        cache, first = _rewound(*_context(kind, backbone, shape)), CACHED
    rotary = _rotary(backbone, first, shape.tokens, shape.dtype, shape.device)
    attention = llm.model.layers[0].self_attn
    options = {"position_embeddings": rotary, "attention_mask": None, **_keyword(attention, cache)}
    return {"out": attention(inputs["x"], **options)[0]}


@functools.cache
def _rotary(backbone: Backbone, first: int, tokens: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    positions = torch.arange(first, first + tokens, device=device)[None]
    return frozen(backbone, dtype, device).model.rotary_emb(torch.zeros(1, dtype=dtype, device=device), positions)


@functools.cache
def _context(kind: str, backbone: Backbone, shape: Shape) -> tuple[object, list[tuple[Tensor, Tensor]]]:
    """A cache of CACHED tokens, and its keys and values. A call puts others in their place and never writes in them."""
    llm = model(kind, backbone, shape)
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(backbone.vocabulary, (shape.batch, CACHED), generator=generator).to(shape.device)
    _from_zero(kind, llm)
    cache = _new_cache(llm)
    llm(input_ids=ids, use_cache=True, logits_to_keep=1, **_keyword(llm, cache))
    return cache, [(layer.keys, layer.values) for layer in cache.layers]


def _rewound(cache, kept: list[tuple[Tensor, Tensor]]):
    """The keys and values as they were. The memory goes on: what a step costs does not depend on its state."""
    for layer, (keys, values) in zip(cache.layers, kept, strict=True):
        layer.keys, layer.values = keys, values
    return cache


def _keyword(module: nn.Module, cache: object) -> dict[str, object]:
    """The cache as a keyword argument of this module."""
    return {_keyword_of(module): cache}


@functools.cache
def _keyword_of(module: nn.Module) -> str:
    from deltamem_kernels.integrations.transformers.cache_keyword import cache_keyword

    return cache_keyword(module)


def _new_cache(llm: nn.Module):
    from transformers import DynamicCache

    return DynamicCache(config=llm.config)


def _from_zero(kind: str, llm: nn.Module) -> None:
    """The authors' state is kept by the layers."""
    if kind == "upstream":
        from deltamem.core.delta import reset_delta_mem_states

        reset_delta_mem_states(llm)


def _patched(run: Callable[[Tensors, Shape], Tensors]) -> Callable[[Tensors, Shape], Tensors]:
    def within(inputs: Tensors, shape: Shape) -> Tensors:
        names, theirs, ours = _scans()
        names.update(ours)
        try:
            return run(inputs, shape)
        finally:
            names.update(theirs)

    return within


@functools.cache
def _scans() -> tuple[dict, dict, dict]:
    """What patch() puts into the module of the authors' layer. It looks through all their modules, once for a program
    that calls it; here it would be for each call that is timed."""
    from deltamem.core import delta_impl

    from deltamem_kernels.integrations.upstream import patch, unpatch

    names, before = vars(delta_impl), dict(vars(delta_impl))
    patch()
    ours = {name: x for name, x in names.items() if x is not before[name]}
    unpatch()
    return names, {name: before[name] for name in ours}, ours


def _why_not(kind: str, backbone: Backbone, least: int, shape: Shape) -> str | None:
    if shape.tokens < least:
        return f"a loss needs {least} tokens"
    if shape.source != "random":
        return "its inputs are random token ids: without --input"
    return backbone.why_not(shape.device) or (upstream_why_not() if kind.startswith("upstream") else None)


def _oracle(run: Callable[[Tensors, Shape], Tensors], inputs: Tensors, shape: Shape) -> Tensors:
    """The frozen model in its own dtype: a memory that corrects nothing has to give just that."""
    outputs = run(inputs | {"x": inputs["x"].to(shape.device, shape.dtype)}, shape)
    return {name: x.to("cpu", torch.float64) for name, x in outputs.items()}


def _with_weights(backbone: Backbone, inputs: Tensors) -> Tensors:
    """So that what is kept for backward is counted without them."""
    x = inputs["x"]
    return inputs | dict(frozen(backbone, x.dtype, x.device.type).named_parameters())


def _bytes(backbone: Backbone, times: int, shape: Shape) -> int:
    """The weights and the embeddings, once for each direction."""
    return times * shape.dtype.itemsize * (backbone.parameters + shape.batch * shape.tokens * backbone.hidden)


def _layer_bytes(shape: Shape) -> int:
    """The layer's weights, its inputs and outputs, and the cached keys and values."""
    width, query, key = TINY_QWEN3.hidden, 512, 256
    cached = 2 * shape.batch * key * (CACHED if shape.tokens == 1 else 0)
    return (2 * width * (query + key) + 2 * shape.batch * shape.tokens * width + cached) * shape.dtype.itemsize


def _operation(name: str, backbone: Backbone, run: Callable, inputs: Callable, **fields) -> Operation:
    of_kind = {kind: functools.partial(run, kind, backbone) for kind in KINDS}
    of_kind["upstream, patched"] = _patched(of_kind["upstream"])
    least = 2 if "gradients_of" in fields else 1
    implementations = tuple(
        Implementation(
            kind,
            of_kind[kind],
            functools.partial(_why_not, kind, backbone, least),
            slow_start=True,
            prepare=functools.partial(_with_weights, backbone),
        )
        for kind in KINDS
    )
    return Operation(
        name,
        functools.partial(inputs, backbone),
        functools.partial(_oracle, of_kind["frozen"]),
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
