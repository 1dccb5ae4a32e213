"""The provenance recorded with a result: hardware, versions, commit and command, but no user or host name."""

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

from deltamem_kernels.backends.native import build

ROOT = Path(__file__).resolve().parent.parent
_ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])(?:/[^/\s'\":,()]+)+/([^/\s'\":,()]+)")


def without_paths(text: str) -> str:
    """Shorten each absolute path in a text to its last component."""
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
    """Return the version of an import package. Its distribution may have another name."""
    if importlib.util.find_spec(package) is None:
        return None
    return next(iter(map(importlib.metadata.version, importlib.metadata.packages_distributions()[package])), None)


def _git(*arguments: str) -> str | None:
    return _output("git", "-C", str(ROOT), *arguments)


def _output(*command: str) -> str | None:
    """Return what a program prints, or None if it is missing or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def driver() -> str | None:
    """Return the version of the NVIDIA driver."""
    output = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return output.splitlines()[0] if output else None


def compiler() -> str | None:
    """Return nvcc's version, such as 13.0."""
    path = build.nvcc()
    found = re.search(r"release ([\d.]+)", (_output(path, "--version") if path else None) or "")
    return found and found[1]


def provenance(device: str, commit: str | None = None) -> dict:
    """Return the provenance that every row of figures carries.

    Args:
        device: "cpu" or "cuda".
        commit: the commit to record if git is not available.
    """
    changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_model(),
        "driver": driver() if device == "cuda" else None,
        "cuda": torch.version.cuda,
        "nvcc": compiler() if device == "cuda" else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": _git("rev-parse", "HEAD") or commit,
        "dirty": None if changes is None else bool(changes),
    }


def header(arguments: list[str], device: str, threads: int, bandwidth: float) -> dict:
    """Return the header of a result file. bandwidth: of a copy, in bytes per second."""
    return provenance(device) | {
        "copy_bandwidth_gb_s": round(bandwidth / 1e9, 2),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "os": _operating_system(),
        "command": without_paths(shlex.join(["python", "-m", "benchmarks", *arguments])),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
