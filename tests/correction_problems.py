"""Random problems for the two forms of the correction, the float64 oracle, and the PyTorch that a layer would run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from problems import FLOAT32_TOLERANCE, assert_close, error, fence, rounding
from torch import Tensor

from deltamem_kernels import attention_correction, attention_correction_norm_rope

NAMES = ("base", "reads", "weight", "scale", "norm_weight")
DTYPES = torch.dtype | dict[str, torch.dtype]


@dataclass
class Correction:
    """Differentiable operands by name (scale only where it is a tensor), and the rest of the arguments."""

    function: Callable[..., Tensor]
    operands: dict[str, Tensor]
    options: dict = field(default_factory=dict)

    def to(self, dtype: torch.dtype | None = None, device: str | None = None) -> Correction:
        def moved(x: object) -> object:
            return x.detach().clone().to(device=device, dtype=dtype or x.dtype) if isinstance(x, Tensor) else x

        return replace(
            self,
            operands={n: moved(x) for n, x in self.operands.items()},
            options={n: moved(x) for n, x in self.options.items()},
        )

    def forward(self, backend: str | None, **more: object) -> Tensor:
        return self.function(**self.operands, **self.options, backend=backend, **more)

    def forward_backward(
        self, backend: str | None, cotangent: Tensor, wanted: tuple[str, ...] | None = None
    ) -> dict[str, Tensor]:
        wanted = tuple(self.operands) if wanted is None else wanted
        leaves = {n: x.detach().requires_grad_(n in wanted) for n, x in self.operands.items()}
        out = self.function(**leaves, **self.options, backend=backend)
        grads = torch.autograd.grad(out, [leaves[n] for n in wanted], cotangent)
        return {"out": out.detach(), **{f"d_{n}": g for n, g in zip(wanted, grads, strict=True)}}


def make(
    B: int | None = 2,
    T: int = 5,
    H: int | None = 1,
    R: int = 8,
    D: int = 24,
    *,
    head_dim: int = 0,
    norm: bool = False,
    rope: bool = False,
    one_rope: bool = False,
    scale: float | None = None,
    dtype: DTYPES = torch.float32,
    fenced: bool = False,
    device: str = "cpu",
) -> Correction:
    """B of None is decoding: `[T, D]`. H of None leaves the heads' dimension out. A scale of None is a tensor.
    With a head_dim the fused form, whose rotary tables are shared by the batch with `one_rope`."""
    # A large eps: beside it the gradient along what is normed is no difference of two equal numbers.
    rows = (T,) if B is None else (B, T)
    operands = {
        "base": torch.randn(*rows, D),
        "reads": torch.randn(*rows, *(() if H is None else (H,)), R),
        "weight": torch.randn(D, (H or 1) * R) / R**0.5,
    }
    if scale is None:
        operands["scale"] = torch.tensor(1.7)
    if norm:
        operands["norm_weight"] = torch.rand(head_dim or D) + 0.5
    options: dict = {"norm_eps": 0.5} | ({} if scale is None else {"scale": scale})
    tables: dict[str, Tensor] = {}
    if rope:  # any numbers, so that halves taken for each other show
        tables = {n: torch.randn(1 if one_rope else rows[0], *rows[1:], head_dim) for n in ("cos", "sin")}

    def made(name: str, x: Tensor) -> Tensor:
        x = x.to(dtype.get(name, torch.float32) if isinstance(dtype, dict) else dtype)
        return fence(x.to(device)) if fenced and x.ndim else x.to(device)

    if head_dim:
        options["head_dim"] = head_dim
    return Correction(
        attention_correction_norm_rope if head_dim else attention_correction,
        {n: made(n, x) for n, x in operands.items()},
        {**options, **{n: made(n, x) for n, x in tables.items()}},
    )


def as_a_layer_would(
    base: Tensor,
    reads: Tensor,
    weight: Tensor,
    scale: float | Tensor = 1.0,
    *,
    head_dim: int = 0,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    backend: object = None,
) -> Tensor:
    """The small calls that the operations replace, every result in the operands' dtype as transformers leaves it."""

    def rms_norm(x: Tensor) -> Tensor:
        y = x.float()
        return norm_weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + norm_eps)).to(x.dtype)

    reads = reads if reads.ndim == base.ndim else reads.flatten(-2)
    delta = torch.nn.functional.linear(reads, weight) * scale
    if not head_dim:
        return base + (delta if norm_weight is None else rms_norm(delta))
    y = (base + delta).unflatten(-1, (-1, head_dim))
    y = y if norm_weight is None else rms_norm(y)
    if cos is not None:
        a, b = y.chunk(2, -1)
        y = y * cos.unsqueeze(-2) + torch.cat((-b, a), -1) * sin.unsqueeze(-2)
    return y.flatten(-2)


def cotangent_for(problem: Correction, fenced: bool = False) -> Tensor:
    x = torch.randn(problem.operands["base"].shape).to(problem.operands["base"])
    return fence(x) if fenced else x


def oracle(problem: Correction, cotangent: Tensor, wanted: tuple[str, ...] | None = None) -> dict[str, Tensor]:
    """The same in float64 on the CPU, from the same rounded operands."""
    return problem.to(torch.float64, "cpu").forward_backward("reference", cotangent.double().cpu(), wanted)


def check(
    problem: Correction,
    implementation,
    tolerance: float = FLOAT32_TOLERANCE,
    fenced: bool = False,
    wanted: tuple[str, ...] | None = None,
) -> None:
    """Values and gradients; problem is on the implementation's device. A result may be rounded to its dtype, once."""
    cotangent = cotangent_for(problem, fenced)
    exact = oracle(problem, cotangent)
    ours = problem.forward_backward(implementation.backend, cotangent, wanted)
    for name, x in ours.items():
        like = problem.operands["base" if name == "out" else name.removeprefix("d_")]
        assert (x.dtype, x.shape) == (like.dtype, like.shape), name
        limit = tolerance + rounding(x.dtype, implementation)
        if name == "d_scale":
            assert abs(x.item() - exact[name].item()) <= limit * scale_of_d_scale(problem, exact)
        else:
            assert_close({name: x}, {name: exact[name]}, limit)


def scale_of_d_scale(problem: Correction, exact: dict[str, Tensor]) -> float:
    """The gradient of the scale is a sum of numbers of both signs, which may all but cancel: what they are at most."""
    scale, reads = (problem.operands[n].double().cpu() for n in ("scale", "reads"))
    return (exact["d_reads"].norm() * reads.norm() / scale).item()


def check_16_bit(problem: Correction, implementation) -> None:
    """At most twice the error of the same calls in plain PyTorch in that dtype."""
    cotangent = cotangent_for(problem)
    exact = oracle(problem, cotangent)
    ours = problem.forward_backward(implementation.backend, cotangent)
    theirs = replace(problem, function=as_a_layer_would).forward_backward(None, cotangent)
    for name, x in exact.items():
        if name != "d_scale":  # one number: which of two roundings is luckier says nothing
            assert error(ours[name], x) <= 2 * error(theirs[name], x), name
    off = abs(ours["d_scale"].item() - exact["d_scale"].item())
    assert off <= torch.finfo(ours["d_scale"].dtype).eps * scale_of_d_scale(problem, exact)


def check_rows_are_alone(problem: Correction, implementation) -> None:
    """Each token of one sequence alone has the bits that it has among others, in value and in its gradients."""
    cotangent, by_token = cotangent_for(problem), ("base", "reads")
    together = problem.forward_backward(implementation.backend, cotangent, by_token)
    T = cotangent.shape[1]
    for t in (0, 1, T // 2, T - 1):
        at = slice(t, t + 1)
        operands = {n: x[:, at] if n in by_token else x for n, x in problem.operands.items()}
        options = {n: x[:, at] if n in ("cos", "sin") else x for n, x in problem.options.items()}
        alone = Correction(problem.function, operands, options)
        for name, x in alone.forward_backward(implementation.backend, cotangent[:, at], by_token).items():
            assert torch.equal(x, together[name][:, at]), name


def check_bits_of_every_run(problem: Correction, implementation) -> None:
    """On any number of threads."""
    cotangent = cotangent_for(problem)
    first = problem.forward_backward(implementation.backend, cotangent)
    threads = torch.get_num_threads()
    try:
        for n in (1,) if implementation.slow else (1, 2, 3):
            torch.set_num_threads(n)
            again = problem.forward_backward(implementation.backend, cotangent)
            assert all(torch.equal(again[name], x) for name, x in first.items()), n
    finally:
        torch.set_num_threads(threads)


def kept_for_backward(problem: Correction, backend: str, wanted: tuple[str, ...]) -> list[Tensor]:
    """Tensors that a call keeps and that are not its operands'."""
    leaves = {n: x.detach().requires_grad_(n in wanted) for n, x in problem.operands.items()}
    arguments = [*leaves.values(), *(x for x in problem.options.values() if isinstance(x, Tensor))]
    theirs = {x.untyped_storage().data_ptr() for x in arguments}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = problem.function(**leaves, **problem.options, backend=backend)
    assert out.requires_grad
    ours = [x for x in kept if x.untyped_storage().data_ptr() not in theirs]
    base = leaves["base"].untyped_storage().data_ptr()
    return ours + [x for x in kept if x.untyped_storage().data_ptr() == base]
