"""Files and checkpoints that are replaced atomically: a crash leaves either the old file or the complete new one."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from deltamem_kernels.nn.files import replace_file


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    replace_file(path, lambda name: Path(name).write_bytes(content))


def save_checkpoint(path: Path, **parts: Any) -> None:
    """Save the given parts and the state of torch's random number generator."""
    content = io.BytesIO()
    torch.save({**parts, "generator": torch.get_rng_state()}, content)
    write_whole(path, content.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load the parts of a checkpoint and restore torch's random number generator."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    torch.set_rng_state(saved.pop("generator"))
    return saved
