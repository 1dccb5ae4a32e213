"""What each part runs, most worth first, and what it needs. Each step fits into one call."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from deltamem_kernels.backends import build

from ..machine import ROOT
from . import hot, resume
from .steps import CANNOT, FAILED, OK, UNFINISHED, Finished, Outcome, Step, outcome

PYTHON = (sys.executable, "-m")
BACKENDS = ("triton", "cuda")
TEST_WORKERS = 8  # one GPU and many small kernels; Triton's compiler takes the cores
TEST_LIMIT, LEAST_TO_TEST = 440.0, 120.0
LEAST_TO_MEASURE = 90.0  # what a benchmark has measured when its time is up stays
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
PEERS = ROOT / ".peers"


@dataclass(frozen=True)
class Target:
    """The GPU; or for a rehearsal the CPU, where the same steps run as far as they can, smaller."""

    device: str = "cuda"

    @property
    def rehearsal(self) -> bool:
        return self.device != "cuda"

    @property
    def backends(self) -> tuple[str, ...]:
        return ("cpu",) if self.rehearsal else BACKENDS


def tool(name: str) -> str | None:
    """Of the CUDA toolkit: on PATH, or beside nvcc."""
    nvcc = build.nvcc()
    beside = nvcc and shutil.which(name, path=str(Path(nvcc).parent))
    return shutil.which(name) or beside or None


def _missing_packages(*names: str) -> str | None:
    lacking = [name for name in names if importlib.util.find_spec(name) is None]
    if not lacking:
        return None
    return (
        f"needs the Python packages {', '.join(lacking)}: carry their wheels along, "
        "`pip install --no-index --no-deps --target FOLDER *.whl`, and put FOLDER on PYTHONPATH"
    )


def why_not(part: str, target: Target) -> str | None:
    """Why a part cannot run on this machine, in words, or None."""
    if target.rehearsal:
        return _missing_packages("pytest", "hypothesis", "numpy") if part == "test" else None
    if not torch.cuda.is_available():
        built = "is built without CUDA" if torch.version.cuda is None else f"with CUDA {torch.version.cuda} sees no GPU"
        return f"needs a GPU: torch {torch.__version__} {built} (--rehearse runs on the CPU what can)"
    if part == "test":
        return _missing_packages("pytest", "hypothesis", "numpy")
    if part in ("build", "sanitize"):
        lacking = build.missing_tool("cuda")
        if lacking:
            return lacking
    name = {"sanitize": "compute-sanitizer"}.get(part)
    return f"{name} is neither on PATH nor beside nvcc" if name and tool(name) is None else None


def _own(module: str, target: Target, *arguments: str) -> tuple[str, ...]:
    return (*PYTHON, f"benchmarks.gpu.{module}", *arguments, "--device", target.device, "--rows", "{rows}")


def _build(target: Target) -> list[Step]:
    steps = [
        Step(f"first call of {each}", _own("build", target, "--backend", each), 300) for each in ("cpu", *BACKENDS)
    ]
    if target.rehearsal:
        steps = steps[:1]
    return [*steps, Step("self-check", (*PYTHON, "deltamem_kernels"), 300)]


def read_suite(finished: Finished) -> Outcome:
    rows = resume.summary(finished.rows)
    files = [row for row in rows if "file" in row]
    counts = {x: sum(row[x] for row in files) for x in ("passed", "failed", "skipped")}
    note = ", ".join(f"{n} {x}" for x, n in counts.items())
    if finished.status is None:
        return Outcome(UNFINISHED, f"{note} so far", rows)
    if finished.status == 5 and counts["passed"] and not counts["failed"]:  # all had passed before
        return Outcome(OK, note, rows)
    if finished.status not in (0, 1, 5) or not files:
        last = (finished.output.strip().splitlines() or ["it said nothing"])[-1]
        return Outcome(FAILED, f"pytest ended with {finished.status}: {last}; {note}", rows)
    return Outcome(OK if finished.status == 0 and not counts["failed"] else FAILED, note, rows)


def _test(target: Target) -> list[Step]:
    command = [*PYTHON, "pytest", "-p", "benchmarks.gpu.resume", "--outcomes", "{keep}", "-q", "--tb=short"]
    command += ["-p", "no:cacheprovider", "--seed", "1"]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout", "400"]
    if target.rehearsal:
        command += ["tests/test_scan.py", "-k", "choice"]
    elif importlib.util.find_spec("xdist"):
        command += ["-n", str(min(TEST_WORKERS, os.cpu_count() or 1)), "--dist", "loadfile", "--no-loadscope-reorder"]
    return [Step("suite", tuple(command), TEST_LIMIT, LEAST_TO_TEST, read=read_suite)]


def read_sanitizer(finished: Finished) -> Outcome:
    """Its own summary counts, beside the exit status; and a device that it does not support is no finding."""
    refused = next((x for x in finished.output.splitlines() if "not supported" in x), None)
    if refused:
        return Outcome(CANNOT, f"compute-sanitizer refuses this device: {refused.strip()}")
    read = outcome(finished)
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", finished.output)
    if read.status == OK and not found:
        return Outcome(FAILED, "compute-sanitizer gave no summary: nothing was checked", read.rows)
    if any(map(int, found)):
        return Outcome(FAILED, f"{', '.join(found)} errors: {read.note}", read.rows)
    return read


def _sanitize(target: Target) -> list[Step]:
    if target.rehearsal:
        return [Step("cases", _own("cases", target, "--backend", "cpu"))]
    # Without torch's cache of memory each tensor has an allocation of its own, and its ends are seen.
    separate = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    sanitizer = tool("compute-sanitizer") or "compute-sanitizer"
    steps = []
    for backend, name in [("triton", SANITIZERS[0]), *(("cuda", each) for each in SANITIZERS)]:
        # torch asks drivers for what they may not know, which is no error of a kernel
        quiet = ("--report-api-errors", "no") if name == "memcheck" else ()
        cases = _own("cases", target, "--backend", backend)
        command = (sanitizer, "--tool", name, *quiet, "--error-exitcode", "77", *cases)
        steps.append(Step(f"{name}, {backend}", command, 440, 240, separate, read_sanitizer))
    return steps


def _graph(target: Target) -> list[Step]:
    return [Step(each, _own("graph", target, "--backend", each), 120) for each in target.backends]


def read_benchmarks(finished: Finished) -> Outcome:
    """A row that is WRONG or failed is told by name; one that is not run has its reason in its own note."""
    read = outcome(finished)
    if finished.cut_short and read.rows:
        read = Outcome(UNFINISHED, f"{len(read.rows)} rows before its time was up", read.rows)
    bad = [f"{row['implementation']} {row['status']}" for row in read.rows if row["status"] in ("WRONG", "failed")]
    return Outcome(FAILED, ", ".join(bad), read.rows) if bad else read


BOTH = ("--op", "delta_update forward", "delta_update forward+backward")
SCANS = ("--impl", "ours (triton)", "ours (cuda)", "upstream-triton")
SCAN = BOTH + SCANS
LAYER = ("--impl", "frozen", "(triton)", "with memory (cuda)", "--op")
MODEL = ("--op", "model Qwen3-4B", "--impl", "frozen", "ours", "upstream")
BENCH = (
    ("scan R=8 over T", SCAN, "--tokens 128 512 2048 8192", 240),
    ("Qwen3-4B's layer, decoding", (*LAYER, "layer Qwen3-4B"), "--tokens 1 --batch 1 8 64", 300),
    ("Qwen3-4B's layer, prefill", (*LAYER, "layer Qwen3-4B"), "--tokens 512 8192", 300),
    ("scan R=8 over B", SCAN, "--tokens 8192 --batch 8 64", 240),
    ("steps", ("--op", "delta_step", "--impl", "ours (triton)", "ours (cuda)", "pytorch"), "--tokens 1 4", 200),
    ("scan R=8, long", SCAN, "--tokens 65536 1048576", 400),
    ("scan R=4", SCAN, "--tokens 128 8192 --rank 4", 200),
    ("scan R=16", SCAN, "--tokens 128 8192 --rank 16", 200),
    ("beside fla", (*BOTH[:2], *SCANS, "fla"), "--tokens 128 8192 --mode lambda_outside --gates head", 200),
    ("ways to scan", (*BOTH[:2], "--impl", "triton, "), "--tokens 256 8192 --batch 1 64 256", 200),
    ("projection", ("--op", "memory_projection Qwen3-4B", "--impl", "ours", "torch"), "--tokens 512 8192", 240),
    ("correction", ("--op", "attention_correction", "--impl", "ours", "torch"), "--tokens 512 8192", 300),
    ("SmolLM3-3B's layer, decoding", (*LAYER, "layer SmolLM3-3B"), "--tokens 1 --batch 1 8 64", 300),
    ("SmolLM3-3B's layer, prefill", (*LAYER, "layer SmolLM3-3B"), "--tokens 512 8192", 300),
    ("model's decoding", MODEL, "--tokens 1 --batch 1 8 64", 440),
    ("model's prefill", MODEL, "--tokens 512 8192 32768", 440),
)
"""Name, what is run and on which sizes as `python -m benchmarks` takes them, limit in seconds. All in bfloat16."""


def _bench(target: Target) -> list[Step]:
    ceilings = ("--shrink", "64", "--seconds", "0.1") if target.rehearsal else ()
    steps = [Step("ceilings", _own("ceilings", target, *ceilings), 120)]
    for name, what, sizes, limit in BENCH:
        words = [*what, *sizes.split(), "--dtype", "bfloat16", "--seconds", "1", "--device", target.device]
        if target.rehearsal:
            words = [word.replace("triton", "cpu") for word in words]
            words += ["--quick", "--threads", "1", "--batch", "1", "--tokens", "64"]
        command = (*PYTHON, "benchmarks", *words, "--json", "{rows}")
        steps.append(Step(name, command, limit, LEAST_TO_MEASURE, _with_peers(), read_benchmarks))
    return steps[:2] if target.rehearsal else steps


def _with_peers() -> tuple[tuple[str, str], ...]:
    """So that Python finds the packages in .peers/ and in the folders there."""
    if not PEERS.is_dir():
        return ()
    folders = [PEERS, *sorted(path for path in PEERS.iterdir() if path.is_dir())]
    inherited = filter(None, [os.environ.get("PYTHONPATH")])
    return (("PYTHONPATH", os.pathsep.join([*map(str, folders), *inherited])),)


HOT = (
    ("delta_update forward", "ours (triton)", 8192, 1),
    ("delta_update forward+backward", "ours (triton)", 8192, 1),
    ("delta_update forward", "ours (cuda)", 8192, 1),
    ("delta_update forward+backward", "ours (cuda)", 8192, 1),
    ("delta_step", "ours (triton)", 1, 256),
    ("layer Qwen3-4B", "with memory (triton)", 8192, 1),
    ("layer Qwen3-4B", "with memory (triton)", 1, 1),
)
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "WarpStateStats", "MemoryWorkloadAnalysis")


def _profile(target: Target) -> list[Step]:
    ncu = tool("ncu") or "ncu"
    counters = [ncu, "--profile-from-start", "off", "--clock-control", "none", "--csv", "--page", "details"]
    counters += [word for section in SECTIONS for word in ("--section", section)]
    steps = []
    for operation, implementation, tokens, batch in HOT:
        case = [operation, implementation, "--tokens", str(tokens), "--batch", str(batch)]
        name = f"{operation}, {implementation}, B={batch} T={tokens}"
        if target.rehearsal:
            case[1:4] = [
                implementation.replace("triton", "cpu").replace("cuda", "cpu"),
                "--tokens",
                str(min(tokens, 64)),
            ]
        steps.append(Step(f"{name}: times", _own("hot", target, *case), 120))
        program = (*PYTHON, "benchmarks.gpu.hot", *case)
        if not target.rehearsal and tool("ncu"):
            steps.append(Step(f"{name}: counters", (*counters, *program), 200, read=hot.read_ncu))
    return steps[:1] if target.rehearsal else steps


PARTS: dict[str, Callable[[Target], list[Step]]] = {
    "build": _build,
    "graph": _graph,
    "bench": _bench,
    "test": _test,
    "profile": _profile,
    "sanitize": _sanitize,
}


def steps(part: str, target: Target) -> Sequence[Step]:
    return PARTS[part](target)
