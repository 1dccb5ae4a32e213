"""`triton`: Triton kernels for NVIDIA and AMD GPUs. Triton itself is imported on the first call.

`scan/` holds the delta rule, over sequences and for a decoding step. `layer/` holds what a layer needs around it. A
module of an operation holds kernels and their launches; where that is too much for one file, the kernels are in
`..._kernels.py`. `scan/tiles.py`, `rule.py` and `chunks.py` are functions that kernels call.
"""

from .backend import TritonBackend

__all__ = ["TritonBackend"]
