"""The kernels that the report compiles, with the arguments of a launch. The tensors are never read."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from deltamem_kernels.backends.scan_choice import MAP_RANK, force_scan
from deltamem_kernels.operands import (
    CorrectionOperands,
    DecodeOperands,
    PrefillOperands,
    ProjectionAdjoint,
    ProjectionOperands,
    ScanCotangents,
    ScanOperands,
    SegmentOperands,
    StepOperands,
)

from .compiler import ARCHS, Row, row

if TYPE_CHECKING:
    from deltamem_kernels.backends.triton.launch import Launch

TOKENS = 16384
"""Enough for several groups of chunks."""


class ScanCase(NamedTuple):
    """Operands of the delta rule."""

    heads: int = 1
    dtype: torch.dtype = torch.bfloat16
    """The dtype of the operands. The state has the dtype of the arithmetic."""
    mode: str = "standard"
    free_decay: bool = False
    per_head: bool = False
    mask: bool = False
    cu_seqlens: bool = False
    chunked: bool = True
    """Whether to compile the chunked scan too, up to the rank where chunks pay."""


class LayerCase(NamedTuple):
    """Operands of a layer."""

    heads: int = 1
    dtype: torch.dtype = torch.bfloat16
    weight_dtype: torch.dtype = torch.float32
    free_decay: bool = True
    per_head: bool = False
    mask: bool = True


class CorrectionCase(NamedTuple):
    """Operands of a correction."""

    dtype: torch.dtype = torch.bfloat16
    columns: int = 2560
    head_dim: int = 128


def scan_report(
    archs: tuple[int, ...] = ARCHS, ranks: tuple[int, ...] = (4, 8, 16), loops: bool = True, **options: Any
) -> list[Row]:
    """Compile the kernels of the delta rule for each arch and rank: forward with checkpoints, backward with all
    gradients, the same in chunks, and a step with all its operands (there is none in mode "affine", masked or packed).
    `options` are the fields of a ScanCase. `loops` is as for `row`."""
    case = ScanCase(**options)
    return _rows(lambda rank: scan_launches(rank, case), archs, ranks, loops)


def layer_report(
    archs: tuple[int, ...] = ARCHS, ranks: tuple[int, ...] = (4, 8, 16), loops: bool = True, **options: Any
) -> list[Row]:
    """Compile the kernels of projection (for many tokens, for few, and backward), decoding, prefill and segment means.
    `options` are the fields of a LayerCase."""
    case = LayerCase(**options)

    def launches(rank: int) -> dict[str, Launch]:
        segments = segment_launches(case) if rank == ranks[0] else {}  # they do not depend on the rank
        return layer_launches(rank, case) | segments

    return _rows(launches, archs, ranks, loops)


def correction_report(
    archs: tuple[int, ...] = ARCHS, ranks: tuple[int, ...] = (8, 32), loops: bool = True, **options: Any
) -> list[Row]:
    """Compile the kernels of three forms of the correction, forward and backward with all gradients. A row's rank is
    H·R. `options` are the fields of a CorrectionCase."""
    case = CorrectionCase(**options)
    return _rows(lambda width: correction_launches(width, case), archs, ranks, loops)


def _rows(
    launches: Callable[[int], dict[str, Launch]], archs: tuple[int, ...], ranks: tuple[int, ...], loops: bool
) -> list[Row]:
    rows = []
    for rank in ranks:
        named = launches(rank)
        rows += [
            row(name, rank, arch, launch, loops) for arch, (name, launch) in itertools.product(archs, named.items())
        ]
    return rows


def scan_launches(rank: int, case: ScanCase) -> dict[str, Launch]:
    """Return the launches of the delta rule by name."""
    operands = _scan_operands(rank, case)
    (forward,), (backward,) = _forward_and_backward(operands, chunked=False)
    launches = {"forward": forward, "backward": backward}
    if case.chunked and rank <= MAP_RANK:
        (*before, forward), (*before_back, backward) = _forward_and_backward(operands, chunked=True)
        launches |= {_chunk_name(launch): launch for launch in before}
        launches |= {f"{_chunk_name(launch)} adjoint": launch for launch in before_back}
        launches |= {"forward of chunks": forward, "backward of chunks": backward}
    if case.mode != "affine" and not case.mask and not case.cu_seqlens:
        launches["step"] = _step_launch(operands)
    return launches


def _forward_and_backward(operands: ScanOperands, chunked: bool) -> tuple[list[Launch], list[Launch]]:
    from deltamem_kernels.backends.triton.scan.backward import backward_launches
    from deltamem_kernels.backends.triton.scan.forward import forward_launches

    needs = [x is not None for x in operands.differentiable]
    with force_scan(chunked):
        forward, (reads, final_state, checkpoints) = forward_launches(operands, True)
        backward, _ = backward_launches(operands, checkpoints, ScanCotangents(reads, final_state), needs)
    return forward, backward


def _chunk_name(launch: Launch) -> str:
    fold = "fold groups" if launch.arguments.get("GROUPS") else "fold"
    names = {"mask_spans_kernel": "mask", "chunk_maps_kernel": "maps", "group_maps_kernel": "fold maps"}
    return names.get(launch.kernel.fn.__name__, fold)


def _step_launch(operands: ScanOperands) -> Launch:
    from deltamem_kernels.backends.triton.scan.step import step_launch

    q, k, v, beta, decay, _, state, *_ = operands
    assert state is not None
    slots = torch.zeros(q.shape[:2], dtype=torch.int32)
    states = state.new_empty(*q.shape, q.shape[-1])
    return step_launch(
        StepOperands(state, q, k, v, beta, decay, slots, slots[:, 0], states, q, operands.mode, -1, update_state=True)
    )


def _scan_operands(rank: int, case: ScanCase) -> ScanOperands:
    B = 1
    q, k, v = (torch.empty(B, TOKENS, case.heads, rank, dtype=case.dtype) for _ in range(3))
    beta, decay, write = (q[..., 0] if case.per_head else q for _ in range(3))
    affine = case.mode == "affine"
    state_dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    return ScanOperands(
        q,
        k,
        v,
        beta,
        decay if case.free_decay or affine else None,
        write if affine else None,
        torch.empty(B, case.heads, rank, rank, dtype=state_dtype),
        torch.ones(B, TOKENS, dtype=torch.bool) if case.mask else None,
        torch.zeros(B + 1, dtype=torch.int32) if case.cu_seqlens else None,
        case.mode,
    )


def layer_launches(rank: int, case: LayerCase) -> dict[str, Launch]:
    """Return the launches of projection, decoding and prefill by name."""
    from deltamem_kernels.backends.triton.layer.decode import decode_launch
    from deltamem_kernels.backends.triton.layer.prefill import memory_prefill_kernel, prefill_launches
    from deltamem_kernels.backends.triton.layer.projection import adjoint_launch, input_launch, projection_launch

    T, D, M, H = 128, 256, 4, case.heads
    gates = H if case.per_head else H * rank
    qkv, beta, decay = (torch.empty(n, D, dtype=case.weight_dtype) for n in (3 * H * rank, gates, gates))
    decay_weight, decay_bias = (decay, decay[:, 0]) if case.free_decay else (None, None)
    x = torch.empty(1, T, D, dtype=case.dtype)
    operands = ProjectionOperands(x, (qkv,), beta, beta[:, 0], decay_weight, decay_bias, H, True)
    inputs, weights = operands[:6], operands[1:6]
    projection, (q, k, v, beta, decay, norms) = projection_launch(operands)
    of_a_token, _ = projection_launch(operands._replace(x=x[:, :1]))
    d_decay = decay if case.free_decay else None
    operands_of_adjoint = ProjectionAdjoint(
        q, k, v, beta, d_decay, None, *weights, q, k, beta, decay, norms, case.dtype
    )  # fmt: skip
    adjoint, d_projected = adjoint_launch(operands_of_adjoint)
    to_x, _ = input_launch(operands_of_adjoint, d_projected)
    prefill, *_ = prefill_launches(PrefillOperands(*inputs, None, None, None, H, True, "standard"), False)
    pool, slots = torch.empty(M, H, rank, rank), torch.zeros(T, dtype=torch.int32)
    no_correction = (None, None, None, None, None, None, None)
    decode, _ = decode_launch(
        DecodeOperands(pool, x[0], *weights, slots, *no_correction, H, True, "standard", -1, 1.0, 1e-6, 0)
    )
    launches = {"projection": projection, "projection of a token": of_a_token, "projection adjoint": adjoint}
    launches |= {"projection to x": to_x, "decode": decode}
    for launch in prefill:
        if launch.kernel is memory_prefill_kernel:
            launches["prefill"] = launch
    return launches


def segment_launches(case: LayerCase) -> dict[str, Launch]:
    """Return the launches of segment means by name."""
    from deltamem_kernels.backends.triton.layer.segment_mean import backward_launch, mean_launch

    B, T, D, M = 1, 128, 256, 4
    x, ids = torch.empty(B, T, D, dtype=case.dtype), torch.zeros(B, T, dtype=torch.int64)
    mask = torch.ones(B, T, dtype=torch.bool) if case.mask else None
    forward, means, counts = mean_launch(SegmentOperands(x, ids, M, mask))
    backward, _ = backward_launch(means, ids, counts, mask)
    return {"segments": forward, "segments backward": backward}


def correction_launches(width: int, case: CorrectionCase) -> dict[str, Launch]:
    """Return the launches of three forms of the correction, with H·R = width, by name."""
    from deltamem_kernels.backends.triton.layer.correction import backward_launches, correct_launch

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=case.dtype)

    base, table = empty(1, 128, case.columns), empty(1, 128, case.head_dim)
    plain = CorrectionOperands(
        base, empty(1, 128, 1, width), empty(case.columns, width), empty(), None, None, None, 1.0, 1e-6, 0
    )
    forms = {
        "plain": plain,
        "norm": plain._replace(norm_weight=empty(case.columns)),
        "head": plain._replace(norm_weight=empty(case.head_dim), cos=table, sin=table, head_dim=case.head_dim),
    }
    launches = {}
    for name, operands in forms.items():
        launches[name] = correct_launch(operands, base)
        needs = [operands.head_dim > 0, True, True, True, operands.norm_weight is not None]
        kept = operands._replace(base=base if operands.norm_over_heads else None)
        launches[f"{name}_rows"], launches[f"{name}_cols"] = backward_launches(kept, base, needs)
    return launches
