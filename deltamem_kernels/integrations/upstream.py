"""Speed up the δ-mem authors' own code, the package `deltamem`, with one call:

    from deltamem_kernels.integrations.upstream import patch

    patch()

Its models, sessions and training scripts then use this package's scan and segment means, on any device. Everything else
in the authors' code is unchanged, including where the state is stored, its dtype between calls, and how masks are read.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..compat import triton_affine_scan, triton_scan_support
from ..ops.segment_mean import segment_mean

__all__ = ["patch", "unpatch"]

PACKAGE = "deltamem"
KERNELS, LAYER = f"{PACKAGE}.kernels.affine_scan", f"{PACKAGE}.core.delta_impl"

Means = tuple[Tensor | None, Tensor | None, Tensor | None]


def patch() -> None:
    """Replace the scan and the message and sentence means of the authors' code. Existing layers are included.

    The new scan is `deltamem_kernels.compat.triton_affine_scan`. It replaces the old one under every name in every
    module of `deltamem`. Layers with `scan_impl="torch"` (DELTA_MEM_SCAN_IMPL) keep the authors' loop. A second call
    has no effect. `unpatch` restores the original functions.

    Raises:
        ImportError: `deltamem` or one of its dependencies is not installed.
        RuntimeError: the version of `deltamem` is not supported. Nothing is replaced.
    """
    if _replaced:
        return
    kernels, layer = _module(KERNELS), _module(LAYER)
    attention = getattr(layer, "DeltaMemAttention", None)
    if not inspect.isclass(attention):
        raise _other_version(f"{LAYER} has no class DeltaMemAttention")
    for name in SCAN:
        _check(kernels, name, SCAN[name])
        if vars(layer).get(name) is not getattr(kernels, name):
            raise _other_version(f"{LAYER} does not take {name} from {KERNELS}")
    for name, like in {**MEANS, **CALLED}.items():
        _check(attention, name, like)
    _replaced.update({getattr(kernels, name): ours for name, ours in SCAN.items()})
    _replaced.update({getattr(attention, name): ours for name, ours in MEANS.items()})
    _swap(_replaced)


def unpatch() -> None:
    """Restore the authors' functions. Has no effect unless `patch` was called."""
    if _replaced:
        _swap({ours: theirs for theirs, ours in _replaced.items()})
        _replaced.clear()


_replaced: dict[Callable, Callable] = {}  # the authors' functions and their replacements


def _swap(new: dict[Callable, Callable]) -> None:
    """Replace functions wherever they are referenced, since `from ... import` copies references to other modules."""
    by_id = {id(old): each for old, each in new.items()}
    for owner in _owners():
        for name, value in list(vars(owner).items()):
            if id(value) in by_id:
                setattr(owner, name, by_id[id(value)])


def _owners() -> Iterator[Any]:
    """Yield the namespaces that may refer to a replaced function: all modules of `deltamem` and its layer class."""
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and (name == PACKAGE or name.startswith(f"{PACKAGE}.")):
            yield module
    yield sys.modules[LAYER].DeltaMemAttention


def _module(name: str) -> ModuleType:
    if importlib.util.find_spec(PACKAGE) is None:
        raise ImportError(
            "patch() needs the δ-mem authors' package `deltamem` (github.com/declare-lab/delta-Mem) on the Python path"
        )
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != PACKAGE:
            raise
        raise _other_version(f"it has no module {error.name}") from error


def _check(owner: Any, name: str, like: Callable) -> None:
    """Raise RuntimeError unless owner has a function of this name with the parameters of `like`."""
    function = vars(owner).get(name)
    if not inspect.isfunction(function):
        raise _other_version(f"{owner.__name__} has no function {name}")
    got, wanted = (list(inspect.signature(each).parameters) for each in (function, like))
    if got != wanted:
        raise _other_version(f"{owner.__name__}.{name} takes ({', '.join(got)}), expected ({', '.join(wanted)})")


def _other_version(what: str) -> RuntimeError:
    return RuntimeError(f"patch() was made for another version of `deltamem`: {what}. Nothing was replaced")


# Replacements for methods of the authors' DeltaMemAttention. They return the means `[B, M, D]`, which of them to write
# `[B, M]`, and the message index of each `[B, M]` (-1 for none). If they return None three times, every token writes.


def _build_message_write_means(self: Any, hidden_states: Tensor, token_mask: Tensor | None) -> Means:
    given = self._message_write_inputs(hidden_states, token_mask)
    if self.memory_write_granularity != "message_mean" or given is None:
        return None, None, None
    ids, means, written = _means(hidden_states, *given)
    return means, written, torch.where(written, torch.arange(means.shape[1], device=ids.device), -1)


def _build_sentence_write_means(self: Any, hidden_states: Tensor, token_mask: Tensor | None) -> Means:
    given = self._sentence_write_inputs(hidden_states, token_mask)
    if self.memory_write_granularity != "sentence_mean" or given is None:
        return None, None, None
    message_ids, sentence_ids, active = given
    ids, means, written = _means(hidden_states, sentence_ids, active)
    last = ids.shape[1] - 1
    tokens = torch.arange(last + 1, device=ids.device)
    first = ids.new_full(written.shape, last)  # the first token of each sentence
    first.scatter_reduce_(1, ids.clamp_min(0), torch.where(ids < 0, last, tokens), "amin")
    return means, written, torch.where(written, message_ids.to(ids.dtype).gather(1, first), -1)


def _means(hidden_states: Tensor, ids: Tensor, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ids, with -1 for inactive tokens, and the segment means.

    A GPU is synchronised once, for the number of segments; the authors' code synchronises several times per segment.
    """
    ids = torch.where(active, ids, -1).to(torch.int64)
    return ids, *segment_mean(hidden_states, ids, int(ids.max()) + 1)


def _write_inputs(self: Any, hidden_states: Tensor, token_mask: Tensor | None) -> None:
    """Signature of the authors' methods that the replacements call."""


SCAN: dict[str, Callable] = {"triton_affine_scan": triton_affine_scan, "triton_scan_support": triton_scan_support}
MEANS: dict[str, Callable] = {
    "_build_message_write_means": _build_message_write_means,
    "_build_sentence_write_means": _build_sentence_write_means,
}
CALLED: dict[str, Callable] = {"_message_write_inputs": _write_inputs, "_sentence_write_inputs": _write_inputs}
