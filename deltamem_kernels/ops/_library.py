"""The namespace `torch.ops.deltamem_kernels`: each operation defines its operators in it."""

from __future__ import annotations

import torch
from torch import Tensor

library = torch.library.Library("deltamem_kernels", "DEF")


def define(schema: str) -> None:
    """One boundary for the dispatcher, autograd and torch.compile; a schema string costs a call the least."""
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def nobody_listens(x: Tensor) -> bool:
    """Whether an operator without a gradient, with x among its operands, may call its kernel as it is: nothing traces,
    fakes, maps or records operators. The dispatcher takes 3 µs for an operator of twenty arguments."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or x.is_meta
        or (type(x) is not Tensor and type(x) is not torch.nn.Parameter)
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
