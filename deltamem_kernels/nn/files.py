"""Replace files atomically."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, write: Callable[[str], object]) -> None:
    """Replace a file atomically: if writing is interrupted, the old file stays.

    The new file is written to a temporary name in the same folder, flushed to disk and renamed to `path`.

    Args:
        path: the file to replace or create.
        write: called with the temporary file's name; writes the new content there.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder")
    name = f"{path.parent / f'.{path.name}.{os.getpid()}.{secrets.token_hex(4)}'}"
    os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        write(name)
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
