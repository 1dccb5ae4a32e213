"""The namespace `torch.ops.deltamem_kernels`: each operation defines its operators in it."""

from __future__ import annotations

import torch

library = torch.library.Library("deltamem_kernels", "DEF")


def define(schema: str) -> None:
    """One boundary for the dispatcher, autograd and torch.compile; a schema string costs a call the least."""
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
