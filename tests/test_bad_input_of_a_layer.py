"""memory_projection and attention_correction raise for arguments that do not fit, before anything runs. The message
names the argument, what came and what is wanted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from correction_problems import NAMES
from projection_problems import NAMES as OF_A_PROJECTION
from torch import Tensor

from deltamem_kernels import BackendUnavailableError, attention_correction, memory_projection
from deltamem_kernels.testing import correction_problem, projection_problem

THREE = (torch.zeros(8, 5), torch.zeros(8, 5), torch.zeros(8, 5))
"""Good weights of q, k and v."""

# memory_projection


@pytest.mark.parametrize(
    ("change", "exception", "words"),
    [
        *(({n: [1.0]}, TypeError, [f"{n} must be a tensor", "list"]) for n in OF_A_PROJECTION),
        *(
            ({n: torch.zeros(2, 2).int()}, TypeError, [f"{n} must be float16, bfloat16", "int32"])
            for n in OF_A_PROJECTION[:3]
        ),
        *(({n: None}, TypeError, [f"{n} must be a tensor", "None"]) for n in OF_A_PROJECTION[:3]),
        ({"x": torch.zeros(5)}, ValueError, ["x must be [B, T, D] or [N, D]", "[5]"]),
        ({"x": torch.zeros(1, 2, 3, 5)}, ValueError, ["x must be [B, T, D] or [N, D]", "[1, 2, 3, 5]"]),
        ({"qkv_weight": torch.zeros(24, 6)}, ValueError, ["qkv_weight must be [3·H·R, D] with x's D=5", "[24, 6]"]),
        ({"qkv_weight": torch.zeros(24)}, ValueError, ["qkv_weight must be [3·H·R, D]", "[24]"]),
        ({"qkv_weight": torch.zeros(20, 5)}, ValueError, ["qkv_weight must be [3·H·R, D] with H=2", "[20, 5]"]),
        ({"qkv_weight": ()}, ValueError, ["one tensor [3·H·R, D] or three [H·R, D]", "got 0 tensors"]),
        ({"qkv_weight": THREE[:2]}, ValueError, ["one tensor [3·H·R, D] or three [H·R, D]", "got 2 tensors"]),
        ({"qkv_weight": (*THREE[:2], None)}, TypeError, ["qkv_weight must be a tensor", "three [H·R, D]", "None"]),
        ({"qkv_weight": (*THREE[:2], [1.0])}, TypeError, ["qkv_weight must be a tensor", "three [H·R, D]", "list"]),
        ({"qkv_weight": (THREE[0].int(), *THREE[1:])}, TypeError, ["qkv_weight must be float16, bfloat16", "int32"]),
        ({"qkv_weight": (torch.zeros(8, 6), *THREE[1:])}, ValueError, ["[H·R, D] with x's D=5", "[8, 6]"]),
        ({"qkv_weight": (torch.zeros(8), *THREE[1:])}, ValueError, ["qkv_weight must be [H·R, D]", "[8]"]),
        ({"qkv_weight": (torch.zeros(7, 5),) * 3}, ValueError, ["qkv_weight must be [H·R, D] with H=2", "[7, 5]"]),
        ({"qkv_weight": (*THREE[:2], torch.zeros(6, 5))}, ValueError, ["three tensors of one shape [8, 5]", "[6, 5]"]),
        ({"qkv_weight": (torch.zeros(24, 5),) * 3}, ValueError, ["beta_weight must be [H·R, D] or [H, D] = [24, 5]"]),
        ({"qkv_weight": (*THREE[:2], THREE[2].to("meta"))}, ValueError, ["qkv_weight must be on x's device", "meta"]),
        ({"qkv_weight": torch.zeros(0, 5)}, ValueError, ["R from 1 to 128", "[0, 5]"]),
        ({"qkv_weight": torch.zeros(6 * 129, 5)}, ValueError, ["R from 1 to 128", "[774, 5]"]),
        ({"qkv_weight": torch.zeros(24, 5, device="meta")}, ValueError, ["qkv_weight must be on x's device", "meta"]),
        ({"beta_weight": torch.zeros(3, 5)}, ValueError, ["beta_weight must be [H·R, D] or [H, D] = [8, 5] or [2, 5]"]),
        ({"beta_weight": torch.zeros(8, 5, device="meta")}, ValueError, ["beta_weight must be on x's device", "meta"]),
        ({"beta_bias": torch.zeros(2)}, ValueError, ["beta_bias must be of as many numbers as beta_weight", "[2]"]),
        ({"beta_bias": torch.zeros(8, device="meta")}, ValueError, ["beta_bias must be on x's device cpu", "meta"]),
        ({"decay_weight": torch.zeros(8, 4)}, ValueError, ["decay_weight must be [H·R, D] or [H, D]", "[8, 4]"]),
        ({"decay_weight": None}, ValueError, ["decay_bias must be None without a decay_weight", "[8]"]),
        ({"decay_bias": torch.zeros(8, 1)}, ValueError, ["decay_bias must be of as many numbers", "[8, 1]"]),
        ({"heads": 0}, ValueError, ["heads must be at least 1", "0"]),
        ({"heads": 3}, ValueError, ["qkv_weight must be [3·H·R, D] with H=3", "[24, 5]"]),
        ({"heads": 2.0}, TypeError, ["heads must be an int", "float 2.0"]),
        ({"heads": True}, TypeError, ["heads must be an int", "bool True"]),
        ({"normalize": 1}, TypeError, ["normalize must be True or False", "int 1"]),
        ({"backend": "gpu"}, ValueError, ["backend must be one of", "gpu"]),
        ({"backend": 3}, TypeError, ["backend must be the name", "int 3"]),
        ({"backend": "cuda"}, BackendUnavailableError, ["backend 'cuda' cannot run on cpu"]),
    ],
)
@pytest.mark.parametrize("gradients", [False, True])
def test_memory_projection_raises_for_arguments_that_do_not_fit(change, exception, words, gradients):
    operands = projection_problem(2, 3, D=5, R=4).operands
    call = {n: y.requires_grad_(gradients) for n, y in operands.items()} | {"heads": 2} | change
    with pytest.raises(exception) as raised:
        memory_projection(**call)
    for word in words:
        assert word in str(raised.value)


# attention_correction


def good() -> dict[str, object]:
    problem = correction_problem(H=2, R=4, norm=True)
    return {**problem.operands, "out": torch.empty_like(problem.operands["base"]), "norm_eps": 1e-6}


def bad(name: str, change: Callable[[object], object], kind: type[Exception], *words: str) -> object:
    return pytest.param(name, change, kind, words, id=f"{name}-{words[-1]}")


FLOATS = "float16, bfloat16, float32 or float64"
SHAPES = "[B, T, H, R] or [B, T, R]"
CASES = [
    *(bad(n, lambda x: x.tolist(), TypeError, f"{n} must be a tensor", "got") for n in (*NAMES[:3], "norm_weight")),
    *(bad(n, lambda x: x.long(), TypeError, f"{n} must be {FLOATS}", "got int64") for n in NAMES),
    *(bad(n, lambda x: x.to_sparse(), TypeError, f"{n} must be a dense tensor", "got sparse_coo") for n in NAMES[:3]),
    *(bad(n, lambda x: x.to("meta"), ValueError, f"{n} must be on base's device cpu", "on meta")
      for n in (*NAMES[1:], "out")),
    bad("base", lambda x: x.sum(), ValueError, "base must be [B, T, D] or [N, D]", "got float32 []"),
    bad("reads", lambda x: x.sum(), ValueError, f"reads must be {SHAPES}, [2, 5]", "got float32 []"),
    bad("base", lambda x: x[0, 0], ValueError, "base must be [B, T, D] or [N, D]", "got float32 [24]"),
    bad("base", lambda x: x[None], ValueError, "base must be [B, T, D] or [N, D]", "got float32 [1, 2, 5, 24]"),
    bad("weight", lambda x: x[:-1], ValueError, "weight must be [D, H·R] = [24, H·R]", "got float32 [23, 8]"),
    bad("weight", lambda x: x[:, :0], ValueError, "weight must be", "H·R at least 1", "got float32 [24, 0]"),
    bad("weight", lambda x: x.t(), ValueError, "weight must be [D, H·R]", "got float32 [8, 24]"),
    bad("weight", lambda x: x[None], ValueError, "weight must be [D, H·R]", "got float32 [1, 24, 8]"),
    bad("reads", lambda x: x[:, :4], ValueError, f"reads must be {SHAPES}, [2, 5]", "got float32 [2, 4, 2, 4]"),
    bad("reads", lambda x: x[..., :3], ValueError, "reads must be", "H·R = 8", "got float32 [2, 5, 2, 3]"),
    bad("reads", lambda x: x[0], ValueError, "reads must be", "got float32 [5, 2, 4]"),
    bad("scale", lambda x: x[None], ValueError, "scale must be a number = []", "got float32 [1]"),
    bad("scale", lambda x: "1", TypeError, "scale must be a number, or a tensor of no dimensions", "got str"),
    bad("scale", lambda x: True, TypeError, "scale must be a number", "got bool"),
    bad("norm_weight", lambda x: x[:-1], ValueError, "norm_weight must be [D] = [24]", "got float32 [23]"),
    bad("norm_eps", lambda x: "1", TypeError, "norm_eps must be a number", "got str"),
    bad("norm_eps", lambda x: -1e-6, ValueError, "norm_eps must be at least 0", "got float -1e-06"),
    bad("norm_eps", lambda x: float("nan"), ValueError, "norm_eps must be at least 0", "got float nan"),
    bad("out", lambda x: x.double(), TypeError, "out must be a dense float32 tensor, as base is", "got float64"),
    bad("out", lambda x: x[:1], ValueError, "out must be of base's shape", "got float32 [1, 5, 24]"),
    bad("out", lambda x: x[:1].expand(2, -1, -1), ValueError, "out must be a tensor without internal overlap", "got"),
    bad("out", lambda x: [], TypeError, "out must be a dense float32 tensor", "got list"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "kind", "words"), CASES)
def test_attention_correction_raises_for_arguments_that_do_not_fit(name, change, kind, words):
    call = good()
    call[name] = change(call[name])
    before = call["out"].clone() if isinstance(call["out"], Tensor) and call["out"].device.type == "cpu" else None
    with pytest.raises(kind) as caught:
        attention_correction(**call)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    if before is not None:
        assert torch.equal(call["out"].nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("in_place", [False, True])
def test_out_that_overlaps_an_operand_raises(in_place):
    memory = torch.randn(2, 5, 60)
    base, reads = memory[..., :24], memory[..., 20:28]
    weight = torch.randn(24, 8)
    with pytest.raises(ValueError, match="out must not share memory with reads"):
        attention_correction(base if in_place else torch.randn(2, 5, 24), reads, weight, out=base)
    with pytest.raises(ValueError, match="out must not share memory with base"):
        attention_correction(base, torch.randn(2, 5, 8), weight, out=memory[..., 1:25])
    under = memory.view(-1)[: 24 * 24].view(24, 24)
    with pytest.raises(ValueError, match="out must not share memory with weight"):
        attention_correction(torch.randn(1, 1, 24), torch.randn(1, 1, 24), under, out=base[:1, :1])
