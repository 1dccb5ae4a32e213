"""Plain calls whose operands fit, for the tests of the fast path: a record each, and a tensor to write into."""

from __future__ import annotations

from collections.abc import Callable

import torch

from deltamem_kernels import operands

N, H, R, D, WIDTH, HEAD_DIM = 3, 2, 4, 16, 8, 4


def scan() -> tuple:
    gate = torch.rand(N, 5, H, R)
    q, k, v = torch.randn(3, N, 5, H, R)
    state, mask = torch.randn(N, H, R, R), torch.rand(N, 5) < 0.7
    return (operands.ScanOperands(q, k, v, gate, 1 - gate, None, state, mask, None, "standard"),)


def step() -> tuple:
    q, k, v, out = torch.randn(4, N, H, R).unbind(0)
    slots = torch.tensor([2, 0, 3])
    pool = torch.randn(5, H, R, R)
    beta = torch.rand(N, H)
    out = torch.empty(N, H, R)
    return (operands.StepOperands(pool, q, k, v, beta, None, slots, None, None, out, "standard", -1, True),)


def correct() -> tuple:
    base, out = torch.randn(N, WIDTH), torch.empty(N, WIDTH)
    reads, weight, norm = torch.randn(N, H, R), torch.randn(WIDTH, H * R), torch.rand(HEAD_DIM)
    cos, sin = torch.randn(N, HEAD_DIM), torch.randn(1, HEAD_DIM)
    return operands.CorrectionOperands(base, reads, weight, None, norm, cos, sin, 0.5, 1e-6, HEAD_DIM), out


def project() -> tuple:
    weights = tuple(torch.randn(H * R, D) for _ in range(3))
    gates = torch.randn(H * R, D), torch.randn(H * R), torch.randn(H, D), None
    return (operands.ProjectionOperands(torch.randn(N, 5, D), weights, *gates, H, True),)


def prefill() -> tuple:
    (projection,) = project()
    state, mask = torch.randn(N, H, R, R), torch.rand(N, 5) < 0.7
    return (operands.PrefillOperands(*projection[:6], state, mask, None, H, True, "standard"),)


def decode() -> tuple:
    (projection,) = project()
    (correction, out), base = correct(), torch.randn(N, WIDTH)
    _, qkv, *gates, heads, normalize = projection
    slots = torch.tensor([1, 4, 0])
    return (
        operands.DecodeOperands(
            torch.randn(5, H, R, R), torch.randn(N, D), qkv, *gates, slots, base, correction.weight, None,
            correction.norm_weight, correction.cos, correction.sin, out, heads, normalize, "lambda_outside", -1, 2.0,
            1e-6, HEAD_DIM,
        ),
    )  # fmt: skip


def layer_step() -> tuple:
    (projection,) = project()
    _, qkv, *gates, heads, normalize = projection
    state, mask = torch.randn(N, H, R, R), torch.tensor([True, False, True])
    weights, gains = [torch.randn(WIDTH, H * R), torch.randn(6, H * R)], [torch.tensor(0.5), torch.tensor(2.0)]
    of_layer = operands.LayerStepWeights(
        qkv, *gates, weights, gains, torch.rand(6), heads, normalize, "standard", 1.0, 1e-6
    )
    return (operands.LayerStepOperands(torch.randn(N, D), state, mask, of_layer),)


FUNCTIONS = (scan, step, correct, project, prefill, decode, layer_step)
CALLS: dict[str, Callable[[], tuple]] = {
    f.__name__: f for f in (scan, step, correct, project, prefill, decode, layer_step)
}
CHECKS: dict[str, Callable[..., None]] = {
    "scan": lambda record: record.check(),
    "step": lambda record: record.check(),
    "correct": lambda record, out: record.check(out, heads=record.head_dim != 0),
    "project": lambda record: record.check(),
    "prefill": lambda record: record.check(),
    "decode": lambda record: record.check(heads=record.head_dim != 0),
    "layer_step": lambda record: record.check(),
}
