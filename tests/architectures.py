"""What holds for a memory in every text decoder of transformers. Writes docs/architectures.md:

python tests/architectures.py > docs/architectures.md
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import transformers
from models import CLOSE, randomise_memory, tokens
from tiny_models import MODEL_TYPES, build
from torch import Tensor, nn
from transformers import DynamicCache

from deltamem_kernels.integrations.transformers import MemoryCall, attach_memory, memory_layers
from deltamem_kernels.integrations.transformers.cache_keyword import cache_keyword
from deltamem_kernels.nn import DeltaMemConfig
from deltamem_kernels.testing import relative_error

RETURN_NO_CACHE = ("recurrent_gemma",)
YES, NO, FROZEN, NONE = "yes", "**no**", "frozen model: no", ""


@torch.no_grad()
def cache_error(model: Any) -> float:
    """Compare one call with a prefill of half the tokens and single tokens after it."""
    ids = tokens(2, 12)
    return relative_error(stepwise(model, ids, prompt=6), model(ids, use_cache=False).logits)


@torch.no_grad()
def padding_error(model: Any) -> float:
    """Compare the rows of a left-padded batch with the rows alone, in one call and through the cache."""
    ids, real = tokens(2, 12), torch.arange(12) >= torch.tensor([[0], [5]])
    alone = [model(row[keep][None], use_cache=False).logits[0] for row, keep in zip(ids, real, strict=True)]
    given = {"attention_mask": real.long()} | positions_if_taken(model, (real.long().cumsum(1) - 1).clamp_min(0))
    batches = model(ids, use_cache=False, **given).logits, stepwise(model, ids, prompt=8, **given)
    return largest(relative_error(batch[real], torch.cat(alone)) for batch in batches)


@torch.no_grad()
def packed_error(model: Any) -> float:
    """Compare sequences that are packed in a row with the sequences alone."""
    parts = tokens(1, 12).split([5, 1, 6], dim=1)
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    packed = model(torch.cat(parts, 1), position_ids=positions, use_cache=False).logits
    return relative_error(packed, torch.cat([model(part, use_cache=False).logits for part in parts], 1))


def checkpointing_error(model: Any) -> float:
    """Compare gradients with and without gradient checkpointing. Backward comes after the MemoryCall."""
    ids, model = tokens(1, 12), copy.deepcopy(model).train()
    states = {layer.layer_idx: torch.randn(1, 1, 8, 8) for _, layer in memory_layers(model)}
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    noise = torch.get_rng_state()  # routers of experts draw random numbers in training
    calls: list[None] = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: calls.append(None))

    def gradients() -> tuple[Tensor | None, ...]:
        calls.clear()
        torch.set_rng_state(noise)
        with MemoryCall(model, states) if states else contextlib.nullcontext():
            loss = model(ids, use_cache=False).logits.square().sum()
        return torch.autograd.grad(loss, weights, allow_unused=True)

    exact, once = gradients(), len(calls)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ours, twice = gradients(), len(calls)
    if twice <= once:
        raise NotImplementedError("no module is recomputed")
    pairs = [(x, y) for x, y in zip(ours, exact, strict=True) if y is not None]  # unused experts have no gradient
    return largest(relative_error(x, y) for x, y in pairs if x.any() or y.any())


@torch.no_grad()
def generation_error(model: Any) -> float:
    """Compare tokens and logits of greedy generation with and without a cache."""
    ids = tokens(2, 6)
    given = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    given |= {"pad_token_id": 0, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    ours, exact = (model.generate(ids, use_cache=use_cache, **given) for use_cache in (True, False))
    if not torch.equal(ours.sequences, exact.sequences):
        return float("inf")
    return relative_error(torch.stack(ours.logits), torch.stack(exact.logits))


CHECKS: dict[str, Callable[[Any], float]] = {
    "cache": cache_error,
    "padding": padding_error,
    "packed": packed_error,
    "checkpointing": checkpointing_error,
    "generation": generation_error,
}


def largest(errors: Iterable[float]) -> float:
    """Return the largest error, or NaN if one is NaN."""
    return torch.tensor(list(errors)).max().item()


def stepwise(model: Any, ids: Tensor, prompt: int, **given: Tensor) -> Tensor:
    """Return the logits of a prompt and of single tokens after it, through the cache that the model creates."""
    keyword, cache, found = cache_keyword(model), None, []
    given = positions_if_taken(model, torch.arange(ids.shape[1]).expand_as(ids)) | given
    if model.config.model_type in RETURN_NO_CACHE:
        cache = DynamicCache(config=model.config)
    for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, ids.shape[1]))]:
        part = {name: x[:, : end if name == "attention_mask" else None] for name, x in given.items()}
        part |= {"position_ids": given["position_ids"][:, start:end]} if "position_ids" in given else {}
        output = model(ids[:, start:end], use_cache=True, **part, **({} if cache is None else {keyword: cache}))
        cache = output.get("cache", output.get("past_key_values", cache))
        found.append(output.logits)
    return torch.cat(found, 1)


def positions_if_taken(model: Any, positions: Tensor) -> dict[str, Tensor]:
    return {"position_ids": positions} if "position_ids" in inspect.signature(model.forward).parameters else {}


class Row(NamedTuple):
    """A row of the table."""

    architecture: str
    memory: str
    cache: str = NONE
    padding: str = NONE
    packed: str = NONE
    checkpointing: str = NONE
    generation: str = NONE

    def __str__(self) -> str:
        return f"| {' | '.join(self)} |"


def examine(model_type: str, details: Callable[[str], Any] = lambda line: None) -> Row:
    """Return what holds for a memory in a tiny random model of a type. `details` gets the errors behind it.

    What does not hold for the model without a memory is not asked of the model with one.
    """
    try:
        model = build(model_type)
    except ImportError as error:
        return Row(model_type, f"not built: {_one_line(error).partition('. ')[0]}")
    frozen, targets = copy.deepcopy(model), target_modules(model)
    model.requires_grad_(False)
    try:
        attach_memory(model, DeltaMemConfig(target_modules=targets))
    except ValueError as error:
        return Row(model_type, _one_line(error))
    changed = _change(model)
    details(f"{model_type}: the memory changes the logits by {changed:.1e}")
    assert changed > 1e-3, f"the memory changes the logits by {changed} only"
    results = {}
    for name, check in CHECKS.items():
        without = check(frozen)
        try:
            error = check(model)
        except Exception as raised:
            details(f"{model_type} {name}: {type(raised).__name__}: {raised}")
            error = float("inf")
        results[name] = FROZEN if not without <= CLOSE else YES if error <= CLOSE else NO
        details(f"{model_type} {name}: {results[name]}; error {error:.1e}, frozen model {without:.1e}")
    return Row(model_type, _which_fit(model, targets), **results)


def target_modules(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the attention modules: `self_attn`, or what has four projections, or by their classes."""
    named = [(name.rpartition(".")[2], module) for name, module in model.named_modules()]
    projections = [name for name, module in named if all(hasattr(module, f"{head}_proj") for head in "qkvo")]
    if projections:
        return ("self_attn",) if "self_attn" in projections else tuple(sorted(set(projections)))
    classes = {name for name, module in named if "Attention" in type(module).__name__ and not name.isdigit()}
    return tuple(sorted(classes)) or ("self_attn",)


@torch.no_grad()
def _change(model: Any) -> float:
    """Give the memory random weights. Return how much they change the logits."""
    ids = tokens(1, 12)
    before = model(ids, use_cache=False).logits  # a new memory changes nothing
    randomise_memory(model)
    return relative_error(model(ids, use_cache=False).logits, before)


def _which_fit(model: Any, targets: tuple[str, ...]) -> str:
    """Return "fits", and in which layers if not in all."""
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
    indices = {layer.layer_idx for _, layer in memory_layers(model)}
    inside = sorted({kinds[i] for i in indices})
    outside = {kind for i, kind in enumerate(kinds) if i not in indices}
    text = "fits"
    if outside and not outside & set(inside):
        text += f" in layers of `{'` and `'.join(inside)}`"
    elif outside:
        text += f" in {len(indices)} of {len(kinds)} layers"
    return text + ("" if targets == ("self_attn",) else f", with `target_modules={targets}`")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()).removeprefix("the model's attention does not fit: ")
    return text.replace("|", "\\|")


HEADER = f"""# Architectures

This page lists the text decoders of transformers {transformers.__version__}, the model types of
`MODEL_FOR_CAUSAL_LM_MAPPING_NAMES`. It says which of them take a memory, and what works with it. Each result comes from
a tiny random model with a random memory that corrects q, k, v and o, in float32 on a CPU. Real sizes, other dtypes and
pretrained weights were not tried.

| column | what must agree |
|---|---|
| memory | "fits" if `attach_memory` accepts the model; otherwise the error that it raises |
| cache | logits of one call, and of a prompt followed by single tokens |
| padding | logits of a left-padded batch, in one call and through the cache, and of its rows alone |
| packed | logits of sequences that are packed in one row by their `position_ids`, and of the sequences alone |
| checkpointing | gradients of the memory's weights inside a `MemoryCall`, with and without gradient checkpointing |
| generation | tokens and logits of greedy generation, with and without a cache |

"yes" means a relative error of at most {CLOSE}. "frozen model: no" means that the model fails the same comparison
without a memory. The page is written by `python tests/architectures.py > docs/architectures.md`, and checked by
`tests/test_architectures.py`.

"""


def page(rows: list[Row]) -> str:
    """Return the text of docs/architectures.md."""
    head, fitting = Row(*Row._fields), sum(row.memory.startswith("fits") for row in rows)
    return (
        f"{HEADER}{fitting} of {len(rows)} model types take a memory.\n\n"
        + "\n".join([str(head), "|---" * len(head) + "|", *map(str, rows)])
        + "\n"
    )


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    log = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    with contextlib.redirect_stdout(sys.stderr):
        text = page([examine(model_type, log) for model_type in sys.argv[1:] or MODEL_TYPES])
    print(text, end="")
