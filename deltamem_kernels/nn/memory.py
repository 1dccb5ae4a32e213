"""`DeltaMemory`: the memory of one layer, its weights and its forward. The state goes in and comes out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..operands import SegmentOperands
from ..operands.checks import FLOATS, check_bool, check_device, check_float, check_mask, check_shape, fail
from ..ops.attention_correction import attention_correction
from ..ops.delta_update import delta_update
from ..ops.memory_decode import memory_decode
from ..ops.memory_projection import MemoryProjection, memory_projection
from ..ops.segment_mean import segment_mean
from .config import HEADS, DeltaMemConfig
from .writes import Writes, beginnings

SIXTEEN_BITS = (torch.float16, torch.bfloat16)


class MemoryRead(NamedTuple):
    """What `DeltaMemory.read` returns."""

    reads: Tensor
    """`[B, T, H, R]`, float32 (float64 where x is): what the state held for each token's query."""
    state: Tensor
    """`[B, H, R, R]`, likewise: the state after the call. Row = value, column = key."""
    writes: Writes | None
    """What each token wrote; None if tokens wrote nothing, or messages wrote their means."""


class Correction(NamedTuple):
    """What `attention_correction` needs besides base and reads."""

    weight: Tensor
    scale: float | Tensor
    norm_weight: Tensor | None
    norm_eps: float


class DeltaMemory(nn.Module):
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

    def __init__(
        self,
        config: DeltaMemConfig,
        hidden_size: int,
        out_features: dict[str, int],
        base_weights: dict[str, Any] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if not isinstance(config, DeltaMemConfig):
            fail(TypeError, "config", "a DeltaMemConfig", config)
        if not isinstance(out_features, Mapping):
            fail(TypeError, "out_features", f"a dict of {', '.join(HEADS)}", out_features)
        if set(out_features) != set(HEADS):
            got = ", ".join(map(str, out_features)) or "nothing"
            raise ValueError(f"out_features must name {', '.join(HEADS)}, got {got}")
        sizes = {"hidden_size": hidden_size} | {f"out_features[{head!r}]": out_features[head] for head in HEADS}
        for name, size in sizes.items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                fail(ValueError if type(size) is int else TypeError, name, "an int, at least 1", size)
        if dtype not in FLOATS:
            fail(TypeError, "dtype", "float16, bfloat16, float32 or float64", dtype)
        self.config = config
        self.hidden_size = hidden_size
        width = config.num_state_heads * config.rank
        gates = width if config.rankwise_gates else config.num_state_heads

        def parameter(*shape: int, trained: bool = True) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=trained)

        for name in ("q", "k", "v"):
            self.register_parameter(f"memory_{name}_proj", parameter(width, hidden_size))
        for head in HEADS:
            weight = parameter(out_features[head], width, trained=head in config.delta_heads)
            self.register_parameter(f"delta_{head}_proj", weight)
        self.beta_proj, self.beta_bias = parameter(gates, hidden_size), parameter(gates)
        coupled = config.couple_lambda
        self.lambda_proj = None if coupled else parameter(gates, hidden_size)
        self.lambda_bias = None if coupled else parameter(gates)
        scales = len(HEADS) if config.delta_scale_granularity == "head" else 1
        self.delta_scale_raw = parameter(scales) if config.trainable_delta_scale else None
        self.delta_o_rmsnorm_weight = None
        if config.delta_o_rmsnorm:
            self.delta_o_rmsnorm_weight = parameter(out_features["o"], trained="o" in config.delta_heads)
        self.reset_parameters(base_weights)

    @torch.no_grad()
    def reset_parameters(self, base_weights: dict[str, Any] | None = None) -> None:
        """Initialise the weights. The memory is read and written; with output_init "zero" it changes no output."""
        config = self.config
        for name in ("q", "k", "v"):
            nn.init.kaiming_uniform_(getattr(self, f"memory_{name}_proj"), a=math.sqrt(5))
        for head in HEADS:
            weight = getattr(self, f"delta_{head}_proj")
            weight.zero_()
            if head not in config.delta_heads or config.output_init == "zero":
                continue
            if config.output_init == "random":
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5)).mul_(config.online_gain)
                continue
            base = (base_weights or {}).get(head)
            if (
                not isinstance(base, Tensor)
                or not base.is_floating_point()
                or base.ndim != 2
                or base.shape[0] != weight.shape[0]
            ):
                wanted = f"the floating weight [{weight.shape[0]}, in] of {head}_proj, for output_init"
                fail(ValueError, f"base_weights[{head!r}]", f"{wanted} {config.output_init!r}", base)
            columns = min(config.rank, base.shape[1])
            if config.output_init == "base_slice_fixed":
                columns = min(columns, config.base_slice_ref_width)
            weight[:, :columns] = F.normalize(base[:, :columns].to(weight), dim=0, eps=1e-6) * config.online_gain
        self.beta_proj.zero_()
        self.beta_bias.fill_(config.beta_bias_init)
        if self.lambda_proj is not None and self.lambda_bias is not None:
            self.lambda_proj.zero_()
            self.lambda_bias.fill_(-config.beta_bias_init)
        if self.delta_scale_raw is not None:
            share = min(max(config.delta_scale_init / config.delta_scale_max, 1e-4), 1 - 1e-4)
            self.delta_scale_raw.fill_(math.log(share / (1 - share)))
        if self.delta_o_rmsnorm_weight is not None:
            self.delta_o_rmsnorm_weight.fill_(1)

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
        self._check(x, state, mask, write, segment_ids, num_segments, starts)
        config = self.config
        state = self.zeros(x) if state is None else state
        q, k, v, beta, decay = self._project(x)
        mode = config.state_update_mode
        if write and segment_ids is None:
            writes = Writes(k, v, beta, decay, mask, mode, starts)
            return MemoryRead(*writes.scan(q, state), writes)
        if mask is not None:
            q = q.masked_fill(~mask[:, :, None, None], 0)
        if starts is not None:  # sequences after a row's first read zeros
            q = q.masked_fill(beginnings(starts, mask).cumsum(1)[:, :, None, None] > 0, 0)
        with torch.autocast(q.device.type, enabled=False):  # it would round the state
            reads = torch.einsum("bhij,bthj->bthi", state, q)
        if write and segment_ids is not None and num_segments is not None:
            means, written = segment_mean(x, segment_ids, num_segments, mask)
            state = delta_update(*self._project(means), mode=mode, initial_state=state, mask=written).final_state
        return MemoryRead(reads, state, None)

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
        weight, scale, norm_weight, norm_eps = self._correction(head)
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
                state, x, *self._weights(), heads=config.num_state_heads, normalize=config.normalize_qk,
                mode=config.state_update_mode, state_indices=slots,
            ).reads  # fmt: skip
        weight, scale, norm_weight, norm_eps = self._correction(head)
        return memory_decode(
            state, x, *self._weights(), heads=config.num_state_heads, normalize=config.normalize_qk,
            mode=config.state_update_mode, state_indices=slots, base=base, delta_weight=weight, scale=scale,
            norm_weight=norm_weight, norm_eps=norm_eps, out=base,
        ).reads  # fmt: skip

    def _correction(self, head: str) -> Correction:
        """The weight, scale and norm of a head's correction."""
        config = self.config
        scale: float | Tensor = config.alpha / config.rank
        if config.trainable_delta_scale:
            raw = self._weight("delta_scale_raw")
            raw = raw[HEADS.index(head) if config.delta_scale_granularity == "head" else 0]
            scale = scale * (torch.sigmoid(raw) * config.delta_scale_max)
        norm_weight = self._weight("delta_o_rmsnorm_weight") if config.delta_o_rmsnorm and head == "o" else None
        return Correction(self._weight(f"delta_{head}_proj"), scale, norm_weight, config.delta_o_rmsnorm_eps)

    def _project(self, x: Tensor) -> MemoryProjection:
        config = self.config
        return memory_projection(x, *self._weights(), heads=config.num_state_heads, normalize=config.normalize_qk)

    def _weights(self) -> tuple[Any, ...]:
        """The weights in the order of `memory_projection`'s arguments."""
        weight, config = self._weight, self.config
        qkv = weight("memory_q_proj"), weight("memory_k_proj"), weight("memory_v_proj")
        beta, beta_bias = weight("beta_proj"), weight("beta_bias")
        if config.couple_lambda or config.state_update_mode == "no_lambda":  # where λ = 1 with weights or without
            return qkv, beta, beta_bias, None, None
        return qkv, beta, beta_bias, weight("lambda_proj"), weight("lambda_bias")

    def _weight(self, name: str) -> Tensor:
        """A parameter by name. Looking into `_parameters` first takes a fifth of the time of a module's attribute; a
        parameter that is sharded or parametrised is not there."""
        parameter = self._parameters.get(name)
        return getattr(self, name) if parameter is None else parameter

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DeltaMemory:
        """Apply a cast or a move of a model to the weights and their gradients, but no cast to 16 bits."""

        def keep_precision(x: Tensor) -> Tensor:
            changed = fn(x)
            is_rounded = changed.dtype in SIXTEEN_BITS and x.dtype not in SIXTEEN_BITS
            return x.to(changed.device) if is_rounded else changed

        return super()._apply(keep_precision, recurse)

    def extra_repr(self) -> str:
        config = self.config
        corrected = ", ".join(config.delta_heads) or "nothing"
        return f"hidden={self.hidden_size}, heads={config.num_state_heads}, rank={config.rank}, corrects {corrected}"
