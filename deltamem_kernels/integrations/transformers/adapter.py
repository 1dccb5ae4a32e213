"""Save and load the weights of a memory, in this package's safetensors format or the δ-mem authors' format."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor, nn

from ...nn import DeltaMemConfig, DeltaMemory
from ...nn.config import CONFIG_FILE, HEADS
from .attach import build_memories, install_memories
from .layers import memory_layers, memory_of
from .states import read_safetensors, write_safetensors

WEIGHTS_FILE = "delta_mem_adapter.safetensors"
AUTHORS_FILE = "delta_mem_adapter.pt"
FORMAT = "deltamem_kernels.adapter"


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Save a model's memory to a folder, as delta_mem_config.json and delta_mem_adapter.safetensors.

    Each file is replaced atomically. The weights keep their dtype and are named as in the authors' code,
    `<module path>.<name>`.

    Raises:
        TypeError: model is not a module.
        ValueError: the model has no memory.
    """
    layers = memory_layers(model)
    if not layers:
        raise ValueError("the model has no memory: call attach_memory first")
    config = memory_of(layers[0][1]).config
    config.save(folder)
    metadata = {"format": FORMAT, "version": "1", "config": config_digest(config)}
    weights = named_weights({name: memory_of(attention) for name, attention in layers})
    write_safetensors(weights, Path(folder) / WEIGHTS_FILE, metadata)


def load_adapter(
    model: nn.Module, folder: str | Path, *, revision: str | None = None, dtype: torch.dtype = torch.float32
) -> DeltaMemConfig:
    """Load a memory that `save_adapter` or the authors' code saved, from a folder or from the Hugging Face Hub.

    If the model has no memory, one is attached. If it has a memory with the same configuration, its weights are
    replaced. The authors' delta_mem_adapter.pt is read with `weights_only=True`, so no code in it runs. If loading
    fails, the model is unchanged.

    Args:
        model: a transformers model.
        folder: the folder with the configuration and the weights. A string "org/name" that is no folder is the id of a
            repository on the Hub. Its files are downloaded into the Hub's cache, and read from there if the Hub cannot
            be reached or HF_HUB_OFFLINE=1.
        revision: the branch, tag or commit of a repository on the Hub. None means its main branch.
        dtype: dtype of the weights if a memory is attached.

    Returns:
        The configuration of the memory.

    Raises:
        TypeError: model is not a module.
        FileNotFoundError: the folder, the configuration or the weights are missing.
        NotADirectoryError: folder is a file.
        ValueError: a file is damaged or of another kind, or does not fit the model, or a revision is given with a
            folder.
    """
    layers = {name: memory_of(attention) for name, attention in memory_layers(model)}
    path = _find_folder(folder, revision)
    config = DeltaMemConfig.load(path)
    path, weights = _read_weights(path, config)
    is_new = not layers
    if is_new:  # output_init="zero" is the cheapest; the weights are replaced below
        layers = build_memories(model, replace(config, output_init="zero"), dtype)
    elif any(memory.config != config for memory in layers.values()):
        raise ValueError(
            f"{path}: the model has a memory with another configuration: remove it with detach_memory first"
        )
    wanted = named_weights(layers)
    _check_weights(path, weights, wanted)
    with torch.no_grad():
        for name, weight in wanted.items():
            weight.copy_(weights[name])
    if is_new:
        for memory in layers.values():
            memory.config = config
        install_memories(model, layers)
    return config


def named_weights(memories: dict[str, DeltaMemory]) -> dict[str, Tensor]:
    """Return all weights of the memories, under the names that the files use."""
    return {
        f"{unwrap_name(name)}.{key}": weight
        for name, memory in memories.items()
        for key, weight in memory.named_parameters(remove_duplicate=False)
    }


def unwrap_name(name: str) -> str:
    """Remove the prefixes of torch.compile, DistributedDataParallel and PEFT from a module's name."""
    name = ".".join(part for part in name.split(".") if part != "_orig_mod")
    return re.sub(r"^(module\.|base_model\.model\.)+", "", name)


def config_digest(config: DeltaMemConfig) -> str:
    """Return a digest of a configuration, stored with the weights to detect files that do not belong together."""
    return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()


def _find_folder(folder: str | Path, revision: str | None) -> Path:
    """Return the local folder of an adapter. It is downloaded from the Hub if `folder` is the id of a repository."""
    path = Path(folder)
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"revision must be None for a local folder, got {revision!r} with {path}")
        return path
    if path.exists():
        raise NotADirectoryError(f"{path}: must be the folder that holds {CONFIG_FILE}, got a file")
    if not isinstance(folder, str) or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", folder):
        raise FileNotFoundError(f"{path}: no such folder")
    try:
        files = [CONFIG_FILE, WEIGHTS_FILE, AUTHORS_FILE]
        return Path(snapshot_download(folder, revision=revision, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"{folder}: no such folder, and it could not be loaded from the Hugging Face Hub (revision "
            f"{revision or 'main'}): {error}"
        ) from error


def _read_weights(folder: Path, config: DeltaMemConfig) -> tuple[Path, dict[str, Tensor]]:
    path = folder / WEIGHTS_FILE
    if path.is_file() or not (folder / AUTHORS_FILE).is_file():
        weights, metadata = read_safetensors(path)
        if (metadata.get("format"), metadata.get("version")) != (FORMAT, "1"):
            raise ValueError(f"{path}: not a file of memory weights: its metadata is {metadata}")
        if metadata.get("config") != config_digest(config):
            raise ValueError(f"{path}: saved with another configuration than the delta_mem_config.json in this folder")
        return path, weights
    path = folder / AUTHORS_FILE
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a complete file of tensors: {error}") from error
    if not isinstance(weights, dict) or not all(isinstance(x, Tensor) for x in weights.values()):
        raise ValueError(f"{path}: not a dict of tensors")
    return path, _zero_unused(weights, config)


def _zero_unused(weights: dict[str, Tensor], config: DeltaMemConfig) -> dict[str, Tensor]:
    """Set the correction weights of uncorrected projections to zero. The authors' code ignores their values."""
    unused = tuple(f".delta_{head}_proj" for head in HEADS if head not in config.delta_heads)
    return {name: torch.zeros_like(x) if name.endswith(unused) else x for name, x in weights.items()}


def _check_weights(path: Path, weights: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for what, names in (("lacks", wanted.keys() - weights.keys()), ("also has", weights.keys() - wanted.keys())):
        if names:
            some = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ValueError(f"{path} does not fit the model: it {what} {some}")
    for name, weight in wanted.items():
        given = weights[name]
        if given.shape != weight.shape or not given.is_floating_point():
            got = f"{str(given.dtype).removeprefix('torch.')} {list(given.shape)}"
            raise ValueError(
                f"{path} does not fit the model: {name} must be a floating tensor {list(weight.shape)}, got {got}"
            )
