"""`reference`: every operation in plain PyTorch, the oracle that the other backends are tested against."""

from __future__ import annotations

import torch

from ..base import Backend
from . import correction, projection, segments
from . import scan as delta_rule


class ReferenceBackend(Backend):
    """Runs on every device that PyTorch has."""

    name = "reference"

    def unavailable_reason(self, device: torch.device) -> str | None:
        return None

    scan = staticmethod(delta_rule.scan)
    scan_backward = staticmethod(delta_rule.scan_backward)
    step = staticmethod(delta_rule.step)
    correct = staticmethod(correction.correct)
    correct_backward = staticmethod(correction.correct_backward)
    project = staticmethod(projection.project)
    project_backward = staticmethod(projection.project_backward)
    segment_mean = staticmethod(segments.segment_mean)
    segment_mean_backward = staticmethod(segments.segment_mean_backward)
