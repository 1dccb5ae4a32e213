"""States outside a cache: check that they fit a model, and save and load them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...nn.files import replace_file
from ...operands.checks import describe
from .layers import memory_layers

FORMAT = {"format": "deltamem_kernels.states", "version": "1"}


def check_states(model: nn.Module, states: object) -> None:
    """Raise TypeError or ValueError unless there is a state for each layer with a memory, all with one batch size."""
    layers = {attention.layer_idx: attention.delta_memory.config for _, attention in memory_layers(model)}
    if not layers:
        raise ValueError("the model has no memory: call attach_memory or load_adapter first")
    if not isinstance(states, dict):
        raise _not_states(states)
    if states.keys() != layers.keys():
        raise ValueError(
            f"states must have the keys {sorted(layers)} (the layers with a memory), got {sorted(states, key=str)}"
        )
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
        raise ValueError(f"states must have the same batch size in every layer, got {sorted(batches)}")


def _not_states(states: object) -> TypeError:
    return TypeError(
        "states must be a dict from layer indices to tensors, as get_memory(cache) returns it, "
        f"got {type(states).__name__}"
    )


def write_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically. Tensors that share their storage are written in full, each on its own."""
    on_cpu: dict[str, Tensor] = {}
    storages = set()
    for key, x in tensors.items():
        x = x.detach().cpu().contiguous()
        storage = x.untyped_storage().data_ptr()
        on_cpu[key] = x.clone() if storage in storages else x  # save_file refuses shared storages
        storages.add(storage)
    replace_file(path, lambda name: save_file(on_cpu, name, metadata))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and metadata of a file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged or not a safetensors file. The message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file: {error}") from error


def save_memory(states: dict[int, Tensor], path: str | Path) -> None:
    """Save states from `get_memory` or `MemoryCall.states` to a safetensors file.

    The file is replaced atomically: if saving fails, the old file stays.

    Raises:
        TypeError: states is not a dict from layer indices to tensors.
        ValueError: states is empty.
        FileNotFoundError: the folder does not exist.
    """
    if not isinstance(states, dict):
        raise _not_states(states)
    for index, state in states.items():
        if type(index) is not int or not isinstance(state, Tensor):
            raise TypeError(
                f"states must be a dict from layer indices to tensors, got the key {index!r} with {describe(state)}"
            )
    if not states:
        raise ValueError("states must have at least one layer, got none: the model has not been called yet")
    write_safetensors({f"layers.{index}": state for index, state in states.items()}, Path(path), FORMAT)


def load_memory(path: str | Path, device: torch.device | str | None = None) -> dict[int, Tensor]:
    """Load states that `save_memory` saved. They are checked against a model only when they are used with it.

    Args:
        path: the file.
        device: device of the returned states. None means the CPU.

    Returns:
        Layer index to `[B, H, R, R]`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged or has another format or version. The message names it.
    """
    path = Path(path)
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != FORMAT["format"]:
        raise ValueError(f"{path}: not a file of memory states: its format is {metadata.get('format')!r}")
    if metadata.get("version") != FORMAT["version"]:
        raise ValueError(f"{path}: version must be {FORMAT['version']!r}, got {metadata.get('version')!r}")
    return {int(name.removeprefix("layers.")): state.to(device) for name, state in tensors.items()}
