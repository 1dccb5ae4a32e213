"""Which backends and compilers can run on this machine. Each function returns the reason why not, or None."""

from __future__ import annotations

import os
import shutil

from deltamem_kernels import backends

from .registry import Shape

REFERENCE_TOKENS = 1024


def backend_why_not(backend: str, shape: Shape) -> str | None:
    """Return why a backend of this package cannot run on a shape's device."""
    status = backends()[backend]
    if not status.available:
        return status.reason
    if backend in ("triton", "cuda") and shape.device != "cuda":
        return "needs --device cuda"
    if backend == "cpu" and shape.device != "cpu":
        return "needs --device cpu"
    return None


def sequence_backend_why_not(backend: str, shape: Shape) -> str | None:
    """Like `backend_why_not`, and limit the length of sequences for the slow `reference` backend."""
    reason = backend_why_not(backend, shape)
    if reason is None and backend == "reference" and shape.tokens > REFERENCE_TOKENS:
        return f"written for clarity, not speed: run up to {REFERENCE_TOKENS} tokens"
    return reason


def compiler_why_not(shape: Shape) -> str | None:
    """Return why torch.compile cannot run on a shape's device."""
    compilers = (os.environ.get("CXX"), "g++", "clang++")
    if shape.device == "cpu" and not any(shutil.which(compiler) for compiler in compilers if compiler):
        return "torch.compile needs a C++ compiler"
    return None
