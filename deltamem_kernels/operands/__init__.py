"""Operand records: the arguments of each operation under their names, with the checks and the derived sizes.

A record is a NamedTuple. The public functions build one, `check()` raises where an argument does not fit, and the
operators, the backends and the C++ bindings take it from there. The fields stand here once: operator schemas are
derived from them, and csrc/bindings/records.h mirrors them for C++.
"""

from .correction import CorrectionOperands
from .decode import DecodeOperands
from .layer_step import LayerStepOperands, LayerStepWeights
from .projection import PrefillOperands, Projected, ProjectionAdjoint, ProjectionOperands, QkvWeight
from .scan import CHECKPOINT_INTERVAL, ScanCotangents, ScanOperands, ScanResult
from .segments import SegmentOperands
from .step import StepOperands

__all__ = [
    "CHECKPOINT_INTERVAL",
    "CorrectionOperands",
    "DecodeOperands",
    "LayerStepOperands",
    "LayerStepWeights",
    "PrefillOperands",
    "Projected",
    "ProjectionAdjoint",
    "ProjectionOperands",
    "QkvWeight",
    "ScanCotangents",
    "ScanOperands",
    "ScanResult",
    "SegmentOperands",
    "StepOperands",
]
