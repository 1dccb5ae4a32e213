"""A memory's weights on disk: this package's safetensors, and what the δ-mem authors' code writes."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ...nn import DeltaMemConfig
from ...nn.config import HEADS
from .attach import build, install
from .layers import memory_layers
from .states import read_safetensors, write_safetensors

WEIGHTS_FILE = "delta_mem_adapter.safetensors"
AUTHORS_FILE = "delta_mem_adapter.pt"
FORMAT = "deltamem_kernels.adapter"


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Writes the memory of a model into a folder: delta_mem_config.json and delta_mem_adapter.safetensors, each whole.

    The weights are named as in the authors' code, `<module path>.<name>`, and keep their dtype.

    Raises:
        ValueError: the model has no memory.
    """
    layers = memory_layers(model)
    if not layers:
        raise ValueError("the model has no memory: attach_memory gives it one")
    config = layers[0][1].delta_memory.config
    weights = {f"{unwrapped(name)}.{key}": x for name, m in layers for key, x in m.delta_memory.named_parameters()}
    config.save(folder)
    write_safetensors(
        weights, Path(folder) / WEIGHTS_FILE, {"format": FORMAT, "version": "1", "config": digest(config)}
    )


def load_adapter(model: nn.Module, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> DeltaMemConfig:
    """Gives a model the memory that `save_adapter`, or the authors' code, wrote into a folder.

    A model that has a memory of the same configuration gets its weights; one that has none gets it. Of the authors'
    delta_mem_adapter.pt only tensors are read (weights_only).

    Args:
        dtype: of the weights, where the model has no memory yet.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or another kind of file, or does not fit the model, which stays as it was.
    """
    config = DeltaMemConfig.load(folder)
    path, weights = _read(Path(folder), config)
    layers = {name: attention.delta_memory for name, attention in memory_layers(model)}
    fresh = not layers
    if fresh:  # the weights at the start need not be computed
        layers = build(model, replace(config, output_init="zero"), dtype)
    elif any(memory.config != config for memory in layers.values()):
        raise ValueError(f"{path}: the model has a memory of another configuration: detach_memory takes it away")
    wanted = {f"{unwrapped(name)}.{key}": x for name, memory in layers.items() for key, x in memory.named_parameters()}
    _check(path, weights, wanted)
    with torch.no_grad():
        for name, weight in wanted.items():
            weight.copy_(weights[name])
    if fresh:
        for memory in layers.values():
            memory.config = config
        install(model, layers)
    return config


def unwrapped(name: str) -> str:
    """A module's name in the model itself, without torch.compile, DistributedDataParallel and PEFT around it."""
    name = ".".join(part for part in name.split(".") if part != "_orig_mod")
    return re.sub(r"^(module\.|base_model\.model\.)+", "", name)


def digest(config: DeltaMemConfig) -> str:
    """Ties the two files of a folder together."""
    return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()


def _read(folder: Path, config: DeltaMemConfig) -> tuple[Path, dict[str, Tensor]]:
    path = folder / WEIGHTS_FILE
    if path.is_file() or not (folder / AUTHORS_FILE).is_file():
        weights, metadata = read_safetensors(path)
        if (metadata.get("format"), metadata.get("version")) != (FORMAT, "1"):
            raise ValueError(f"{path}: not the weights of a memory, but metadata {metadata}")
        if metadata.get("config") != digest(config):
            raise ValueError(f"{path}: saved with another configuration than the delta_mem_config.json beside it")
        return path, weights
    path = folder / AUTHORS_FILE
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a whole file of tensors: {error}") from error
    if not isinstance(weights, dict) or not all(isinstance(x, Tensor) for x in weights.values()):
        raise ValueError(f"{path}: not a dict of tensors")
    return path, _active(weights, config)


def _active(weights: dict[str, Tensor], config: DeltaMemConfig) -> dict[str, Tensor]:
    """Without the values of what corrects nothing: the authors' code ignores them, and here they are zero."""
    off = tuple(f".delta_{head}_proj" for head in HEADS if head not in config.delta_heads)
    return {name: torch.zeros_like(x) if name.endswith(off) else x for name, x in weights.items()}


def _check(path: Path, weights: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for what, names in (("lacks", wanted.keys() - weights.keys()), ("has also", weights.keys() - wanted.keys())):
        if names:
            some = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ValueError(f"{path} does not fit the model: it {what} {some}")
    for name, weight in wanted.items():
        given = weights[name]
        if given.shape != weight.shape or not given.is_floating_point():
            got = f"{str(given.dtype).removeprefix('torch.')} {list(given.shape)}"
            raise ValueError(f"{path} does not fit the model: {name} must be floating {list(weight.shape)}, got {got}")
