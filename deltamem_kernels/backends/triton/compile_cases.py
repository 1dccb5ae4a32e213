"""Which kernels the report compiles, and with what arguments: those of a launch, on tensors nothing is read from."""

from __future__ import annotations

import itertools

import torch

from ..scan import MAP_RANK, force_scan
from .compile_report import ARCHS, Row, row

TOKENS = 16384
"""Enough for groups of chunks; nothing runs."""


def scan_report(
    archs: tuple[int, ...] = ARCHS,
    ranks: tuple[int, ...] = (4, 8, 16),
    heads: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    mode: str = "standard",
    free_decay: bool = False,
    per_head: bool = False,
    mask: bool = False,
    cu_seqlens: bool = False,
    chunked: bool = True,
    loops: bool = True,
) -> list[Row]:
    """The kernels of the delta rule for each arch (90 is sm_90) and rank: forward with saved states, backward with all
    gradients, with `chunked` (up to the rank where that pays) the same in chunks with what is launched before them, a
    step with all it can be given (there is none in mode "affine", masked or packed); the operands in `dtype`, the state
    in the dtype of the arithmetic. `loops`: as of `row`."""
    rows = []
    for rank in ranks:
        operands = _operands(rank, heads, dtype, mode, free_decay, per_head, mask, cu_seqlens)
        kernels = _scans(operands, mode)
        if chunked and rank <= MAP_RANK:
            kernels += _chunked_scans(operands, mode)
        if mode != "affine" and not mask and not cu_seqlens:
            kernels.append(_step(operands, mode))
        rows += [row(name, rank, arch, *launch, loops) for arch in archs for name, *launch in kernels]
    return rows


def _scans(operands: list, mode: str, chunked: bool = False) -> list[tuple]:
    """Name, kernel and arguments."""
    from . import delta_update

    needs = [x is not None for x in operands[:7]]
    with force_scan(chunked):
        launches, _ = delta_update.forward_launches(*operands, mode, True)
        forward = launches[-1][2]
        _, backward = delta_update.backward_arguments(
            forward["p_reads"], forward["p_final"], *operands, forward["p_checkpoints"], mode, needs
        )
    of = " of chunks" if chunked else ""
    return [
        (f"forward{of}", delta_update.delta_update_forward_kernel, forward),
        (f"backward{of}", delta_update.delta_update_backward_kernel, backward),
    ]


def _chunked_scans(operands: list, mode: str) -> list[tuple]:
    from .chunked import launches_before

    cu_seqlens = operands[8]
    (_, _, forward), (_, _, backward) = scans = _scans(operands, mode, chunked=True)
    kernels = []
    for arguments, d_reads, end, out, of in (
        (forward, None, forward["p_initial"], forward["p_checkpoints"], ""),
        (backward, backward["p_d_reads"], backward["p_d_final"], backward["p_ends"], " adjoint"),
    ):
        launches = launches_before(arguments, cu_seqlens, d_reads, end, out, mode)
        names = [f"maps{of}", f"fold maps{of}", f"fold groups{of}", f"fold{of}"]
        if arguments["SPAN"] == 3:
            names.insert(0, f"mask{of}")
        kernels += [(name, kernel, given) for name, (kernel, _, given) in zip(names, launches, strict=True)]
    return [*kernels, *scans]


def _step(operands: list, mode: str) -> tuple:
    from . import step

    q, k, v, beta, decay, _, state = operands[:7]
    slots = torch.zeros(q.shape[:2], dtype=torch.int32)
    states = state.new_empty(*q.shape, q.shape[-1])
    _, arguments = step.step_arguments(
        state, q, k, v, beta, decay, slots, slots[:, 0], states, q, mode, pad_slot_id=-1, update_state=True
    )
    return "step", step.delta_step_kernel, arguments


def _operands(rank, heads, dtype, mode, free_decay, per_head, mask, cu_seqlens) -> list[torch.Tensor | None]:
    """Operands of the ops in their order; only dtypes, shapes and strides matter."""
    B, T = 1, TOKENS
    q, k, v = (torch.empty(B, T, heads, rank, dtype=dtype) for _ in range(3))
    beta, decay, write = (q[..., 0] if per_head else q for _ in range(3))
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return [
        q,
        k,
        v,
        beta,
        decay if free_decay or mode == "affine" else None,
        write if mode == "affine" else None,
        torch.empty(B, heads, rank, rank, dtype=state_dtype),
        torch.ones(B, T, dtype=torch.bool) if mask else None,
        torch.zeros(B + 1, dtype=torch.int32) if cu_seqlens else None,
    ]


def layer_report(
    archs: tuple[int, ...] = ARCHS,
    ranks: tuple[int, ...] = (4, 8, 16),
    heads: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    weight_dtype: torch.dtype = torch.float32,
    free_decay: bool = True,
    per_head: bool = False,
    mask: bool = True,
    loops: bool = True,
) -> list[Row]:
    """The kernels of memory_projection (many tokens, few, and what backward launches), of memory_decode, of
    memory_prefill and of segment_mean."""
    from . import decode, memory_projection, prefill, projection, segments

    B, T, D, M = 1, 128, 256, 4
    rows = []
    for rank in ranks:
        H = heads
        gates = H if per_head else H * rank
        weights = [torch.empty(n, D, dtype=weight_dtype) for n in (3 * H * rank, gates, gates)]
        biases = [w[:, 0] for w in weights]
        kernels = []
        for name, tokens in (("projection", T), ("projection of a token", 1)):
            operands = (*weights[:2], biases[1], *((weights[2], biases[2]) if free_decay else (None, None)), H, True)
            kernel, _, forward = memory_projection.forward_arguments(torch.empty(B, tokens, D, dtype=dtype), *operands)
            kernels.append((name, kernel, forward))
        results = [kernels[0][2][f"p_{name}"] for name in ("q", "k", "v", "beta", "decay")]
        saved = [results[0], results[1], *results[3:], kernels[0][2]["p_norms"]]
        cotangents = results if free_decay else [*results[:4], None]
        _, adjoint = memory_projection.adjoint_arguments(*cotangents, *saved)
        kernels.append(("projection adjoint", projection.memory_projection_adjoint_kernel, adjoint))
        _, to_x = memory_projection.input_arguments(adjoint["p_dprojected"], weights[: 2 + free_decay], dtype)
        kernels.append(("projection to x", projection.memory_projection_input_kernel, to_x))
        pool, slots = torch.empty(M, H, rank, rank), torch.zeros(T, dtype=torch.int32)
        _, step = decode.decode_arguments(pool, torch.empty(T, D, dtype=dtype), *operands[:5], slots, *operands[5:],
                                          "standard", -1)  # fmt: skip
        kernels.append(("decode", decode.memory_decode_kernel, step))
        x, ids = torch.empty(B, T, D, dtype=dtype), torch.zeros(B, T, dtype=torch.int64)
        *operands, of_heads, normalize = operands
        launches, _ = prefill.prefill_launches(x, *operands, None, None, None, of_heads, normalize, "standard", False)
        if launches[0][0] is prefill.memory_prefill_kernel:
            kernels.append(("prefill", prefill.memory_prefill_kernel, launches[0][2]))
        tokens = torch.ones(B, T, dtype=torch.bool) if mask else None
        _, means = segments.forward_arguments(x, ids, M, tokens)
        kernels.append(("segments", segments.segment_mean_kernel, means))
        _, to_x = segments.backward_arguments(means["p_means"], ids, means["p_counts"], tokens)
        kernels.append(("segments backward", segments.segment_mean_backward_kernel, to_x))
        rows += [
            row(name, rank, arch, *launch, loops)
            for arch in archs
            for name, *launch in kernels
            if rank == ranks[0] or "segments" not in name  # these know no rank
        ]
    return rows


def correction_report(
    archs: tuple[int, ...] = ARCHS,
    ranks: tuple[int, ...] = (8, 32),
    dtype: torch.dtype = torch.bfloat16,
    columns: int = 2560,
    head_dim: int = 128,
    loops: bool = True,
) -> list[Row]:
    """The kernels of the correction in three forms, and of their backward with all gradients; a row's rank is H·R."""
    from . import correction

    rows = []
    for rank, (form, norm, head, rope) in itertools.product(
        ranks, (("plain", 0, 0, False), ("norm", columns, 0, False), ("head", head_dim, head_dim, True))
    ):
        base = torch.empty(1, 128, columns, dtype=dtype)
        table = torch.empty(1, 128, head_dim, dtype=dtype) if rope else None
        operands = (
            base if norm and head else None,
            torch.empty(1, 128, 1, rank, dtype=dtype),
            torch.empty(columns, rank, dtype=dtype),
            torch.empty((), dtype=dtype),
            torch.empty(norm, dtype=dtype) if norm else None,
            *(table, table, 1.0, 1e-6, head),
        )
        _, forward = correction.correct_arguments(base, *operands[1:], base)
        needs = [head > 0, True, True, True, norm > 0]
        (_, by_row), (_, by_column) = correction.backward_arguments(base, *operands, needs)
        kernels = (
            (f"{form}", correction.correct_kernel, forward),
            (f"{form}_rows", correction.backward_rows_kernel, by_row),
            (f"{form}_cols", correction.backward_columns_kernel, by_column),
        )
        rows += [row(name, rank, arch, *launch, loops) for arch in archs for name, *launch in kernels]
    return rows
