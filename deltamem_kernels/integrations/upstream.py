"""Speed up the δ-mem authors' own code, the package `deltamem`, with one call:

    from deltamem_kernels.integrations.upstream import patch

    patch()

Its models, sessions and training scripts then use this package's scan and segment means, on any device, and train under
gradient checkpointing. `patch(state_dtype=torch.float32)` also keeps the state in float32 between the calls of a 16-bit
model. Everything else in the authors' code is unchanged, including where the state is stored and how masks are read.
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
from . import upstream_layer as ours

__all__ = ["patch", "unpatch"]

PACKAGE = "deltamem"
KERNELS, LAYER = f"{PACKAGE}.kernels.affine_scan", f"{PACKAGE}.core.delta_impl"


def patch(*, state_dtype: torch.dtype | None = None) -> None:
    """Replace the scan, the message and sentence means and a few methods of the authors' code, also of existing layers.

    The new scan is `deltamem_kernels.compat.triton_affine_scan`. It replaces the old one under every name in every
    module of `deltamem`. Layers with `scan_impl="torch"` (DELTA_MEM_SCAN_IMPL) keep the authors' loop. A second call
    with the same state_dtype has no effect. `unpatch` restores the original functions.

    Training works with and without gradient checkpointing. A layer that checkpointing calls again in backward starts
    from the state of the first call. After a backward that frees the graph, layers continue from the values of their
    states, and gradients do not go back through earlier steps.

    Args:
        state_dtype: dtype of the state between calls, torch.float32 or torch.float64. The authors' code keeps the state
            in the dtype of the hidden states, so a 16-bit model rounds it at each call. None leaves it so. A hidden
            state of a wider dtype still decides. After `unpatch`, the authors' code resets a state of another dtype
            than the hidden states to zeros.

    Raises:
        ImportError: `deltamem` or one of its dependencies is not installed.
        RuntimeError: the version of `deltamem` is not supported, or `patch` was called before with another state_dtype.
            Nothing is replaced.
        ValueError: state_dtype is another dtype.
    """
    global _patched_with
    if state_dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"state_dtype must be torch.float32, torch.float64 or None, got {state_dtype!r}")
    if _replaced:
        if state_dtype != _patched_with:
            raise RuntimeError(
                f"patch() was called before with state_dtype={_patched_with}, got {state_dtype}: call unpatch() first"
            )
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
    _check(attention, "forward", _forward, may_have_more=True)
    replaced = {getattr(kernels, name): function for name, function in SCAN.items()}
    replaced |= {vars(attention)[name]: function for name, function in MEANS.items()}
    replaced[vars(attention)["forward"]] = ours.trainable(vars(attention)["forward"])
    for owner, changes in ((attention, STATE), (layer, LOAD)) if state_dtype else ():
        for name, change in changes.items():
            theirs = vars(owner).get(name)
            function = change(theirs, state_dtype)
            _check(owner, name, function)
            replaced[theirs] = function
    _patched_with = state_dtype
    _replaced.update(replaced)
    _swap(_replaced)


def unpatch() -> None:
    """Restore the authors' functions. Has no effect unless `patch` was called."""
    if _replaced:
        _swap({new: theirs for theirs, new in _replaced.items()})
        _replaced.clear()


_replaced: dict[Callable, Callable] = {}  # the authors' functions and their replacements
_patched_with: torch.dtype | None = None


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


def _check(owner: Any, name: str, like: Callable, *, may_have_more: bool = False) -> None:
    """Raise RuntimeError unless owner has a function of this name with the parameters of `like`.

    With may_have_more, its parameters may go on after those of `like`.
    """
    function = vars(owner).get(name)
    if not inspect.isfunction(function):
        raise _other_version(f"{owner.__name__} has no function {name}")
    got, wanted = (list(inspect.signature(each).parameters) for each in (function, like))
    if got[: len(wanted) if may_have_more else None] != wanted:
        raise _other_version(f"{owner.__name__}.{name} takes ({', '.join(got)}), expected ({', '.join(wanted)})")


def _other_version(what: str) -> RuntimeError:
    return RuntimeError(f"patch() was made for another version of `deltamem`: {what}. Nothing was replaced")


def _write_inputs(self: Any, hidden_states: Tensor, token_mask: Tensor | None) -> None:
    """Signature of the authors' methods that the means call."""


def _forward(self: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> None:
    """Start of the signature of the authors' forward."""


SCAN: dict[str, Callable] = {"triton_affine_scan": triton_affine_scan, "triton_scan_support": triton_scan_support}
MEANS: dict[str, Callable] = {
    "_build_message_write_means": ours.build_message_write_means,
    "_build_sentence_write_means": ours.build_sentence_write_means,
}
CALLED: dict[str, Callable] = {"_message_write_inputs": _write_inputs, "_sentence_write_inputs": _write_inputs}
STATE: dict[str, Callable] = {
    "_ensure_state": ours.ensure_state,
    "_token_state_reads": ours.token_state_reads,
    "_memory_affine_scan_torch": ours.memory_affine_scan_torch,
}
LOAD: dict[str, Callable] = {"load_delta_mem_online_state": ours.load_online_state}
