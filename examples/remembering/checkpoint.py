"""Files that are the old one or the whole new one, whenever the process dies."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch


def write_whole(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def save_checkpoint(path: Path, **parts: Any) -> None:
    """Writes the parts, and the state of torch's generator of random numbers."""
    content = io.BytesIO()
    torch.save({**parts, "generator": torch.get_rng_state()}, content)
    write_whole(path, content.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The parts; the generator is set as it was."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    torch.set_rng_state(saved.pop("generator"))
    return saved
