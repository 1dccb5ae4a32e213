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

from deltamem_kernels.backends import build

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
    """By the name it is imported by; what installed it may have called it otherwise."""
    if importlib.util.find_spec(package) is None:
        return None
    return next(iter(map(importlib.metadata.version, importlib.metadata.packages_distributions()[package])), None)


def _git(*arguments: str) -> str | None:
    return _said("git", "-C", str(ROOT), *arguments)


def _said(*command: str) -> str | None:
    """What a program prints, or None where there is none or it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def driver() -> str | None:
    """The NVIDIA driver's release."""
    said = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return said.splitlines()[0] if said else None


def compiler() -> str | None:
    """nvcc's release, as in 13.0."""
    path = build.nvcc()
    found = re.search(r"release ([\d.]+)", (_said(path, "--version") if path else None) or "")
    return found and found[1]


def provenance(device: str, commit: str | None = None) -> dict:
    """What a figure's row must name. commit: where there is no git to ask."""
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
    return provenance(device) | {
        "copy_bandwidth_gb_s": round(bandwidth / 1e9, 2),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "os": _operating_system(),
        "command": without_paths(shlex.join(["python", "-m", "benchmarks", *arguments])),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
