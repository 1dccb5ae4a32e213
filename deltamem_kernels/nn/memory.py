"""`DeltaMemory`: the memory of one layer, its weights and its forward. The state goes in and comes out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..backends.reference.scan import gates as gates_of
from ..operands import SegmentOperands
from ..operands.checks import check_bool, check_device, check_float, check_mask, check_shape, fail
from ..ops.attention_correction import attention_correction
from ..ops.delta_update import delta_update
from ..ops.layer_step import layer_step
from ..ops.memory_decode import memory_decode
from ..ops.memory_projection import MemoryProjection, memory_projection
from ..ops.segment_mean import segment_mean
from .config import HEADS
from .weights import MemoryWeights
from .writes import Writes, beginnings


class MemoryRead(NamedTuple):
    """What `DeltaMemory.read` returns."""

    reads: Tensor
    """`[B, T, H, R]`, float32 (float64 where x is): what the state held for each token's query."""
    state: Tensor
    """`[B, H, R, R]`, likewise: the state after the call. Row = value, column = key."""
    writes: Writes | None
    """What each token wrote; None if tokens wrote nothing, or messages wrote their means."""


class Gates(NamedTuple):
    """The gates of the tokens of a call, or of its messages or sentences where these write."""

    beta: Tensor
    """`[B, T, H, R]` or `[B, T, H]`: β. Differentiable."""
    keep: Tensor
    """Likewise: how much of the state is kept."""
    written: Tensor | None
    """`[B, T]` bool, False where nothing was written; None if every token was written."""


class MemoryOutput(NamedTuple):
    """What a call of `DeltaMemory` returns: a `MemoryRead`, and the corrections."""

    reads: Tensor
    state: Tensor
    writes: Writes | None
    corrections: dict[str, Tensor]
    """For each corrected head, `[B, T, out]`, float32 (float64 where x is), to be added to the projection's output."""
    gates: Gates | None
    """The gates of what was written, if they were asked for and something was written."""


class DeltaMemory(MemoryWeights):
    """The memory of one attention layer (δ-mem, arXiv 2605.12357). It holds weights and no state.

    The weights have the names of the authors' code (H heads, rank R, G = H·R gates, or H without rankwise_gates):
    memory_q_proj, memory_k_proj, memory_v_proj `[H·R, hidden]`; delta_q_proj … delta_o_proj `[out, H·R]`, which are
    zero and not trained where they correct nothing; beta_proj `[G, hidden]`, beta_bias `[G]`; lambda_proj and
    lambda_bias likewise, if λ is not coupled; delta_scale_raw `[1]` or `[4]`, if the scale is trained;
    delta_o_rmsnorm_weight `[out of o]`, if there is that norm.

    Args:
        config: the configuration of the memory.
        hidden_size: the size of the hidden states that it reads.
        out_features: the output size of each projection that may be corrected, by the names "q", "k", "v" and "o".
        base_weights: the weights of these projections, `[out, in]`, floating point. Required only if output_init is
            "base_slice" or "base_slice_fixed".
        device, dtype: of the weights. Use float32 also with a backbone of 16 bits or a quantised one.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Note:
        Casting a model to 16 bits, with `half()`, `bfloat16()` or `to(torch.bfloat16)`, leaves float32 and float64
        weights of its memory as they are. Only weights that have 16 bits already are cast. Other casts, such as
        `double()` and `float()`, and moves to a device apply to every memory.
    """

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        write: bool = True,
        segment_ids: Tensor | None = None,
        num_segments: int | None = None,
        starts: Tensor | None = None,
        return_gates: bool = False,
    ) -> MemoryOutput:
        """Read and write the memory as `read` does, and compute the correction of each corrected head.

        Hooks, parametrizations, FSDP and offloading apply to a call of the module. `read` and `correct` give the same
        without them; `correct` fuses a correction with its addition.

        Args:
            x, state, mask, write, segment_ids, num_segments, starts: as for `read`.
            return_gates: whether to return the gates.

        Returns:
            MemoryOutput: reads, the new state, what was written, the corrections, and the gates. One token without
            gradients takes one native call on a CPU, and then `writes` is None.

        Raises:
            TypeError, ValueError: an argument does not fit; nothing has run.
        """
        only_tokens = segment_ids is None and starts is None and not return_gates
        if only_tokens and x.ndim == 3 and x.shape[1] == 1 and not torch.is_grad_enabled() and not is_compiling():
            collected = self.collect_weights()
            step = layer_step(x, state, mask, collected.weights)
            after = step.state
            if not write:
                after = self.zeros(x) if state is None else state
            of_heads = dict(zip(collected.heads, step.corrections, strict=True))
            return MemoryOutput(step.reads, after, None, of_heads, None)
        reads, after, writes, gates = self._read(
            x, state, mask, write, segment_ids, num_segments, starts, return_gates=return_gates
        )
        zero = reads.new_zeros(())
        corrections = {}
        for head in self.config.delta_heads:
            base = zero.expand(*x.shape[:-1], self.weight(f"delta_{head}_proj").shape[0])
            corrections[head] = self.correct(base, reads, head)
        return MemoryOutput(reads, after, writes, corrections, gates)

    def read(
        self,
        x: Tensor,
        state: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        write: bool = True,
        segment_ids: Tensor | None = None,
        num_segments: int | None = None,
        starts: Tensor | None = None,
    ) -> MemoryRead:
        """Read the memory for each token, and write it.

        Args:
            x: the layer's hidden states, `[B, T, hidden]`, any float dtype.
            state: `[B, H, R, R]`, float32 (float64 where x is); None means zeros.
            mask: `[B, T]` bool. A token that is False reads zeros and writes nothing.
            write: False leaves the state as it is, and every token reads that state.
            segment_ids: `[B, T]` int32 or int64. With it a message (or sentence) writes once, its mean hidden state, in
                the order of the ids. A negative id writes nothing, and every token reads the state from before the
                call. Without it each token writes, and reads what the tokens before it left.
            num_segments: more than the largest id; required with segment_ids.
            starts: `[B, T]` bool, for rows that hold several sequences: True where one begins, from zeros. A row's
                first sequence continues from its state, and the new state is that of its last sequence.

        Returns:
            MemoryRead: reads, the new state, and what was written. Differentiable in x, state and the weights.

        Raises:
            TypeError, ValueError: an argument does not fit; nothing has run.
        """
        return MemoryRead(*self._read(x, state, mask, write, segment_ids, num_segments, starts)[:3])

    def _read(
        self,
        x: Tensor,
        state: Tensor | None,
        mask: Tensor | None,
        write: bool,
        segment_ids: Tensor | None,
        num_segments: int | None,
        starts: Tensor | None,
        *,
        return_gates: bool = False,
    ) -> tuple[Tensor, Tensor, Writes | None, Gates | None]:
        self._check(x, state, mask, write, segment_ids, num_segments, starts)
        config = self.config
        state = self.zeros(x) if state is None else state
        q, k, v, beta, decay = self._project(x)
        mode = config.state_update_mode
        if write and segment_ids is None:
            writes = Writes(k, v, beta, decay, mask, mode, starts)
            return *writes.scan(q, state), writes, self._gates(beta, decay, mask) if return_gates else None
        if mask is not None:
            q = q.masked_fill(~mask[:, :, None, None], 0)
        if starts is not None:  # sequences after a row's first read zeros
            q = q.masked_fill(beginnings(starts, mask).cumsum(1)[:, :, None, None] > 0, 0)
        with torch.autocast(q.device.type, enabled=False):  # it would round the state
            reads = torch.einsum("bhij,bthj->bthi", state, q)
        if not write or segment_ids is None or num_segments is None:
            return reads, state, None, None
        means, written = segment_mean(x, segment_ids, num_segments, mask)
        mean = self._project(means)
        state = delta_update(*mean, mode=mode, initial_state=state, mask=written).final_state
        return reads, state, None, self._gates(mean.beta, mean.decay, written) if return_gates else None

    def _gates(self, beta: Tensor, decay: Tensor | None, written: Tensor | None) -> Gates:
        return Gates(beta, gates_of(self.config.state_update_mode, beta, decay, None)[0], written)

    def zeros(self, x: Tensor) -> Tensor:
        """Return the state that x starts from: zeros `[B, H, R, R]`, float32, or float64 where x is."""
        heads, rank = self.config.num_state_heads, self.config.rank
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return x.new_zeros((x.shape[0], heads, rank, rank), dtype=dtype)

    def correct(self, base: Tensor, reads: Tensor, head: str, *, out: Tensor | None = None) -> Tensor:
        """Correct the output of a projection by the reads; return `base` itself if the head is not corrected.

        Args:
            base: `[B, T, out]`, the output of the projection.
            reads: `[B, T, H, R]`, from `read`.
            head: "q", "k", "v" or "o".
            out: gets the result, and may be `base` itself; None allocates.

        Returns:
            `base + scale · reads Wᵀ`, with the RMSNorm of o's correction if there is one, in base's dtype.

        Raises:
            TypeError, ValueError: an argument does not fit; nothing has run.
        """
        if head not in HEADS:
            raise ValueError(f"head must be one of {', '.join(HEADS)}, got {head!r}")
        if head not in self.config.delta_heads:
            return base if out is None or out is base else out.copy_(base)
        weight, scale, norm_weight, norm_eps = self.correction_of(head)
        return attention_correction(base, reads, weight, scale, norm_weight=norm_weight, norm_eps=norm_eps, out=out)

    def step(
        self,
        x: Tensor,
        state: Tensor,
        *,
        slots: Tensor | None = None,
        head: str | None = None,
        base: Tensor | None = None,
    ) -> Tensor:
        """Decode one token for each of many requests: `read` and a `correct` in one call, in place, without gradients.

        Args:
            x: the layer's hidden states, `[N, hidden]`, any float dtype.
            state: `[slots, H, R, R]`, any float dtype: the requests' states, updated in place.
            slots: `[N]` int32 or int64, the slot of each request's state; a request at -1 reads zeros and writes
                nothing. None means slot n for row n.
            head: the projection that base is the output of, "q", "k", "v" or "o".
            base: `[N, out]`, corrected in place if that head is corrected; None corrects nothing.

        Returns:
            The reads, `[N, H, R]`, float32, or float64 if x or a weight is.

        Raises:
            TypeError, ValueError: an argument does not fit; nothing has run.
        """
        if (head is None) != (base is None) or not (head is None or head in HEADS):
            raise ValueError(f"head must be one of {', '.join(HEADS)} and given with base, got {head!r}")
        config = self.config
        if head is None or head not in config.delta_heads:
            return memory_decode(
                state, x, *self.projection_weights(), heads=config.num_state_heads, normalize=config.normalize_qk,
                mode=config.state_update_mode, state_indices=slots,
            ).reads  # fmt: skip
        weight, scale, norm_weight, norm_eps = self.correction_of(head)
        return memory_decode(
            state, x, *self.projection_weights(), heads=config.num_state_heads, normalize=config.normalize_qk,
            mode=config.state_update_mode, state_indices=slots, base=base, delta_weight=weight, scale=scale,
            norm_weight=norm_weight, norm_eps=norm_eps, out=base,
        ).reads  # fmt: skip

    def _project(self, x: Tensor) -> MemoryProjection:
        config = self.config
        weights = self.projection_weights()
        return memory_projection(x, *weights, heads=config.num_state_heads, normalize=config.normalize_qk)

    def _check(self, x, state, mask, write, segment_ids, num_segments, starts) -> None:
        """Raise TypeError or ValueError if an argument of `read` does not fit."""
        check_float("x", x, f"[B, T, hidden={self.hidden_size}]")
        if x.ndim != 3 or x.shape[2] != self.hidden_size:
            fail(ValueError, "x", f"[B, T, hidden={self.hidden_size}]", x)
        if state is not None:
            heads, rank = self.config.num_state_heads, self.config.rank
            check_float("state", state, "[B, H, R, R]")
            check_shape("state", state, ((x.shape[0], heads, rank, rank),), "[B, H, R, R]")
            if state.dtype not in (torch.float32, torch.float64):
                fail(TypeError, "state", "float32 or float64", state)
            check_device("state", state, x.device, "x")
        if mask is not None:
            check_mask(mask, (x.shape[0], x.shape[1]), ("x", x))
        check_bool("write", write)
        if (segment_ids is None) != (num_segments is None):
            missing = "num_segments" if num_segments is None else "segment_ids"
            raise ValueError(f"segment_ids and num_segments go together, got no {missing}")
        if segment_ids is not None:
            SegmentOperands(x, segment_ids, num_segments, mask).check()
        if starts is not None:
            if not isinstance(starts, Tensor) or starts.dtype != torch.bool or starts.device != x.device:
                fail(TypeError, "starts", f"a bool tensor [B, T] on x's device {x.device}", starts)
            check_shape("starts", starts, ((x.shape[0], x.shape[1]),), "[B, T]")
            if segment_ids is not None:
                fail(ValueError, "starts", "None where messages or sentences write, which belong to a row", starts)

    def extra_repr(self) -> str:
        config = self.config
        corrected = ", ".join(config.delta_heads) or "nothing"
        return f"hidden={self.hidden_size}, heads={config.num_state_heads}, rank={config.rank}, corrects {corrected}"


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a DeltaMemory that may be used without calling it: nothing wraps it, and it has no hooks."""
    return (
        type(module) is DeltaMemory
        and "forward" not in module.__dict__
        and not (module._forward_pre_hooks or module._forward_hooks)
        and not (module._backward_pre_hooks or module._backward_hooks)
    )
