"""`DeltaMemConfig`: what a memory is, in the form the δ-mem authors' code keeps on disk."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..ops._checks import MAX_RANK, check_mode
from .files import replace_file

HEADS = ("q", "k", "v", "o")
CONFIG_FILE = "delta_mem_config.json"

CHOICES = {
    "output_init": ("zero", "random", "base_slice", "base_slice_fixed"),
    "memory_write_granularity": ("token", "message_mean", "sentence_mean"),
    "delta_scale_granularity": ("layer", "head"),
    "delta_scale_parameterization": ("alpha_over_rank",),
}

ARCHIVED: dict[str, Any] = {  # in the file of the authors' code, without a meaning in it any more
    "num_memory_partitions": 1,
    "num_global_memory_partitions": 0,
    "memory_partition_routing": "soft",
    "memory_partition_basis": "shared",
    "tie_memory_partition_read_write": False,
    "memory_partition_read_mode": "softmax",
    "memory_partition_sigmoid_gate_bias_init": -2.0,
    "slot_read_top_k": 0,
    "global_memory_mode": "shared_rw",
    "global_memory_read_top_k": 0,
    "global_memory_merge_mode": "gated_residual",
    "global_memory_gate_bias_init": -2.0,
    "global_memory_read_logit_bias": 0.0,
    "memory_reader_layers": [],
    "memory_reader_hidden_size": 1024,
    "memory_reader_residual_scale": 0.1,
    "memory_reader_read_only": True,
    "memory_readout_mode": "delta",
    "memory_write_source": "learned_hidden",
    "memory_write_proposals_per_message": 2,
    "synthetic_memory_slots": 1,
    "latent_memory_layers": [],
    "latent_memory_hidden_size": 1024,
    "latent_memory_residual_scale": 0.1,
    "latent_memory_slots": 4,
    "latent_memory_init_std": 0.002,
    "latent_gate_init": 0.01,
}


@dataclass(frozen=True)
class DeltaMemConfig:
    """What a memory is. Names and defaults are those of the δ-mem authors' code, whose file it reads and writes.

    Raises TypeError or ValueError, naming the field, where a value does not fit.
    """

    rank: int = 8
    """R, of the R x R state: from 1 to 128."""
    alpha: float = 16.0
    """A correction is alpha / rank times what the memory read, projected."""
    beta_bias_init: float = -1.5
    """β starts as its sigmoid, λ (where it is not coupled) as the sigmoid of its negative."""
    normalize_qk: bool = True
    """q and k are l2norm(tanh(W x)), not W x."""
    couple_lambda: bool = True
    """λ = 1 - β; otherwise λ has weights of its own."""
    state_update_mode: str = "standard"
    """As `mode` of `delta_update`."""
    rankwise_gates: bool = True
    """A gate for each row of the state; otherwise one for each head."""
    output_init: str = "zero"
    """The corrections' weights at the start: "zero"; "random"; "base_slice", the first R columns of the projection
    they correct, each normalised; "base_slice_fixed", of these at most base_slice_ref_width."""
    base_slice_ref_width: int = 8
    online_gain: float = 0.05
    """What "random" and the slices are multiplied with."""
    num_state_heads: int = 1
    """H, the states that are kept side by side (MSW where there are several)."""
    memory_write_granularity: str = "token"
    """"token" (TSW); "message_mean" and "sentence_mean" (SSW): a message or sentence writes once, its mean."""
    target_modules: tuple[str, ...] = ("self_attn",)
    """The names of the attention modules."""
    target_layers: tuple[int, ...] = ()
    """Which layers get a memory; empty means all."""
    delta_heads: tuple[str, ...] = HEADS
    """The projections that are corrected, of q, k, v and o."""
    delta_o_rmsnorm: bool = False
    """The correction of o goes through an RMSNorm with a weight of its own."""
    delta_o_rmsnorm_eps: float = 1e-6
    trainable_delta_scale: bool = False
    """alpha / rank is multiplied with sigmoid(raw) · delta_scale_max, and raw is trained."""
    delta_scale_init: float = 1.0
    delta_scale_max: float = 2.0
    delta_scale_granularity: str = "layer"
    """One raw for a layer, or with "head" one for each of q, k, v and o."""
    delta_scale_parameterization: str = "alpha_over_rank"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = _typed(field.name, getattr(self, field.name), field.default)
            object.__setattr__(self, field.name, value)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        check_mode(self.state_update_mode)
        if not 1 <= self.rank <= MAX_RANK:
            raise ValueError(f"rank must be from 1 to {MAX_RANK}, got {self.rank}")
        for name in ("num_state_heads", "base_slice_ref_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.delta_o_rmsnorm_eps > 0:
            raise ValueError(f"delta_o_rmsnorm_eps must be greater than 0, got {self.delta_o_rmsnorm_eps}")
        if not 0 < self.delta_scale_init < self.delta_scale_max:
            raise ValueError(
                f"delta_scale_init must be between 0 and delta_scale_max={self.delta_scale_max}, both excluded, "
                f"got {self.delta_scale_init}"
            )
        unknown = [head for head in self.delta_heads if head not in HEADS]
        if unknown or len(set(self.delta_heads)) != len(self.delta_heads):
            raise ValueError(f"delta_heads must be some of {', '.join(HEADS)}, each once, got {self.delta_heads!r}")

    def to_dict(self) -> dict[str, Any]:
        """Every field of the authors' file, the archived ones at the only value they may have."""
        live = {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(self).items()}
        return {**live, **ARCHIVED}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DeltaMemConfig:
        """From the fields of the authors' file. Fields that are left out have their defaults.

        Raises:
            ValueError: a field that is not known, or an archived one at another value than its default.
        """
        if not isinstance(data, dict):
            raise TypeError(f"a configuration must be a dict of fields, got {type(data).__name__} {data!r:.60}")
        live = {field.name for field in fields(cls)}
        unknown = sorted(data.keys() - live - ARCHIVED.keys())
        if unknown:
            raise ValueError(f"fields that δ-mem's configuration does not have: {', '.join(map(repr, unknown))}")
        for name, default in ARCHIVED.items():
            value = data.get(name, default)
            value = list(value) if isinstance(value, tuple) else value
            if value != default:
                raise ValueError(f"{name} is archived: it must be {default!r}, or left out, got {value!r}")
        return cls(**{name: x for name, x in data.items() if name in live})

    def save(self, folder: str | Path) -> None:
        """Writes delta_mem_config.json, as a whole or not at all, into a folder, which is made where it is missing."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        replace_file(Path(folder) / CONFIG_FILE, lambda name: Path(name).write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, folder: str | Path) -> DeltaMemConfig:
        """Reads delta_mem_config.json from a folder.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not such a file, or a field does not fit; the message names both.
        """
        path = Path(folder) / CONFIG_FILE
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:  # a JSON error is a ValueError
            raise ValueError(f"{path}: {error}") from error


def _typed(name: str, value: Any, default: Any) -> Any:
    """The value in its field's type; lists become tuples, and whole numbers do for floats."""
    if isinstance(default, tuple):
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        item = int if name == "target_layers" else str
        if not isinstance(value, (list, tuple)) or any(type(x) is not item for x in value):
            raise TypeError(f"{name} must be a list of {item.__name__}, got {value!r:.60}")
        return tuple(value)
    wanted = type(default)
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted:
        raise TypeError(f"{name} must be {wanted.__name__}, got {type(value).__name__} {value!r:.60}")
    if wanted is float and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return value
