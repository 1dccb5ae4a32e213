"""An argument that does not fit raises before anything runs. The message names it, what came and what is wanted."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import deltamem_kernels
from deltamem_kernels import BackendUnavailableError, delta_update
from deltamem_kernels.compat import triton_affine_scan

B, T, H, R = 2, 3, 5, 4  # all different: a dimension in the wrong place cannot fit by chance
Call = dict[str, object]


def batched() -> Call:
    """A good call with every operand there is."""
    gate = torch.rand(B, T, H, R)
    return {
        **{name: torch.randn(B, T, H, R) for name in ("q", "k", "v")},
        "beta": gate,
        "decay": 1 - gate,
        "initial_state": torch.randn(B, H, R, R),
        "mask": torch.rand(B, T) < 0.5,
    }


def one_head() -> Call:
    """A good call without H."""
    return {
        name: x if name == "mask" else x[:, 0].clone() if name == "initial_state" else x[:, :, 0].clone()
        for name, x in batched().items()
    }


def packed() -> Call:
    """Two sequences and an empty one, in one row."""
    operands = {name: torch.rand(1, T, H, R) for name in ("q", "k", "v", "beta")}
    return {**operands, "initial_state": torch.randn(3, H, R, R), "cu_seqlens": torch.tensor([0, 2, 2, T])}


def bad(
    base: Callable[[], Call], changes: dict[str, Callable[[object], object]], error: type[Exception], *words: str
) -> object:
    """One line of the table: a good call, changes of its arguments, and the words that the message must contain."""
    return pytest.param(base, changes, error, words, id="-".join([base.__name__, *changes, *words[1:]]))


def put(value: object) -> Callable[[object], object]:
    """Replace an argument."""
    return lambda _: value


def sized(*shape: int) -> Callable[[object], Tensor]:
    """Zeros of another shape in the argument's dtype."""
    return lambda x: torch.zeros(shape, dtype=x.dtype)


def to(target: object) -> Callable[[object], Tensor]:
    """Another dtype or device."""
    return lambda x: x.to(target)


QKV = ("q", "k", "v")
GATES = ("beta", "decay")
FLOAT_OPERANDS = (*QKV, *GATES, "initial_state")
WANTED = {  # what the message says is wanted
    "q": "[B, T, H, R] or [B, T, R]",
    "k": "of q's shape",
    "v": "of q's shape",
    "beta": "[B, T, H, R] or [B, T, H]",
    "decay": "[B, T, H, R] or [B, T, H]",
    "initial_state": "[N, H, R, R]",
}
DTYPES = "float16, bfloat16, float32 or float64"

CASES = [
    # values that are not tensors
    *(bad(batched, {n: lambda x: x.tolist()}, TypeError, f"{n} must be a tensor {WANTED[n]}", "got list")
      for n in FLOAT_OPERANDS),
    *(bad(batched, {n: put(0.5)}, TypeError, f"{n} must be a tensor {WANTED[n]}", "got float 0.5")
      for n in FLOAT_OPERANDS),
    *(bad(batched, {n: lambda x: x.numpy()}, TypeError, f"{n} must be a tensor {WANTED[n]}", "got ndarray")
      for n in FLOAT_OPERANDS),
    *(bad(batched, {n: put(None)}, TypeError, f"{n} must be a tensor {WANTED[n]}", "got NoneType None")
      for n in (*QKV, "beta")),
    bad(batched, {"q": put(7)}, TypeError, "q must be a tensor", "got int 7"),
    bad(batched, {"mask": lambda x: x.tolist()}, TypeError, "mask must be a bool tensor [B, T]", "got list"),
    bad(batched, {"mask": put(True)}, TypeError, "mask must be a bool tensor [B, T]", "got bool True"),
    bad(batched, {"mask": lambda x: x.numpy()}, TypeError, "mask must be a bool tensor [B, T]", "got ndarray"),
    bad(packed, {"cu_seqlens": put([0, 2, 2, T])}, TypeError, "cu_seqlens must be an int32 or int64 tensor [N + 1]",
        "got list [0, 2, 2, 3]"),
    bad(packed, {"cu_seqlens": put(T)}, TypeError, "cu_seqlens must be an int32 or int64 tensor", "got int 3"),
    bad(packed, {"cu_seqlens": lambda x: x.numpy()}, TypeError, "cu_seqlens must be an int32 or int64 tensor",
        "got ndarray"),
    # dtypes
    *(bad(batched, {n: to(dtype)}, TypeError, f"{n} must be {DTYPES} {WANTED[n]}", f"got {word} [")
      for n in FLOAT_OPERANDS
      for dtype, word in ((torch.int64, "int64"), (torch.bool, "bool"), (torch.complex64, "complex64"))),
    bad(batched, {"q": to(torch.float8_e4m3fn)}, TypeError, f"q must be {DTYPES}", "got float8_e4m3fn [2, 3, 5, 4]"),
    *(bad(batched, {"mask": to(dtype)}, TypeError, "mask must be a bool tensor [B, T]", f"got {word} [2, 3] on cpu")
      for dtype, word in ((torch.int32, "int32"), (torch.uint8, "uint8"), (torch.float32, "float32"))),
    *(bad(packed, {"cu_seqlens": to(dtype)}, TypeError, "cu_seqlens must be an int32 or int64 tensor",
          f"got {word} [4] on cpu")
      for dtype, word in ((torch.float32, "float32"), (torch.int16, "int16"), (torch.bool, "bool"))),
    # layouts: there is no memory to point a kernel at
    *(bad(batched, {n: lambda x: x.to_sparse()}, TypeError, f"{n} must be a dense tensor {WANTED[n]}",
          "got sparse_coo float32 [2, ")
      for n in FLOAT_OPERANDS),
    bad(batched, {"mask": lambda x: x.to_sparse()}, TypeError, "mask must be a dense tensor [B, T]",
        "got sparse_coo bool [2, 3]"),
    bad(packed, {"cu_seqlens": lambda x: x.to_sparse()}, TypeError, "cu_seqlens must be a dense tensor [N + 1]",
        "got sparse_coo int64 [4]"),
    # q's own shape
    bad(batched, {"q": sized(T, R)}, ValueError, "q must be [B, T, H, R] or [B, T, R]", "got float32 [3, 4] on cpu"),
    bad(batched, {"q": sized()}, ValueError, "q must be [B, T, H, R] or [B, T, R]", "got float32 [] on cpu"),
    bad(batched, {"q": sized(1, B, T, H, R)}, ValueError, "q must be [B, T, H, R] or [B, T, R]",
        "got float32 [1, 2, 3, 5, 4]"),
    bad(batched, {n: sized(B, T, H, 0) for n in QKV}, ValueError, "q must be of rank R from 1 to 128",
        "got float32 [2, 3, 5, 0]"),
    bad(batched, {n: sized(B, T, H, 129) for n in QKV}, ValueError, "q must be of rank R from 1 to 128",
        "got float32 [2, 3, 5, 129]"),
    bad(one_head, {n: sized(B, T, 129) for n in QKV}, ValueError, "q must be of rank R from 1 to 128",
        "got float32 [2, 3, 129]"),
    bad(batched, {n: sized(B, T, 0, R) for n in QKV}, ValueError, "q must be of at least one head",
        "got float32 [2, 3, 0, 4]"),
    # shapes of the other operands: every dimension, one too many, one too few
    *(bad(base, {n: sized(*shape)}, ValueError, f"{n} must be of q's shape = {wanted}", f"got float32 {list(shape)} on")
      for n in ("k", "v")
      for base, wanted, shapes in (
          (batched, "[2, 3, 5, 4]", ((1, T, H, R), (B, 1, H, R), (B, T, 1, R), (B, T, H, 1), (B, T, R), (B, H, T, R))),
          (one_head, "[2, 3, 4]", ((1, T, R), (B, T, 1, R), (B, T))))
      for shape in shapes),
    *(bad(batched, {n: sized(*shape)}, ValueError,
          f"{n} must be [B, T, H, R] or [B, T, H] = [2, 3, 5, 4] or [2, 3, 5],", f"got float32 {list(shape)} on cpu")
      for n in GATES
      for shape in ((1, T, H, R), (B, 1, H, R), (B, T, 1, R), (B, T, H, 1), (B, T, R), (B, T), (B, T, H, R, 1))),
    *(bad(one_head, {n: sized(*shape)}, ValueError,
          f"{n} must be [B, T, H, R] or [B, T, H] = ", "[2, 3, 4]", "[2, 3]", f"got float32 {list(shape)} on cpu")
      for n in GATES
      for shape in ((1, T, R), (B, R), (B, T, H), (B, T, 2, R))),
    *(bad(batched, {"initial_state": sized(*shape)}, ValueError, "initial_state must be [N, H, R, R] = [2, 5, 4, 4],",
          f"got float32 {list(shape)} on cpu")
      for shape in ((1, H, R, R), (B, 1, R, R), (B, H, 1, R), (B, H, R, 1), (B, R, R), (B, H, R), (H, R, R))),
    *(bad(one_head, {"initial_state": sized(*shape)}, ValueError,
          "initial_state must be [N, H, R, R] = ", "[2, 4, 4]", f"got float32 {list(shape)} on cpu")
      for shape in ((1, R, R), (B, H, R, R), (R, R))),
    *(bad(batched, {"mask": sized(*shape)}, ValueError, "mask must be [B, T] = [2, 3],", f"got bool {list(shape)} on")
      for shape in ((1, T), (B, 1), (T, B), (B, T, 1), (T,), (B, T, H))),
    # packed sequences
    bad(packed, {"initial_state": sized(1, H, R, R)}, ValueError, "initial_state must be [N, H, R, R] = [3, 5, 4, 4],",
        "got float32 [1, 5, 4, 4]"),
    bad(packed, {"cu_seqlens": sized(3)}, ValueError, "initial_state must be [N, H, R, R] = [2, 5, 4, 4],",
        "got float32 [3, 5, 4, 4]"),
    bad(packed, {"cu_seqlens": sized(0)}, ValueError, "cu_seqlens must be [N + 1]", "got int64 [0] on cpu"),
    bad(packed, {"cu_seqlens": sized()}, ValueError, "cu_seqlens must be [N + 1]", "got int64 [] on cpu"),
    bad(packed, {"cu_seqlens": sized(1, 4)}, ValueError, "cu_seqlens must be [N + 1]", "got int64 [1, 4] on cpu"),
    bad(packed, {n: sized(B, T, H, R) for n in (*QKV, "beta")}, ValueError, "cu_seqlens needs packed sequences, B = 1",
        "got q with B = 2"),
    # devices
    *(bad(batched, {n: to("meta")}, ValueError, f"{n} must be on q's device cpu", "on meta")
      for n in (*FLOAT_OPERANDS[1:], "mask")),
    bad(packed, {"cu_seqlens": to("meta")}, ValueError, "cu_seqlens must be on q's device cpu",
        "got int64 [4] on meta"),
    bad(batched, {"q": to("meta")}, ValueError, "k must be on q's device meta", "got float32 [2, 3, 5, 4] on cpu"),
    # modes
    *(bad(batched, {"mode": put(mode)}, ValueError, "mode must be one of standard, lambda_outside, no_lambda",
          f"got {mode!r}")
      for mode in ("gated", "", "Standard", "affine")),
    *(bad(batched, {"mode": put(mode)}, TypeError, "mode must be one of standard, lambda_outside, no_lambda",
          f"got {type(mode).__name__} {mode!r}")
      for mode in (None, 0, ["standard"])),
    bad(batched, {"mode": lambda _: torch.zeros(2).numpy()}, TypeError, "mode must be one of standard", "got ndarray"),
    bad(batched, {"mode": put("no_lambda")}, ValueError, "decay must be None in mode 'no_lambda'",
        "got float32 [2, 3, 5, 4] on cpu"),
    bad(batched, {"mode": put("no_lambda"), "decay": put(0.5)}, ValueError, "decay must be None in mode 'no_lambda'",
        "got float 0.5"),
    # backends
    *(bad(batched, {"backend": put(name)}, ValueError, "backend must be one of triton, cuda, cpu, reference",
          f"got {name!r}")
      for name in ("metal", "CPU", "auto")),
    *(bad(batched, {"backend": put(name)}, TypeError, "backend must be the name of a backend, or None",
          f"got {type(name).__name__} {name!r}")
      for name in (3, 0, ["cpu"], torch.device("cpu"))),
    bad(batched, {"backend": put("cuda")}, BackendUnavailableError, "backend 'cuda' cannot run on cpu:"),
    bad(batched, {**{n: to("meta") for n in (*FLOAT_OPERANDS, "mask")}, "backend": put("cpu")},
        BackendUnavailableError, "backend 'cpu' cannot run on meta: it runs on CPU tensors, not on meta"),
    bad(batched, {**{n: to("meta") for n in (*FLOAT_OPERANDS, "mask")}, "backend": put("metal")},
        ValueError, "backend must be one of triton, cuda, cpu, reference", "got 'metal'"),
]  # fmt: skip


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(("base", "changes", "error", "words"), CASES)
def test_delta_update_raises_for_arguments_that_do_not_fit(base, changes, error, words, gradients):
    """With gradients a call takes another way to the kernels. Both are checked."""
    call = base()
    for name, change in changes.items():
        call[name] = change(call.get(name))
    if gradients:
        call = {
            n: x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in call.items()
        }
    refuses(lambda: delta_update(**call), call, error, words)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "values",
    [(1, 2, 3), (-1, 2, 3), (0, 2, 2), (0, 2, 4), (0, 3, 2, 3), (0, -1, 3), (0, 7, 3), (0,), (3, 2, 0)],
    ids=str,
)
def test_values_of_cu_seqlens_that_do_not_rise_from_0_to_T_raise(values, index_dtype, backend, gradients):
    """On the CPU looking at them costs nothing, and a kernel that trusted them would read outside of its memory."""
    call = {n: torch.rand(1, T, H, R).requires_grad_(gradients) for n in (*QKV, "beta")}
    call["cu_seqlens"] = torch.tensor(values, dtype=index_dtype)
    words = ("cu_seqlens must rise from 0 to T=3", f"got {list(values)}")
    refuses(lambda: delta_update(**call, backend=backend), call, ValueError, words)


AFFINE = ("state", "q", "k", "v", "keep", "erase", "write", "token_mask")


def affine() -> Call:
    """A good call of upstream's scan."""
    shapes = dict.fromkeys(AFFINE, (B, T, R)) | {"state": (B, R, R), "token_mask": (B, T)}
    return {name: torch.rand(shape) for name, shape in shapes.items()}


AFFINE_CASES = [
    *(bad(affine, {n: lambda x: x.tolist()}, TypeError, f"{n} must be a tensor", "got list") for n in AFFINE),
    *(bad(affine, {n: put(None)}, TypeError, f"{n} must be a tensor", "got NoneType None") for n in AFFINE[:-1]),
    *(bad(affine, {n: lambda x: x.unsqueeze(0)}, RuntimeError, "expected 3D tensors", f"got {n} [1, 2, ")
      for n in AFFINE[:-1]),
    *(bad(affine, {n: to(torch.int32)}, RuntimeError, f"unsupported dtype torch.int32 of {n}") for n in AFFINE[:-1]),
    *(bad(affine, {n: to("meta")}, RuntimeError, f"{n} is on meta, the state on cpu") for n in AFFINE[1:-1]),
    *(bad(affine, {n: sized(B, T + 1, R)}, RuntimeError, f"{n} [2, 4, 4] must have q's shape", "[2, 3, 4]")
      for n in AFFINE[2:-1]),
    bad(affine, {"state": sized(B, R, R + 1)}, RuntimeError, "state must be square", "got [2, 4, 5]"),
    bad(affine, {"state": sized(B, 0, 0)}, RuntimeError, "rank must be from 1 to 128", "got 0"),
    bad(affine, {"state": sized(B, 129, 129)}, RuntimeError, "rank must be from 1 to 128", "got 129"),
    bad(affine, {"state": sized(B + 1, R, R)}, RuntimeError, "q [2, 3, 4] does not match the state [3, 4, 4]"),
    bad(affine, {"q": sized(B, T, R + 1)}, RuntimeError, "q [2, 3, 5] does not match the state [2, 4, 4]"),
    bad(affine, {"token_mask": sized(B, T, 1)}, ValueError, "token_mask must be [batch, seq] = [2, 3]",
        "got [2, 3, 1]"),
    bad(affine, {"token_mask": sized(B, 1)}, ValueError, "token_mask must be [batch, seq] = [2, 3]", "got [2, 1]"),
]  # fmt: skip


@pytest.mark.parametrize(("base", "changes", "error", "words"), AFFINE_CASES)
def test_the_affine_scan_raises_for_arguments_that_do_not_fit(base, changes, error, words):
    call = base()
    for name, change in changes.items():
        call[name] = change(call[name])
    refuses(lambda: triton_affine_scan(**call), call, error, words)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("metal", ValueError, ("DELTAMEM_BACKEND must be one of triton, cuda, cpu, reference", "got 'metal'")),
        ("CPU", ValueError, ("DELTAMEM_BACKEND must be one of triton, cuda, cpu, reference", "got 'CPU'")),
        ("cuda", BackendUnavailableError, ("DELTAMEM_BACKEND 'cuda' cannot run on cpu:",)),
    ],
)
def test_a_wrong_backend_of_the_environment_is_named_by_its_variable(monkeypatch, name, error, words, gradients):
    """There is no argument to name."""
    monkeypatch.setenv("DELTAMEM_BACKEND", name)
    call = {n: torch.rand(B, T, H, R).requires_grad_(gradients) for n in (*QKV, "beta")}
    refuses(lambda: delta_update(**call), call, error, words)
    call = affine()
    refuses(lambda: triton_affine_scan(**call), call, error, words)


def test_the_cpu_backend_of_the_environment_refuses_meta_tensors(monkeypatch):
    monkeypatch.setenv("DELTAMEM_BACKEND", "cpu")
    call = {n: torch.rand(B, T, H, R, device="meta") for n in (*QKV, "beta")}
    refuses(lambda: delta_update(**call), call, BackendUnavailableError, ("DELTAMEM_BACKEND 'cpu' cannot run on meta",))


def test_meta_tensors_have_shapes_and_dtypes():
    """They are not refused: they tell what a call would return, as everywhere in torch."""
    call = {n: torch.rand(B, 64, H, R, device="meta", dtype=torch.bfloat16) for n in (*QKV, "beta")}
    out = delta_update(**call)
    assert (out.reads.shape, out.reads.dtype, out.reads.device.type) == ((B, 64, H, R), torch.bfloat16, "meta")
    assert (out.final_state.shape, out.final_state.dtype) == ((B, H, R, R), torch.float32)


@pytest.mark.slow
def test_triton_refuses_cpu_tensors_without_its_interpreter():
    """In a process of its own, because kernels are interpreted or not from when they are loaded."""
    program = (
        "import torch, deltamem_kernels as d\n"
        "x = torch.rand(1, 2, 1, 4)\n"
        "try: d.delta_update(x, x, x, x, backend='triton')\n"
        "except d.BackendUnavailableError as error: print(error)\n"
    )
    environment = {n: v for n, v in os.environ.items() if n not in ("TRITON_INTERPRET", "DELTAMEM_BACKEND")}
    environment["PYTHONPATH"] = str(Path(deltamem_kernels.__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout.removeprefix("backend 'triton' cannot run on cpu: ")
    assert said != done.stdout, done.stdout
    assert said.strip(), "no reason given"


def refuses(call: Callable[[], object], arguments: Call, error: type[Exception], words: tuple[str, ...]) -> None:
    """Check that the call raises this error with these words, and does not change its arguments."""
    before = {name: snapshot(x) for name, x in arguments.items()}
    with pytest.raises(error) as info:
        call()
    assert info.type is error
    for word in words:
        assert word in str(info.value)
    for name, x in arguments.items():
        assert_same(name, snapshot(x), before[name])


def snapshot(x: object) -> tuple:
    """Return everything of an argument that a call could change."""
    if not isinstance(x, Tensor):
        return (repr(x),)
    values = None if x.device.type == "meta" else x.detach().to_dense().clone() if x.is_sparse else x.detach().clone()
    place = None if x.is_sparse else (x.stride(), x.data_ptr())
    return x.dtype, x.shape, x.device, place, x.requires_grad, x.grad_fn, x.grad, x._version, values


def assert_same(name: str, after: tuple, before: tuple) -> None:
    for now, then in zip(after, before, strict=True):
        if isinstance(then, Tensor):
            assert torch.equal(now, then), f"{name} changed"
        else:
            assert now == then, f"{name} changed"
