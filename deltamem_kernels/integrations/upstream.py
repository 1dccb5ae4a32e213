"""The δ-mem authors' own code, the package `deltamem`, made fast with one line:

    from deltamem_kernels.integrations.upstream import patch

    patch()

Its models, sessions and training scripts then run this package's scan and segment means, on any device. What else the
authors' code does stays as it is: where the state lives, its dtype between calls, how masks are read.
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
    """Replaces the scan and the message and sentence means of the authors' code, for layers that exist already too.

    The scan is `deltamem_kernels.compat`'s, under every name that a module of `deltamem` has for it. A layer whose
    `scan_impl` is "torch" (DELTA_MEM_SCAN_IMPL) asks for the authors' loop, and keeps it. Calling it again changes
    nothing; `unpatch` takes it back.

    Raises:
        ImportError: `deltamem`, or what it imports, is not installed.
        RuntimeError: it is another version than this was made for. Nothing is replaced then.
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
    for name, like in {**MEANS, **USED}.items():
        _check(attention, name, like)
    _replaced.update({getattr(kernels, name): ours for name, ours in SCAN.items()})
    _replaced.update({getattr(attention, name): ours for name, ours in MEANS.items()})
    _swap(_replaced)


def unpatch() -> None:
    """Gives the authors' code its own functions back. Without `patch` before, it changes nothing."""
    if _replaced:
        _swap({ours: theirs for theirs, ours in _replaced.items()})
        _replaced.clear()


_replaced: dict[Callable, Callable] = {}  # theirs, ours


def _swap(new: dict[Callable, Callable]) -> None:
    """By identity, since `from … import` has given the functions names elsewhere."""
    by_id = {id(old): each for old, each in new.items()}
    for owner in _owners():
        for name, value in list(vars(owner).items()):
            if id(value) in by_id:
                setattr(owner, name, by_id[id(value)])


def _owners() -> Iterator[Any]:
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and (name == PACKAGE or name.startswith(f"{PACKAGE}.")):
            yield module
    yield sys.modules[LAYER].DeltaMemAttention


def _module(name: str) -> ModuleType:
    if importlib.util.find_spec(PACKAGE) is None:
        raise ImportError(
            "patch() needs the δ-mem authors' package `deltamem` (github.com/declare-lab/delta-Mem) on Python's path"
        )
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != PACKAGE:
            raise
        raise _other_version(f"it has no module {error.name}") from error


def _check(owner: Any, name: str, like: Callable) -> None:
    function = vars(owner).get(name)
    if not inspect.isfunction(function):
        raise _other_version(f"{owner.__name__} has no function {name}")
    got, wanted = (list(inspect.signature(each).parameters) for each in (function, like))
    if got != wanted:
        raise _other_version(f"{owner.__name__}.{name} takes ({', '.join(got)}), expected ({', '.join(wanted)})")


def _other_version(what: str) -> RuntimeError:
    return RuntimeError(f"patch() was made for another version of `deltamem`: {what}. Nothing was replaced")


# Methods of the authors' DeltaMemAttention. They return the means `[B, M, D]`, which of them were written `[B, M]`, and
# the message of each `[B, M]`, or -1; or thrice None, and then each token writes.


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
    first = ids.new_full(written.shape, last)  # of each sentence's tokens
    first.scatter_reduce_(1, ids.clamp_min(0), torch.where(ids < 0, last, tokens), "amin")
    return means, written, torch.where(written, message_ids.to(ids.dtype).gather(1, first), -1)


def _means(hidden_states: Tensor, ids: Tensor, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One synchronisation with a GPU, for the number of segments, where the authors' code has several a segment."""
    ids = torch.where(active, ids, -1).to(torch.int64)
    return ids, *segment_mean(hidden_states, ids, int(ids.max()) + 1)


def _write_inputs(self: Any, hidden_states: Tensor, token_mask: Tensor | None) -> None:
    """The form of the methods that those above call."""


SCAN: dict[str, Callable] = {"triton_affine_scan": triton_affine_scan, "triton_scan_support": triton_scan_support}
MEANS: dict[str, Callable] = {
    "_build_message_write_means": _build_message_write_means,
    "_build_sentence_write_means": _build_sentence_write_means,
}
USED: dict[str, Callable] = {"_message_write_inputs": _write_inputs, "_sentence_write_inputs": _write_inputs}
