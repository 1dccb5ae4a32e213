"""Launches of the kernels in maps.py: the states between the chunks of every sequence, or their gradients."""

from __future__ import annotations

import triton
from torch import Tensor

from . import maps
from ._chunks import mask_spans_kernel
from .launch import LANES, constants, strides, tiling

GROUP = 128
"""Chunks of a group. A sequence with more than one group folds within all its groups at once."""


def launches_before(
    scan: dict, cu_seqlens: Tensor | None, d_reads: Tensor | None, end: Tensor | None, out: Tensor | None, mode: str
) -> list[tuple]:
    """Kernel, programs and arguments of each launch that the scan with the arguments `scan` needs before its own; none
    if it is not chunked. They find what the mask leaves, and fill the slots of `out` `[B, T // 64, H, R, R]`: with the
    states before the chunks, from those `end` `[N, H, R, R]` before the first tokens; with d_reads, with the gradients
    of those states, from those of the final states."""
    launches: list[tuple] = []
    if not scan["CHUNKED"] or out is None:
        return launches
    if scan["SPAN"] == 3:
        spans = {name: scan[name] for name in ("p_spans", "p_mask", "T", "mask_sb", "mask_st")}
        cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
        spans |= {"p_cu_seqlens": cu_seqlens, "BLOCK": 1024, "num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
        launches.append((mask_spans_kernel, scan["N"], spans))
    H, R = out.shape[2:4]
    slots = out.shape[0] * out.shape[1]
    virtual_heads = H * (R + 1)
    tiles = tiling(virtual_heads, R)
    chunk_maps = out.new_empty((slots, virtual_heads, R, R))
    arguments = {name: scan[name] for name in maps.chunk_maps_kernel.arg_names if name in scan}
    arguments |= {"p_maps": chunk_maps, "p_d_reads": d_reads} | strides("d_reads", d_reads, "bthr")
    arguments |= constants(mode, R) | tiles
    launches.append((maps.chunk_maps_kernel, slots * triton.cdiv(virtual_heads, tiles["HEADS"]), arguments))

    columns = triton.next_power_of_2(R)
    rows = max(LANES // columns, 1)
    folds = {name: scan[name] for name in ("p_spans", "SPAN", "N", "T", "H", "CHUNK", "R")} | {"GROUP": GROUP}
    folds |= {"REVERSE": d_reads is not None, "LANES": rows * columns, "C": columns}
    folds |= {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": True}
    ends = folds | {"p_end": end} | strides("end", end, "nhrc")
    group_states, group_slots = None, slots // GROUP + scan["N"]
    if out.shape[1] > GROUP:  # else no sequence can have two groups
        group_maps = out.new_empty((group_slots, virtual_heads, R, R))
        group_states = out.new_empty((group_slots, H, R, R))
        programs = group_slots * triton.cdiv(virtual_heads * R, rows)
        launches.append((maps.group_maps_kernel, programs, folds | {"p_groups": group_maps, "p_maps": chunk_maps}))
        arguments = {"p_states": group_states, "p_group_states": None, "p_maps": group_maps, "GROUPS": True}
        launches.append((maps.fold_kernel, scan["N"] * triton.cdiv(H * R, rows), ends | arguments))
    arguments = {"p_states": out, "p_group_states": group_states, "p_maps": chunk_maps, "GROUPS": False}
    launches.append((maps.fold_kernel, group_slots * triton.cdiv(H * R, rows), ends | arguments))
    return launches
