"""`DeltaMemConfig`: the configuration of a memory, in the δ-mem authors' file format."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..operands.checks import MAX_RANK, check_mode
from .files import replace_file

HEADS = ("q", "k", "v", "o")
CONFIG_FILE = "delta_mem_config.json"

CHOICES = {
    "output_init": ("zero", "random", "base_slice", "base_slice_fixed"),
    "memory_write_granularity": ("token", "message_mean", "sentence_mean"),
    "delta_scale_granularity": ("layer", "head"),
    "delta_scale_parameterization": ("alpha_over_rank",),
}

ARCHIVED: dict[str, Any] = {  # fields that the authors' code still writes to its file but no longer uses
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
WITHOUT_EFFECT = {  # archived fields of which the authors' code also takes other values, and does not use them
    "memory_partition_sigmoid_gate_bias_init",
    "global_memory_gate_bias_init",
    "global_memory_read_logit_bias",
    "memory_reader_hidden_size",
    "memory_reader_residual_scale",
    "memory_reader_read_only",
    "latent_memory_hidden_size",
    "latent_memory_residual_scale",
    "latent_memory_slots",
    "latent_memory_init_std",
    "latent_gate_init",
}


@dataclass(frozen=True)
class DeltaMemConfig:
    """Configuration of a memory. Field names and defaults are those of the δ-mem authors' code.

    Raises:
        TypeError, ValueError: a field has the wrong type or an invalid value; the message names the field.
    """

    rank: int = 8
    """R, the size of the R x R state: from 1 to 128."""
    alpha: float = 16.0
    """Corrections are scaled by alpha / rank."""
    beta_bias_init: float = -1.5
    """Initial bias of β. The bias of λ, if λ is not coupled, starts at its negative."""
    normalize_qk: bool = True
    """If True, q and k are l2norm(tanh(W x)); otherwise W x."""
    couple_lambda: bool = True
    """If True, λ = 1 - β; otherwise λ has its own weights."""
    state_update_mode: str = "standard"
    """The `mode` of `delta_update`: "standard", "lambda_outside" or "no_lambda"."""
    rankwise_gates: bool = True
    """If True, each row of the state has its own gates; otherwise each head."""
    output_init: str = "zero"
    """Initial correction weights. "zero"; "random"; "base_slice": the first R columns of the corrected projection's
    weight, each normalised; "base_slice_fixed": the same, but at most base_slice_ref_width columns."""
    base_slice_ref_width: int = 8
    """Maximum number of columns for "base_slice_fixed"."""
    online_gain: float = 0.05
    """Factor applied to initial weights other than "zero"."""
    num_state_heads: int = 1
    """H, the number of states per layer (MSW if there are several)."""
    memory_write_granularity: str = "token"
    """"token": every token writes (TSW). "message_mean" or "sentence_mean": the mean of each message or sentence writes
    once (SSW)."""
    target_modules: tuple[str, ...] = ("self_attn",)
    """Names of the attention modules."""
    target_layers: tuple[int, ...] = ()
    """Indices of the layers that get a memory; empty means all."""
    delta_heads: tuple[str, ...] = HEADS
    """The projections that the memory corrects, some of "q", "k", "v" and "o"."""
    delta_o_rmsnorm: bool = False
    """If True, the correction of o is normalised by an RMSNorm with a trained weight."""
    delta_o_rmsnorm_eps: float = 1e-6
    """Epsilon of that RMSNorm."""
    trainable_delta_scale: bool = False
    """If True, corrections are also scaled by sigmoid(raw) · delta_scale_max with a trained `raw`."""
    delta_scale_init: float = 1.0
    """Initial value of the trained scale."""
    delta_scale_max: float = 2.0
    """Upper bound of the trained scale."""
    delta_scale_granularity: str = "layer"
    """"layer": one trained scale per layer. "head": one for each of q, k, v and o."""
    delta_scale_parameterization: str = "alpha_over_rank"
    """Always "alpha_over_rank"."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = _check_type(field.name, getattr(self, field.name), field.default)
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
        """Return all fields of the authors' file, including the archived ones with their fixed values."""
        used = {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(self).items()}
        return {**used, **ARCHIVED}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DeltaMemConfig:
        """Create a configuration from the fields of the authors' file. Missing fields have their defaults.

        A UserWarning names what the authors' code accepts and this class does not keep: archived fields with values
        that have no effect, 0 and 1 for booleans, and floats such as 8.0 for integers.

        Raises:
            TypeError: data is not a dict, or a field has the wrong type.
            ValueError: a field is unknown or invalid, or an archived field has a value that the authors' code refuses.
        """
        if not isinstance(data, dict):
            raise TypeError(f"a configuration must be a dict of fields, got {type(data).__name__} {data!r:.60}")
        used = {field.name for field in fields(cls)}
        unknown = sorted(data.keys() - used - ARCHIVED.keys())
        if unknown:
            raise ValueError(f"unknown fields in a δ-mem configuration: {', '.join(map(repr, unknown))}")
        notes = []
        for name, default in ARCHIVED.items():
            value = data.get(name, default)
            value = list(value) if isinstance(value, tuple) else value
            if value != default:
                if name not in WITHOUT_EFFECT:
                    raise ValueError(f"{name} is archived: it must be {default!r} or missing, got {value!r}")
                notes.append(f"{name}={value!r} is ignored, because it has no effect")
        given = {}
        for field in fields(cls):
            if field.name in data:
                value = data[field.name]
                given[field.name] = exact = _exact(value, field.default)
                if exact is not value:
                    notes.append(f"{field.name}={value!r} is read as {exact!r}")
        config = cls(**given)
        if notes:
            warnings.warn(f"deltamem_kernels: {'; '.join(notes)}", stacklevel=2)
        return config

    def save(self, folder: str | Path) -> None:
        """Write delta_mem_config.json to a folder atomically. A missing folder is created."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        replace_file(Path(folder) / CONFIG_FILE, lambda name: Path(name).write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, folder: str | Path) -> DeltaMemConfig:
        """Load delta_mem_config.json from a folder.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is not valid JSON, or a field is unknown or invalid. The message names the file.

        Warns:
            UserWarning: as `from_dict`.
        """
        path = Path(folder) / CONFIG_FILE
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:  # a JSON error is a ValueError
            raise ValueError(f"{path}: {error}") from error


def _exact(value: Any, default: Any) -> Any:
    """Return 0 and 1 as a bool and integral floats as an int, where the field has this type; otherwise the value."""
    if type(default) is bool and type(value) is int and value in (0, 1):
        return bool(value)
    if type(default) is int and type(value) is float and value.is_integer():
        return int(value)
    if isinstance(default, tuple) and isinstance(value, list) and any(type(x) is float for x in value):
        return [_exact(x, 0) for x in value]
    return value


def _check_type(name: str, value: Any, default: Any) -> Any:
    """Return the value with its field's type. Lists become tuples, and ints are accepted for floats."""
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
