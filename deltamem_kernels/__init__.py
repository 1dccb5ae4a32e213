"""The memory of δ-mem (arXiv 2605.12357), fused: the delta rule over sequences, exact and differentiable."""

from ._version import __version__
from .backends import BackendStatus, BackendUnavailableError, backends
from .ops.attention_correction import attention_correction
from .ops.attention_correction_norm_rope import attention_correction_norm_rope
from .ops.delta_step import delta_step
from .ops.delta_update import DeltaUpdateOutput, delta_update
from .ops.memory_decode import MemoryDecode, memory_decode
from .ops.memory_prefill import memory_prefill
from .ops.memory_projection import MemoryProjection, memory_projection
from .ops.segment_mean import SegmentMean, segment_mean

__all__ = [
    "BackendStatus",
    "BackendUnavailableError",
    "DeltaUpdateOutput",
    "MemoryDecode",
    "MemoryProjection",
    "SegmentMean",
    "__version__",
    "attention_correction",
    "attention_correction_norm_rope",
    "backends",
    "delta_step",
    "delta_update",
    "memory_decode",
    "memory_prefill",
    "memory_projection",
    "segment_mean",
]
