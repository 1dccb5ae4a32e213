"""`python -m deltamem_kernels`: the report, and that it finds wrong results."""

from __future__ import annotations

import pytest
import torch

from deltamem_kernels import __main__ as command
from deltamem_kernels import __version__
from deltamem_kernels.backends import NAMES, BackendStatus
from deltamem_kernels.backends.eager import eager
from deltamem_kernels.backends.select import BACKENDS


@pytest.mark.slow
def test_the_report_names_versions_and_every_backend(capsys: pytest.CaptureFixture) -> None:
    assert command.main() == 0
    printed = capsys.readouterr().out
    assert f"deltamem_kernels {__version__}" in printed
    assert torch.__version__ in printed
    for name in NAMES:
        assert any(line.split()[:1] == [name] for line in printed.splitlines()), name
    assert "right (" in printed
    assert "WRONG" not in printed


@pytest.mark.parametrize(
    ("operation", "result"),
    [*(("scan", i) for i in range(3)), ("decode", 1), ("segment_mean", 0)],
)
def test_a_wrong_result_is_found(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, operation: str, result: int
) -> None:
    """One number is too large by 0.01. Wrong checkpoints, the third result of a scan, show only in gradients."""
    right = getattr(BACKENDS["cpu"], operation)

    def wrong(*operands):
        out = right(*operands)
        if out[result].numel():
            out[result].view(-1)[3] += 0.01
        return out

    monkeypatch.setattr(BACKENDS["cpu"], operation, wrong)
    monkeypatch.setattr(command, "backends", lambda: {"cpu": BackendStatus(True, "")})  # the others take their time
    with eager.disabled():  # the fast path does not call the backend
        assert command.main() == 1
    assert "WRONG" in capsys.readouterr().out


def test_a_backend_that_raises_is_reported(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*operands):
        raise RuntimeError("the compiler gave up")

    monkeypatch.setattr(BACKENDS["cpu"], "scan", broken)
    monkeypatch.setattr(command, "backends", lambda: {"cpu": BackendStatus(True, "")})
    assert command.main() == 1
    assert "the compiler gave up" in capsys.readouterr().out
