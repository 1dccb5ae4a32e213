"""Whoever has taken the scan by `from … import`."""

from deltamem.core.delta_impl import load_delta_mem_online_state as load
from deltamem.kernels.affine_scan import triton_affine_scan as scan
from deltamem.kernels.affine_scan import triton_scan_support as support

__all__ = ["load", "scan", "support"]
