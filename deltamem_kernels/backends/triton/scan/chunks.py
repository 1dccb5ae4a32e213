"""Functions for kernels: where the chunks of a sequence lie, and which program works on which.

Chunks are counted from a sequence's own start, so that it has the same bits alone, packed and in any batch. Chunk i of
a sequence, from 1 on, has slot `first_slot + i`, which holds the state before the chunk, the gradient of that state, or
the map that leads to it. From chunk 1 on, GROUP consecutive chunks make a group.
"""

import triton
import triton.language as tl

from .tiles import sequence_bounds


@triton.jit
def first_slot(p_spans, i_n, T, SPAN: tl.constexpr, CHUNK: tl.constexpr):
    """Return first_slot of sequence i_n: its chunk i, from 1 on, has slot first_slot + i. A batch row has T // CHUNK
    slots. Rounding the start down leaves each sequence enough of them, whatever the lengths of the others."""
    i_b, start, _ = sequence_bounds(p_spans, i_n, T, SPAN)
    return i_b * (T // CHUNK) + start // CHUNK - 1


@triton.jit
def first_group(p_spans, i_n, T, SPAN: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr):
    """Return the slot of the first group of sequence i_n. In all there are N + (slots of chunks) // GROUP."""
    return (first_slot(p_spans, i_n, T, SPAN, CHUNK) + 1) // GROUP + i_n


@triton.jit
def sequence_of(i_slot, p_spans, N, T, SPAN: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr):
    """Return the only sequence that a chunk's slot, or with GROUP > 1 a group's slot, can belong to: the last one that
    begins there or before."""
    low, high = i_slot * 0, i_slot * 0 + N
    while high - low > 1:
        middle = (low + high) // 2
        if GROUP > 1:
            beyond = first_group(p_spans, middle, T, SPAN, CHUNK, GROUP) > i_slot
        else:
            beyond = first_slot(p_spans, middle, T, SPAN, CHUNK) + 1 > i_slot
        low, high = tl.where(beyond, low, middle), tl.where(beyond, middle, high)
    return low


@triton.jit
def chunks_of(p_spans, i_n, T, SPAN: tl.constexpr, CHUNK: tl.constexpr):
    """Return the number of chunks of a sequence."""
    _, start, stop = sequence_bounds(p_spans, i_n, T, SPAN)
    return tl.cdiv(stop - start, CHUNK)


@triton.jit
def work_of(i_w, p_spans, N, T, SPAN: tl.constexpr, CHUNK: tl.constexpr, CHUNKED: tl.constexpr):
    """Return what piece of work i_w is: its sequence, with the batch row, tokens [start, stop) and first_slot of that
    one, and the chunks [first, last) to work on.

    If not CHUNKED, each of the N pieces is a whole sequence. If CHUNKED, the first N pieces are the sequences' first
    chunks and the others are the chunks of the slots, with first = last = -1 for a slot that is not in use."""
    if CHUNKED:
        i_free = i_w - N
        i_n = tl.where(i_free < 0, i_w, sequence_of(tl.maximum(i_free, 0), p_spans, N, T, SPAN, CHUNK, 1))
    else:
        i_free = i_w * 0 - 1
        i_n = i_w
    i_b, start, stop = sequence_bounds(p_spans, i_n, T, SPAN)
    i_slot = first_slot(p_spans, i_n, T, SPAN, CHUNK)
    i_first = tl.where(i_free < 0, 0, i_free - i_slot)
    i_last = tl.cdiv(stop - start, CHUNK)
    if CHUNKED:
        in_use = (i_first > 0) & (i_first < i_last)  # i_first < 1 in a slot before the first sequence's
        i_last = tl.where(i_free < 0, tl.minimum(i_last, 1), tl.where(in_use, i_first + 1, -1))
        i_first = tl.where((i_free < 0) | in_use, i_first, -1)
    return i_n, i_b, start, stop, i_slot, i_first, i_last
