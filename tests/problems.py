"""Random problems for delta_update, the float64 oracle, and the measure of error."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from deltamem_kernels import delta_update

FLOAT32_TOLERANCE = 2e-5  # of ‖ours − float64‖ / ‖float64‖: what the package promises for float32
MODES = ("standard", "lambda_outside", "no_lambda")
NAMES = ("q", "k", "v", "beta", "decay", "initial_state")


@dataclass
class Problem:
    """Operands of a call by name, and what is no operand."""

    operands: dict[str, Tensor]
    options: dict = field(default_factory=dict)

    def to(self, dtype: torch.dtype | None = None, device: str | None = None) -> Problem:
        """Detached copies, in one dtype where one is given."""
        operands = {n: x.detach().clone().to(device=device, dtype=dtype or x.dtype) for n, x in self.operands.items()}
        options = {n: x.to(device=device) if isinstance(x, Tensor) else x for n, x in self.options.items()}
        return replace(self, operands=operands, options=options)

    def forward(self, backend: str | None) -> dict[str, Tensor]:
        return delta_update(**self.operands, **self.options, backend=backend)._asdict()

    def forward_backward(
        self, backend: str | None, cotangents: dict[str, Tensor], wanted: tuple[str, ...] | None = None
    ) -> dict[str, Tensor]:
        """Results, and the gradients `d_<name>` of the operands named in `wanted` (all, unless told)."""
        wanted = tuple(self.operands) if wanted is None else wanted
        leaves = {n: x.detach().requires_grad_(n in wanted) for n, x in self.operands.items()}
        out = delta_update(**leaves, **self.options, backend=backend)._asdict()
        used = [(out[n], cotangents[n]) for n in cotangents]
        grads = torch.autograd.grad([o for o, _ in used], [leaves[n] for n in wanted], [c for _, c in used])
        return {**{n: x.detach() for n, x in out.items()}, **{f"d_{n}": g for n, g in zip(wanted, grads, strict=True)}}


def make(
    B: int = 2,
    T: int = 70,
    H: int = 2,
    R: int = 8,
    *,
    mode: str = "standard",
    decay: bool = False,
    beta_per_head: bool = False,
    decay_per_head: bool = False,
    state: bool = True,
    mask: bool = False,
    lengths: tuple[int, ...] | None = None,
    index_dtype: torch.dtype = torch.int64,
    dtype: torch.dtype | dict[str, torch.dtype] = torch.float32,
    fenced: bool = False,
    device: str = "cpu",
) -> Problem:
    """A problem as δ-mem poses it: unit keys and queries, gates between 0 and 1. `lengths` packs sequences (B = 1,
    T their sum); `fenced` carves every operand out of a parent whose margins are NaN, with odd strides."""
    if lengths is not None:
        B, T = 1, sum(lengths)
    N = B if lengths is None else len(lengths)
    unit = lambda x: torch.nn.functional.normalize(x, dim=-1)  # noqa: E731
    operands = {"q": unit(torch.randn(B, T, H, R)), "k": unit(torch.randn(B, T, H, R)), "v": torch.randn(B, T, H, R)}
    operands["beta"] = torch.rand(B, T, H) if beta_per_head else torch.rand(B, T, H, R)
    if decay:
        operands["decay"] = torch.rand(B, T, H) if decay_per_head else torch.rand(B, T, H, R)
    if state:
        operands["initial_state"] = torch.randn(N, H, R, R)
    options: dict = {"mode": mode}
    if mask:
        options["mask"] = torch.rand(B, T) < 0.6
    if lengths is not None:
        options["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(lengths)], dtype=index_dtype)
    for name, x in operands.items():
        x = x.to(dtype.get(name, torch.float32) if isinstance(dtype, dict) else dtype)
        operands[name] = fence(x.to(device)) if fenced else x.to(device)
    if fenced and mask:
        options["mask"] = options["mask"].t().contiguous().t()
    return Problem(operands, {n: x.to(device) if isinstance(x, Tensor) else x for n, x in options.items()})


def fence(x: Tensor) -> Tensor:
    """The same numbers inside a parent of NaN: reading one number too many shows in the result."""
    parent = x.new_full([n + 3 for n in reversed(x.shape)], float("nan")).permute(*reversed(range(x.ndim)))
    inside = parent[tuple(slice(1, 1 + n) for n in x.shape)]
    inside.copy_(x)
    return inside


def cotangents_for(
    problem: Problem, *, reads: bool = True, final_state: bool = True, fenced: bool = False
) -> dict[str, Tensor]:
    """Random weights of the results, for gradients through one or both."""
    out = problem.to(torch.float32).forward("reference")
    weights = {n: torch.randn_like(out[n]) for n, on in (("reads", reads), ("final_state", final_state)) if on}
    if "reads" in weights:
        weights["reads"] = weights["reads"].to(problem.operands["q"].dtype)
    return {n: fence(x) if fenced else x for n, x in weights.items()}


def oracle(problem: Problem, cotangents: dict[str, Tensor], wanted: tuple[str, ...] | None = None) -> dict[str, Tensor]:
    """The same in float64, from the same rounded operands."""
    weights = {n: x.double() for n, x in cotangents.items()}
    return problem.to(torch.float64).forward_backward("reference", weights, wanted)


def error(ours: Tensor, exact: Tensor) -> float:
    """‖ours − exact‖ / ‖exact‖; where exact is all zeros, whether ours is too."""
    ours, exact = ours.double().cpu(), exact.double().cpu()
    assert ours.shape == exact.shape, f"shape {list(ours.shape)}, not {list(exact.shape)}"
    scale = exact.norm().item()
    distance = (ours - exact).norm().item()
    return distance / scale if scale > 0 else (0.0 if distance == 0 else float("inf"))


def rounding(dtype: torch.dtype, implementation) -> float:
    """The relative error of rounding once: half a last bit. Triton's interpreter cuts bfloat16 off where GPUs round:
    there a whole one."""
    cut_off = implementation.name.startswith("triton-interpreted") and dtype == torch.bfloat16
    return torch.finfo(dtype).eps / (1 if cut_off else 2)


def assert_close(ours: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float) -> None:
    errors = {name: error(ours[name], exact[name]) for name in exact}
    bad = {name: f"{e:.1e}" for name, e in errors.items() if not e <= tolerance}
    assert not bad, f"relative errors over {tolerance}: {bad}"


def subsets(names: tuple[str, ...], implementation) -> list[tuple[str, ...]]:
    """Of the operands, those that want a gradient: one, all but one, and where it is quick each number."""
    sizes = (1, len(names) - 1) if implementation.slow else range(1, len(names) + 1)
    return [s for n in sizes for s in itertools.combinations(names, n)]


def small(implementation, **options) -> Problem:
    """A problem with every operand, short where a token costs milliseconds."""
    sizes = {"T": 4, "R": 4, "H": 1, "B": 1} if implementation.slow else {"T": 70}
    return make(decay=True, **{**sizes, **options}).to(device=implementation.device)


def weights_of(problem: Problem) -> dict[str, Tensor]:
    device = problem.operands["q"].device
    return {n: x.to(device) for n, x in cotangents_for(problem.to(device="cpu")).items()}


def leaves_of(problem: Problem) -> dict[str, Tensor]:
    return {n: x.detach().clone().requires_grad_() for n, x in problem.operands.items()}
