"""The Triton kernels compile for each GPU generation without register spills. Triton brings the tools; no GPU is
needed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tools.compile_report import __main__ as command
from tools.compile_report.compiler import Row, compile_kernel, innermost_loops
from tools.compile_report.estimate import estimate

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

ARCHS = (80, 90, 100, 120)
VARIANTS: dict[str, dict] = {
    "float16": {"dtype": "float16", "chunked": False},
    "float32": {"dtype": "float32"},
    "lambda_outside with a decay": {"mode": "lambda_outside", "free_decay": True, "chunked": False},
    "no_lambda": {"mode": "no_lambda", "chunked": False},
    "affine": {"mode": "affine"},
    "packed and masked": {"cu_seqlens": True, "mask": True},
    "gates per head": {"per_head": True},
    "four heads": {"heads": 4, "chunked": False},
}
LAYER_VARIANTS: dict[str, dict] = {
    "layer: float32": {"dtype": "float32"},
    "layer: float64": {"dtype": "float64", "weight_dtype": "float64"},
    "layer: 16 bits, float64 weights": {"dtype": "bfloat16", "weight_dtype": "float64"},
    "layer: float64, 16-bit weights": {"dtype": "float64", "weight_dtype": "float16"},
    "layer: 16-bit weights": {"dtype": "float16", "weight_dtype": "bfloat16"},
    "layer: coupled gates per head, no mask": {"free_decay": False, "per_head": True, "mask": False},
    "layer: rank 4": {"ranks": (4,)},
    "layer: four heads of 8": {"heads": 4},
    "layer: four heads of 16": {"heads": 4, "ranks": (16,)},
    "layer: rank 128, float32": {"ranks": (128,), "dtype": "float32"},
}
LAYER_KERNELS = [
    "projection",
    "projection of a token",
    "projection adjoint",
    "projection to x",
    "decode",
    "prefill",
    "segments",
    "segments backward",
]
APART = {
    *(name for name in LAYER_VARIANTS if "float64" in name),
    "layer: four heads of 8",
    "layer: four heads of 16",
    "layer: rank 128, float32",
}
"""Here a chunk is not one tile of the projection, or the tile has no room for the map."""
FOLDS = [f"{x}{of}" for of in ("", " adjoint") for x in ("maps", "fold maps", "fold groups", "fold")]
SCANS = ["forward", "backward", *FOLDS, "forward of chunks", "backward of chunks"]
CORRECTIONS: dict[str, dict] = {  # H·R of 8 on each arch, else on one
    "correction": {"archs": ARCHS, "ranks": (8,)},
    "correction, four heads": {"archs": (90,), "ranks": (32,)},
    "correction, float32": {"archs": (90,), "ranks": (8,), "dtype": "float32"},
    "correction, smaller": {"archs": (90,), "ranks": (8,), "columns": 576, "head_dim": 64},
}
REPORTS = {"layer": "layer_report", "correction": "correction_report"}
PROGRAM = """
import json, sys, torch
from tools.compile_report import cases
wanted = json.loads(sys.argv[1])
rows = {}
for name, (report, options) in wanted.items():
    options = {"dtype": "bfloat16", "loops": False, **options}
    options = {n: getattr(torch, x) if n.endswith("dtype") else x for n, x in options.items()}
    rows[name] = [(*row, row.spills) for row in getattr(cases, report)(**options)]
print(json.dumps(rows))
"""


@pytest.fixture(scope="module")
def compiled() -> dict[str, list]:
    """Rows by name, from one process without TRITON_INTERPRET, because interpreted kernels cannot be compiled."""
    wanted: dict[str, dict] = {"headline": {"archs": ARCHS, "ranks": (8,)}}
    wanted["other ranks"] = {"archs": (90,), "ranks": (4, 16)}
    wanted |= {name: {"archs": (90,), "ranks": (8,), **options} for name, options in VARIANTS.items()}
    wanted |= CORRECTIONS
    wanted["layer"] = {"archs": ARCHS, "ranks": (8,)}
    wanted |= {name: {"archs": (90,), "ranks": (8,), **options} for name, options in LAYER_VARIANTS.items()}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = str(Path(command.__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    reports = {name: (REPORTS.get(re.split("[:,]", name)[0], "scan_report"), x) for name, x in wanted.items()}
    process = [sys.executable, "-c", PROGRAM, json.dumps(reports)]
    done = subprocess.run(process, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    return {name: [(Row(*row[:-1]), row[-1]) for row in found] for name, found in rows.items()}


@pytest.mark.parametrize(("rank", "arch"), [*((8, arch) for arch in ARCHS), (4, 90), (16, 90)])
@pytest.mark.parametrize("kernel", [*SCANS, "step"])
def test_no_scan_kernel_spills_registers(compiled, kernel, rank, arch):
    rows = compiled["headline" if rank == 8 else "other ranks"]
    ((row, spills),) = [x for x in rows if x[0][:3] == (kernel, rank, arch)]
    print(row)
    assert 0 < row.registers <= 255
    assert not spills, row


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_compile_without_spills(compiled, variant):
    rows = compiled[variant]
    step = [] if variant in ("affine", "packed and masked") else ["step"]
    of_mask = {"mask", "mask adjoint"} if variant == "packed and masked" else set()
    scans = SCANS if VARIANTS[variant].get("chunked", True) else SCANS[:2]
    assert [row.kernel for row, _ in rows if row.kernel not in of_mask] == [*scans, *step]
    assert of_mask <= {row.kernel for row, _ in rows}
    for row, spills in rows:
        print(row)
        assert not spills, row


@pytest.mark.parametrize("variant", ["layer", *LAYER_VARIANTS])
def test_layer_kernels_compile_without_spills(compiled, variant):
    rows = compiled[variant]
    archs = ARCHS if variant == "layer" else (90,)
    kernels = [name for name in LAYER_KERNELS if name != "prefill" or variant not in APART]
    assert [(row.arch, row.kernel) for row, _ in rows] == [(arch, name) for arch in archs for name in kernels]
    for row, spills in rows:
        print(row)
        # At rank 128 a program's registers do not hold the state.
        assert not spills or (row.kernel, row.rank) == ("decode", 128), row
        assert row.shared <= 99 * 1024, row  # the limit of sm_120


@pytest.mark.parametrize("name", CORRECTIONS)
def test_corrections_compile_without_spills(compiled, name):
    forms = [f"{form}{kernel}" for form in ("plain", "norm", "head") for kernel in ("", "_rows", "_cols")]
    assert {row.kernel for row, _ in compiled[name]} == set(forms)
    for row, spills in compiled[name]:
        print(row)
        assert not spills, row


def test_a_lane_keeps_its_state_in_registers(compiled):
    """Nothing goes through shared memory: a lane has a whole row, and lanes of a warp exchange numbers by shuffles."""
    assert {row.shared for row, _ in compiled["headline"]} == {0}


def test_report_fails_on_a_spill(monkeypatch, capsys):
    row = Row("forward", 8, 90, 64, stack=0, spill_stores=0, spill_loads=0, shared=0, loops=(100,))
    rows = [row, row._replace(kernel="maps", loops=(70,)), row._replace(kernel="fold", loops=(80,))]
    monkeypatch.setattr(command, "report", lambda: rows)
    assert command.main() == 0
    rows.append(row._replace(stack=8, spill_stores=2, spill_loads=1))
    assert command.main() == 1
    assert "sm_90" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted here")
def test_report_raises_for_interpreted_kernels():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        command.report()


def test_report_raises_for_an_unknown_argument():
    kernel = SimpleNamespace(params=[SimpleNamespace(name="p_x")], fn=SimpleNamespace(__name__="some_kernel"))
    with pytest.raises(TypeError, match="some_kernel has no arguments p_y"):
        compile_kernel(kernel, {"p_x": None, "p_y": None, "num_warps": 1}, 90)


def test_the_estimate_follows_from_the_loops():
    """Computed by hand for R = 8: 100 instructions per token; with chunks, 64 tokens twice and 128 maps."""
    row = Row("forward", 8, 90, 64, stack=0, spill_stores=0, spill_loads=0, shared=0, loops=(100, 20))
    rows = [row, row._replace(kernel="maps", loops=(70,)), row._replace(kernel="fold", loops=(80,))]
    (of_8192,) = estimate(rows, tokens=8192)
    assert of_8192.chain == 40
    assert of_8192.instructions == 100
    cycles = of_8192._replace(plain=of_8192.plain * 1980, chunked=of_8192.chunked * 1980)
    assert cycles.plain == pytest.approx(8192 * 100)
    assert cycles.chunked == pytest.approx(64 * (100 + 70) + 128 * 80)


def test_innermost_loops_are_found_in_assembly():
    """Only innermost loops count. A jump to itself is the end of the kernel."""
    lines = [".L_x_0:", "A", ".L_x_1:", "B", "C", "@P0 BRA `(.L_x_1)", "D", "BRA `(.L_x_0)", ".L_x_2:", "BRA `(.L_x_2)"]
    assembly = "\n".join(x if x.startswith(".") else f"        /*00a0*/    {x} ;" for x in lines)
    assert innermost_loops(assembly) == (3,)
