"""A call of an operation with its operands: its results and gradients on a backend, and the same in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Dtypes = torch.dtype | dict[str, torch.dtype]
"""One dtype for all operands, or one by name; float32 for a name that is not there."""
Results = dict[str, Tensor]
"""The results of an operation by name, and its gradients: "d_q" is the gradient of the operand q."""
P = TypeVar("P", bound="Problem")


@dataclass
class Problem:
    """A call of an operation."""

    operation: Callable[..., Any]
    """Takes operands, options and `backend` by name. It returns a tensor, which is called "out", or a NamedTuple."""
    operands: dict[str, Tensor]
    """The differentiable arguments."""
    options: dict[str, Any] = field(default_factory=dict)
    """The other arguments."""

    def to(self: P, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> P:
        """Return the problem with detached copies of the tensors. dtype applies to those that are floating."""

        def copy(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return x.detach().clone().to(device=device, dtype=dtype if x.is_floating_point() else None)

        operands = {name: copy(x) for name, x in self.operands.items()}
        return replace(self, operands=operands, options={name: copy(x) for name, x in self.options.items()})

    def run(self, backend: str | None = None, **more: Any) -> Results:
        """Return the results. `more` are further arguments."""
        return _named(self.operation(**self.operands, **self.options, backend=backend, **more))

    def run_with_gradients(
        self, backend: str | None, cotangents: Results, wanted: tuple[str, ...] | None = None
    ) -> Results:
        """Return the results, and the gradients of the operands named in `wanted` (None: all). An operand that no
        gradient reaches has a gradient of zeros.

        Args:
            backend: as in the operation.
            cotangents: the gradients of the results by name; a result that is not there has none.
            wanted: the operands that require a gradient. The others are frozen.
        """
        wanted = tuple(self.operands) if wanted is None else wanted
        leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in self.operands.items()}
        results = _named(self.operation(**leaves, **self.options, backend=backend))
        used = [name for name in cotangents if results[name].requires_grad]
        inputs = [leaves[name] for name in wanted]
        gradients: Sequence[Tensor] = [torch.zeros_like(x) for x in inputs]
        if used and inputs:
            outputs = [results[name] for name in used]
            weights = [cotangents[name].to(x) for name, x in zip(used, outputs, strict=True)]
            gradients = torch.autograd.grad(outputs, inputs, weights, materialize_grads=True)
        detached = {name: x.detach() for name, x in results.items()}
        return detached | {f"d_{name}": x for name, x in zip(wanted, gradients, strict=True)}

    def shapes(self) -> Results:
        """Return results on the meta device: shapes and dtypes without numbers."""
        return self.to("meta").run()

    def cotangents(self, *, fenced: bool = False) -> Results:
        """Return random gradients of the floating results, in their dtypes and on the operands' device.

        Args:
            fenced: put each between NaN, as `between_nans` does.
        """
        device = next(iter(self.operands.values())).device
        made = {
            name: self._cotangent(name, x).to(device, x.dtype)
            for name, x in self.shapes().items()
            if x.is_floating_point()
        }
        return {name: between_nans(x) if fenced else x for name, x in made.items()}

    def float64(
        self,
        cotangents: Results,
        wanted: tuple[str, ...] | None = None,
        *,
        oracle: Callable[..., Any] | None = None,
    ) -> Results:
        """Return results and gradients in float64 on the CPU, from the same rounded operands.

        Args:
            cotangents, wanted: as in `run_with_gradients`.
            oracle: the operation as plain PyTorch, called as the operation is. None means the operation itself on the
                backend "reference".
        """
        exact = replace(self, operation=oracle or self.operation).to("cpu", torch.float64)
        return exact.run_with_gradients("reference", {n: x.double().cpu() for n, x in cotangents.items()}, wanted)

    def error_scale(self, name: str, exact: Results) -> float:
        """Return the number that the error of a result or gradient is relative to: its norm."""
        return exact[name].norm().item()

    def _cotangent(self, name: str, like: Tensor) -> Tensor:
        return torch.randn(like.shape)


def between_nans(x: Tensor) -> Tensor:
    """Return a view with the same numbers and unusual strides, inside of a tensor of NaN: a kernel that reads a number
    too many shows it in the result."""
    parent = x.new_full([n + 3 for n in reversed(x.shape)], float("nan")).permute(*reversed(range(x.ndim)))
    inside = parent[tuple(slice(1, 1 + n) for n in x.shape)]
    inside.copy_(x)
    return inside


def finish(operands: dict[str, Tensor], dtype: Dtypes, device: str | torch.device, fenced: bool) -> dict[str, Tensor]:
    """Give each operand its dtype and device, and put it between NaN if `fenced`."""
    finished = {}
    for name, x in operands.items():
        x = x.to(device, dtype.get(name, torch.float32) if isinstance(dtype, dict) else dtype)
        finished[name] = between_nans(x) if fenced and x.ndim else x
    return finished


def _named(results: Any) -> Results:
    """Return the results by name, without those that are None."""
    named = {"out": results} if isinstance(results, Tensor) else results
    named = named if isinstance(named, dict) else named._asdict()
    return {name: x for name, x in named.items() if x is not None}
