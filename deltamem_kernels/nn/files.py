"""Writing a file so that there is either the old one or the whole new one, whatever interrupts it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, write: Callable[[str], object]) -> None:
    """Has `write` write a file beside, by the name it is given, and puts that in the place of `path` once it is on the
    disk.

    Raises:
        FileNotFoundError: there is no such folder.
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
