"""The states of a memory outside of a cache: whether they fit a model, and on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...nn.files import replace_file
from ...ops._checks import describe
from .layers import memory_layers

FORMAT = {"format": "deltamem_kernels.states", "version": "1"}


def check_states(model: nn.Module, states: object) -> None:
    """Raises TypeError or ValueError unless these are states for each layer of the model's memory, of one batch."""
    if not isinstance(states, dict):
        raise TypeError(f"states must be a dict of tensors by the layers' index, got {type(states).__name__}")
    layers = {attention.layer_idx: attention.delta_memory.config for _, attention in memory_layers(model)}
    if states.keys() != layers.keys():
        raise ValueError(f"states must be of the layers {sorted(layers)}, got {sorted(states, key=str)}")
    batches = set()
    for index, config in layers.items():
        state, wanted = states[index], (config.num_state_heads, config.rank, config.rank)
        fits = isinstance(state, Tensor) and state.dtype in (torch.float32, torch.float64)
        if not fits or tuple(state.shape[1:]) != wanted:
            raise ValueError(
                f"states[{index}] must be float32 or float64 [B, {', '.join(map(str, wanted))}], got {describe(state)}"
            )
        batches.add(state.shape[0])
    if len(batches) > 1:
        raise ValueError(f"states must have one batch size, got {sorted(batches)}")


def write_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes a file so that there is either the old one or the whole new one."""
    on_cpu = {key: x.detach().cpu().contiguous() for key, x in tensors.items()}
    replace_file(path, lambda name: save_file(on_cpu, name, metadata))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file; ValueError, naming it, where it is damaged or another kind of file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from error


def save_memory(states: dict[int, Tensor], path: str | Path) -> None:
    """Writes the states of a memory, from `get_memory` or `MemoryCall.states`, into a safetensors file.

    The file is replaced as a whole: an interrupted writing leaves the old one.

    Raises:
        TypeError, ValueError: these are no states, or none; the file stays as it is.
        FileNotFoundError: there is no such folder.
    """
    if not isinstance(states, dict) or not all(type(i) is int and isinstance(x, Tensor) for i, x in states.items()):
        raise TypeError("states must be a dict of tensors by the layers' index")
    if not states:
        raise ValueError("states must be of a layer at least, got none: nothing was written yet")
    write_safetensors({f"layers.{index}": state for index, state in states.items()}, Path(path), FORMAT)


def load_memory(path: str | Path, device: torch.device | str | None = None) -> dict[int, Tensor]:
    """The states that `save_memory` wrote. Whether they fit a model is looked at where they are given to one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, another kind of file, or of another version; the message names it.
    """
    path = Path(path)
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != FORMAT["format"]:
        raise ValueError(f"{path}: not the states of a memory, but format {metadata.get('format')!r}")
    if metadata.get("version") != FORMAT["version"]:
        raise ValueError(f"{path}: version {metadata.get('version')!r}, and this package reads {FORMAT['version']!r}")
    return {int(name.removeprefix("layers.")): state.to(device) for name, state in tensors.items()}
