"""The weights of the memory of one layer: their names, shapes, dtypes and initial values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..operands import LayerStepWeights
from ..operands.checks import FLOATS, fail
from .config import HEADS, DeltaMemConfig

SIXTEEN_BITS = (torch.float16, torch.bfloat16)


class Correction(NamedTuple):
    """What `attention_correction` needs besides base and reads."""

    weight: Tensor
    scale: float | Tensor
    norm_weight: Tensor | None
    norm_eps: float


class Collected(NamedTuple):
    """The weights for `layer_step`, and what they were collected from."""

    config: DeltaMemConfig
    heads: list[str]
    """The corrected heads, in the order of q, k, v and o."""
    parameters: tuple[Tensor | None, ...]
    """Empty if some weights are not parameters."""
    weights: LayerStepWeights


class MemoryWeights(nn.Module):
    """The weights of `DeltaMemory`, which documents them and the arguments."""

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
        self._collected: Collected | None = None
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
        self._registered = len(self._parameters)
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

    def correction_of(self, head: str) -> Correction:
        """The weight, scale and norm of a head's correction."""
        config = self.config
        scale = self.gain(head) if config.trainable_delta_scale else config.alpha / config.rank
        norm_weight = self.weight("delta_o_rmsnorm_weight") if config.delta_o_rmsnorm and head == "o" else None
        return Correction(self.weight(f"delta_{head}_proj"), scale, norm_weight, config.delta_o_rmsnorm_eps)

    def gain(self, head: str) -> Tensor:
        """The trained scale of a head's correction."""
        config, raw = self.config, self.weight("delta_scale_raw")
        raw = raw[HEADS.index(head) if config.delta_scale_granularity == "head" else 0]
        return config.alpha / config.rank * (torch.sigmoid(raw) * config.delta_scale_max)

    def projection_weights(
        self,
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor, Tensor | None, Tensor | None]:
        """The weights in the order of `memory_projection`'s arguments."""
        weight, config = self.weight, self.config
        qkv = weight("memory_q_proj"), weight("memory_k_proj"), weight("memory_v_proj")
        beta, beta_bias = weight("beta_proj"), weight("beta_bias")
        if config.couple_lambda or config.state_update_mode == "no_lambda":  # where λ = 1 with weights or without
            return qkv, beta, beta_bias, None, None
        return qkv, beta, beta_bias, weight("lambda_proj"), weight("lambda_bias")

    def collect_weights(self) -> Collected:
        """Return the weights as `layer_step` takes them. They are collected again if a parameter or the configuration
        was replaced, or if some are not parameters but computed, as under a parametrization."""
        kept, parameters = self._collected, self._parameters
        if (
            kept is None
            or kept.config is not self.config
            or len(kept.parameters) != len(parameters)
            or not all(map(is_, kept.parameters, parameters.values()))
        ):
            kept = self._collected = self._collect()
        if kept.config.trainable_delta_scale:
            gains = [self.gain(head) for head in kept.heads]
            return kept._replace(weights=kept.weights._replace(gains=gains, scale=1.0))
        return kept

    def _collect(self) -> Collected:
        config, heads = self.config, [head for head in HEADS if head in self.config.delta_heads]
        has_norm = config.delta_o_rmsnorm and "o" in heads  # o's correction is the last
        weights = LayerStepWeights(
            *self.projection_weights(), [self.weight(f"delta_{head}_proj") for head in heads], [],
            self.weight("delta_o_rmsnorm_weight") if has_norm else None, config.num_state_heads, config.normalize_qk,
            config.state_update_mode, config.alpha / config.rank, config.delta_o_rmsnorm_eps,
        )  # fmt: skip
        are_parameters = len(self._parameters) == self._registered
        return Collected(config, heads, tuple(self._parameters.values()) if are_parameters else (), weights)

    def weight(self, name: str) -> Tensor:
        """A parameter by name. Looking into `_parameters` first takes a fifth of the time of a module's attribute; a
        parameter that is sharded or parametrised is not there."""
        parameter = self._parameters.get(name)
        return getattr(self, name) if parameter is None else parameter

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MemoryWeights:
        """Apply a cast or a move of a model to the weights and their gradients, but no cast to 16 bits."""

        def keep_precision(x: Tensor) -> Tensor:
            changed = fn(x)
            is_rounded = changed.dtype in SIXTEEN_BITS and x.dtype not in SIXTEEN_BITS
            return x.to(changed.device) if is_rounded else changed

        return super()._apply(keep_precision, recurse)
