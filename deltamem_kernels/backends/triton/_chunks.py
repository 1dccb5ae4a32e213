"""Where the chunks of a sequence lie, and which program works on what.

Chunks are counted from a sequence's own start, so that it has the same bits alone, packed or in any batch. What is kept
for chunk i of a sequence, from 1 on, lies in slot `first_slot + i`: the state before it, the gradient of that state,
the map from one such state to the next. GROUP chunks after each other, from 1 on, make a group.
"""

import triton
import triton.language as tl

from ._rule import sequence_bounds


@triton.jit
def first_slot(p_spans, i_n, T, SPAN: tl.constexpr, CHUNK: tl.constexpr):
    """Chunk i of sequence i_n, from 1 on, has slot first_slot + i, of T // CHUNK for each row of the batch: rounding
    the start down leaves every sequence the room it needs, whatever the others' lengths."""
    i_b, start, _ = sequence_bounds(p_spans, i_n, T, SPAN)
    return i_b * (T // CHUNK) + start // CHUNK - 1


@triton.jit
def first_group(p_spans, i_n, T, SPAN: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr):
    """The slot of the first group of sequence i_n, of N + the slots of chunks // GROUP in all."""
    return (first_slot(p_spans, i_n, T, SPAN, CHUNK) + 1) // GROUP + i_n


@triton.jit
def sequence_of(i_slot, p_spans, N, T, SPAN: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr):
    """The sequence that a slot of a chunk, or with GROUP > 1 of a group, can belong to: the last that begins there or
    before."""
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
    """How many chunks a sequence has."""
    _, start, stop = sequence_bounds(p_spans, i_n, T, SPAN)
    return tl.cdiv(stop - start, CHUNK)


@triton.jit
def work_of(i_w, p_spans, N, T, SPAN: tl.constexpr, CHUNK: tl.constexpr, CHUNKED: tl.constexpr):
    """Of a piece of work: sequence, its batch row, its tokens [start, stop), its first_slot, and chunks [first, last).

    Not CHUNKED, each of N pieces is a whole sequence. CHUNKED, the first N are the sequences' first chunks; the others
    are the chunks of the slots, with first = last = -1 where a slot is not in use."""
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
        in_use = (i_first > 0) & (i_first < i_last)  # a slot before the first sequence's has i_first < 1
        i_last = tl.where(i_free < 0, tl.minimum(i_last, 1), tl.where(in_use, i_first + 1, -1))
        i_first = tl.where((i_free < 0) | in_use, i_first, -1)
    return i_n, i_b, start, stop, i_slot, i_first, i_last


@triton.jit(do_not_specialize=["p_mask", "p_cu_seqlens", "T", "mask_sb", "mask_st"])
def mask_spans_kernel(p_spans, p_mask, p_cu_seqlens, T, mask_sb, mask_st, BLOCK: tl.constexpr):
    """Of each sequence the row, the first token that counts, and the end of the last: padding then moves no chunk."""
    T = tl.cast(T, tl.int64)
    i_n = tl.program_id(0).to(tl.int64)
    i_b, start, stop = sequence_bounds(p_cu_seqlens, i_n, T, 1)
    b_start, b_stop = tl.zeros([BLOCK], tl.int64) + stop, tl.zeros([BLOCK], tl.int64) + start
    for i in range(start, stop, BLOCK):
        i_t = i + tl.arange(0, BLOCK).to(tl.int64)
        m_t = tl.load(p_mask + i_b * mask_sb + i_t * mask_st, mask=i_t < stop, other=0) != 0
        b_start, b_stop = tl.where(m_t, tl.minimum(b_start, i_t), b_start), tl.where(m_t, i_t + 1, b_stop)
    start = tl.min(b_start, axis=0)
    tl.store(p_spans + i_n * 3, i_b)
    tl.store(p_spans + i_n * 3 + 1, start)
    tl.store(p_spans + i_n * 3 + 2, tl.maximum(tl.max(b_stop, axis=0), start))  # none counts: an empty one at the end
