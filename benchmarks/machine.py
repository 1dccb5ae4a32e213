"""What a result must say about where it comes from, and nothing that names a person or a host."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
_ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])(?:/[^/\s'\":,()]+)+/([^/\s'\":,()]+)")


def without_paths(text: str) -> str:
    """The text with only the last part of each absolute path."""
    return _ABSOLUTE_PATH.sub(r"\1", text)


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _operating_system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return f"{platform.system()} {platform.release()}"


def _version(package: str) -> str | None:
    return importlib.metadata.version(package) if importlib.util.find_spec(package) else None


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def header(arguments: list[str], device: str, threads: int, bandwidth: float) -> dict:
    changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_model(),
        "copy_bandwidth_gb_s": round(bandwidth / 1e9, 2),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "os": _operating_system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "command": without_paths(shlex.join(["python", "-m", "benchmarks", *arguments])),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
