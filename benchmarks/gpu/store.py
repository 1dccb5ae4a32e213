"""What outlives a call: one line of JSON for each result, and an archive of what was compiled."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

ROWS = "rows.jsonl"
ARCHIVE = "cache.tar.gz"
PIECE_BYTES = 15 * 2**20
"""The archive is cut into pieces of this size, because a machine may limit the size of a file that it sends back."""
FILE, ORIGIN = "DELTAMEM_BENCHMARK_ROWS", "DELTAMEM_BENCHMARK_ORIGIN"
"""Environment variables that give a step's process the file for its rows and the origin that each row names."""


def append(path: Path, row: dict) -> None:
    """Add a row to the file. Each row starts a new line, so a row that was cut off by a kill spoils no other."""
    with path.open("a") as file:
        file.write("\n" + json.dumps(row, ensure_ascii=False))


def read(path: Path) -> list[dict]:
    """Return the rows of a file, without those that were cut off."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def save(row: dict) -> None:
    """Print a row of a step's process and add it, with its origin, to the file that the environment names."""
    print({name: value for name, value in row.items() if name != "kernels"}, flush=True)
    if FILE in os.environ:
        append(Path(os.environ[FILE]), row | json.loads(os.environ[ORIGIN]))


def pack(cache: Path, folder: Path) -> None:
    """Write the cache's files to `cache.tar.gz.0`, `.1`, … in the folder."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz", compresslevel=6) as tar:
        tar.add(cache, arcname=".")
    data = archive.getvalue()
    for old in folder.glob(f"{ARCHIVE}.*"):
        old.unlink()
    for i, start in enumerate(range(0, len(data), PIECE_BYTES)):
        (folder / f"{ARCHIVE}.{i}").write_bytes(data[start : start + PIECE_BYTES])


def unpack(folder: Path, cache: Path) -> bool:
    """Restore the cache from the pieces in the folder. Return False if there are none.

    Triton records a kernel's files by absolute path, so the paths are rewritten for this machine's cache folder.
    """
    pieces = sorted(folder.glob(f"{ARCHIVE}.*"), key=lambda path: int(path.suffix[1:]))
    if not pieces:
        return False
    with tarfile.open(fileobj=io.BytesIO(b"".join(piece.read_bytes() for piece in pieces))) as tar:
        tar.extractall(cache, filter="data")
    for path in cache.rglob("__grp__*"):
        group = json.loads(path.read_text())
        group["child_paths"] = {name: str(path.parent / Path(old).name) for name, old in group["child_paths"].items()}
        path.write_text(json.dumps(group))
    return True
