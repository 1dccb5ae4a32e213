"""DeltaMemory against the formulas of δ-mem written out token by token in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltamem_kernels.nn import DeltaMemConfig, DeltaMemory
from deltamem_kernels.nn.config import HEADS
from deltamem_kernels.testing import FLOAT32_TOLERANCE, relative_error

HIDDEN = 24
OUT = {"q": 32, "k": 16, "v": 16, "o": 24}


def memory(**fields) -> DeltaMemory:
    """Return a memory whose weights are all random: a zero could hide an error."""
    module = DeltaMemory(DeltaMemConfig(**fields), HIDDEN, OUT)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.requires_grad:
                weight.copy_(torch.randn_like(weight) * (0.3 if name.endswith("proj") else 0.5))
    return module


def project(w: dict[str, Tensor], c: DeltaMemConfig, x: Tensor) -> tuple[Tensor, ...]:
    """q, k, v `[H, R]`, β and λ `[H, R]` of one token."""
    H, R = c.num_state_heads, c.rank
    q, k, v = ((w[f"memory_{n}_proj"] @ x).view(H, R) for n in "qkv")
    if c.normalize_qk:
        q, k = (y / y.norm(dim=-1, keepdim=True).clamp_min(1e-6) for y in (q.tanh(), k.tanh()))
    beta = torch.sigmoid(w["beta_proj"] @ x + w["beta_bias"]).view(H, -1).expand(H, R)
    if c.state_update_mode == "no_lambda":
        decay = torch.ones_like(beta)
    elif c.couple_lambda:
        decay = 1 - beta
    else:
        decay = torch.sigmoid(w["lambda_proj"] @ x + w["lambda_bias"]).view(H, -1).expand(H, R)
    return q, k, v, beta, decay


def wrote(S: Tensor, c: DeltaMemConfig, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor) -> Tensor:
    erase = decay * beta if c.state_update_mode == "lambda_outside" else beta
    rows = []
    for h in range(c.num_state_heads):
        held = S[h] @ k[h]
        rows.append(decay[h][:, None] * S[h] + torch.outer(beta[h] * v[h] - erase[h] * held, k[h]))
    return torch.stack(rows)


def naive(module: DeltaMemory, x: Tensor, state: Tensor, mask=None, write=True, ids=None) -> tuple[Tensor, Tensor]:
    """Return reads and the final state, one token after another."""
    c, w = module.config, {n: p.double() for n, p in module.named_parameters()}
    reads, states = [], []
    for b in range(x.shape[0]):
        S, row = state[b].double(), []
        live = [mask is None or bool(mask[b, t]) for t in range(x.shape[1])]
        for t in range(x.shape[1]):
            q, *rest = project(w, c, x[b, t].double())
            row.append((S @ q[:, :, None])[..., 0] if live[t] else torch.zeros_like(q))
            if live[t] and write and ids is None:
                S = wrote(S, c, *rest)
        if write and ids is not None:
            for message in sorted(set(ids[b].tolist()) - {-1}):
                tokens = [t for t in range(x.shape[1]) if live[t] and ids[b, t] == message]
                if tokens:
                    S = wrote(S, c, *project(w, c, x[b, tokens].double().mean(0))[1:])
        reads.append(torch.stack(row))
        states.append(S)
    return torch.stack(reads), torch.stack(states)


def corrected(module: DeltaMemory, base: Tensor, reads: Tensor, head: str) -> Tensor:
    c, w = module.config, {n: p.double() for n, p in module.named_parameters()}
    delta = reads.double().flatten(2) @ w[f"delta_{head}_proj"].T * c.alpha / c.rank
    if c.trainable_delta_scale:
        raw = w["delta_scale_raw"][HEADS.index(head) if c.delta_scale_granularity == "head" else 0]
        delta = delta * torch.sigmoid(raw) * c.delta_scale_max
    if c.delta_o_rmsnorm and head == "o":
        delta = delta / (delta.pow(2).mean(-1, keepdim=True) + c.delta_o_rmsnorm_eps).sqrt()
        delta = delta * w["delta_o_rmsnorm_weight"]
    return base.double() + delta


VARIANTS = [
    {},
    {"num_state_heads": 4, "rank": 4},
    {"state_update_mode": "lambda_outside", "couple_lambda": False},
    {"state_update_mode": "no_lambda", "couple_lambda": False, "num_state_heads": 2},
    {"rankwise_gates": False, "num_state_heads": 3, "couple_lambda": False, "rank": 5},
    {"normalize_qk": False, "alpha": 3.0},
    {"delta_o_rmsnorm": True, "trainable_delta_scale": True},
    {"trainable_delta_scale": True, "delta_scale_granularity": "head", "delta_scale_max": 3.0},
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("writing", ["token", "off", "segments"])
@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_reads_states_corrections_and_gradients_are_those_of_the_formulas(fields, writing, masked):
    module = memory(**fields)
    c, B, T = module.config, 2, 11
    x = torch.randn(B, T, HIDDEN, requires_grad=True)
    state = torch.randn(B, c.num_state_heads, c.rank, c.rank, requires_grad=True)
    mask = torch.rand(B, T) < 0.7 if masked else None
    ids = torch.randint(-1, 4, (B, T)) if writing == "segments" else None
    options = {} if ids is None else {"segment_ids": ids, "num_segments": 5}
    out = module.read(x, state, mask=mask, write=writing != "off", **options)
    exact = naive(module, x, state, mask, writing != "off", ids)
    assert relative_error(out.reads, exact[0]) <= FLOAT32_TOLERANCE
    assert relative_error(out.state, exact[1]) <= FLOAT32_TOLERANCE
    ours, theirs = [out.state], [exact[1]]
    for head in HEADS:
        base = torch.randn(B, T, OUT[head])
        ours.append(module.correct(base, out.reads, head))
        theirs.append(corrected(module, base, exact[0], head))
        assert relative_error(ours[-1], theirs[-1]) <= FLOAT32_TOLERANCE
    weights = [torch.randn_like(y) for y in ours]
    leaves = {"x": x, "state": state, **dict(module.named_parameters())}

    def gradients(results):
        total = sum((y * w).sum() for y, w in zip(results, weights, strict=True))
        return torch.autograd.grad(total, list(leaves.values()), allow_unused=True)

    compared = set()
    for name, g, e in zip(leaves, gradients(ours), gradients(theirs), strict=True):
        if e is None or not e.any():
            assert g is None or not g.any(), name
        else:
            assert g is not None, name
            compared.add(name)
            assert relative_error(g, e) <= 1e-4, name  # through a hundred float32 steps
    assert compared >= {"x", "state", "memory_q_proj", *(f"delta_{head}_proj" for head in HEADS)}


@pytest.mark.parametrize("write", [True, False])
def test_autocast_does_not_round_the_state(write):
    module, x, state = memory(num_state_heads=2), torch.randn(2, 9, HIDDEN), torch.randn(2, 2, 8, 8)
    plain = module.read(x, state, write=write)
    with torch.autocast("cpu", torch.bfloat16):
        cast = module.read(x, state, write=write)
    assert cast.reads.dtype == cast.state.dtype == torch.float32
    assert torch.equal(cast.reads, plain.reads)
    assert torch.equal(cast.state, plain.state)


def test_splitting_a_sequence_across_calls_does_not_change_the_result():
    module, x = memory(num_state_heads=2), torch.randn(3, 17, HIDDEN)
    whole = module.read(x)
    for cut in (1, 8, 16):
        first = module.read(x[:, :cut])
        second = module.read(x[:, cut:], first.state)
        assert relative_error(torch.cat([first.reads, second.reads], 1), whole.reads) <= 1e-6
        assert relative_error(second.state, whole.state) <= 1e-6


def test_the_first_tokens_of_a_call_can_be_written_again():
    module, x = memory(), torch.randn(2, 9, HIDDEN)
    mask, start = torch.rand(2, 9) < 0.7, torch.randn(2, 1, 8, 8)
    out = module.read(x, start, mask=mask)
    for tokens in (0, 1, 5, 9):
        shorter = module.read(x[:, :tokens], start, mask=mask[:, :tokens]).state
        assert relative_error(out.writes.first(tokens).onto(start), shorter) <= 1e-6
    assert module.read(x, write=False).writes is None


def test_states_are_float32_with_a_backbone_of_16_bits():
    module, x = memory(), torch.randn(2, 9, HIDDEN, dtype=torch.bfloat16)
    out = module.read(x)
    assert (out.reads.dtype, out.state.dtype) == (torch.float32, torch.float32)
    assert relative_error(out.reads, naive(module, x, torch.zeros(2, 1, 8, 8))[0]) <= FLOAT32_TOLERANCE
    base = torch.randn(2, 9, 32, dtype=torch.bfloat16)
    assert module.correct(base, out.reads, "q").dtype == torch.bfloat16


@pytest.mark.parametrize("heads", [(), ("o",), ("q", "o"), ("k", "v")])
def test_heads_that_are_not_corrected_return_base(heads):
    module, base = memory(delta_heads=heads), torch.randn(1, 3, 32)
    reads = module.read(torch.randn(1, 3, HIDDEN)).reads
    for head in HEADS:
        weight = getattr(module, f"delta_{head}_proj")
        assert weight.requires_grad == (head in heads)
        if head not in heads:
            assert not weight.any()
            assert module.correct(base, reads, head) is base


@pytest.mark.parametrize("init", ["zero", "random", "base_slice", "base_slice_fixed"])
def test_initial_weights_are_those_of_the_configuration(init):
    config = DeltaMemConfig(
        output_init=init, rank=6, base_slice_ref_width=4, num_state_heads=2, couple_lambda=False, delta_heads="q,o"
    )
    base = {head: torch.randn(OUT[head], 40) for head in HEADS}
    module = DeltaMemory(config, HIDDEN, OUT, base)
    bound = 1 / HIDDEN**0.5  # of Kaiming's uniform distribution with a = sqrt(5)
    for name in ("memory_q_proj", "memory_k_proj", "memory_v_proj"):
        weight = getattr(module, name)
        assert weight.shape == (12, HIDDEN)
        assert 0.8 * bound < weight.abs().max() <= bound
    assert not module.beta_proj.any()
    assert not module.lambda_proj.any()
    assert torch.equal(module.beta_bias, torch.full((12,), -1.5))
    assert torch.equal(module.lambda_bias, torch.full((12,), 1.5))
    for head in HEADS:
        weight = getattr(module, f"delta_{head}_proj").detach()
        if head not in ("q", "o") or init == "zero":
            assert not weight.any()
        elif init == "random":
            assert 0.8 * 0.05 / 12**0.5 < weight.abs().max() <= 0.05 / 12**0.5
        else:
            columns = 6 if init == "base_slice" else 4
            unit = base[head][:, :columns] / base[head][:, :columns].norm(dim=0)
            assert relative_error(weight[:, :columns], unit * 0.05) <= 1e-6
            assert not weight[:, columns:].any()


def test_the_trained_scale_starts_at_its_initial_value():
    module = DeltaMemory(DeltaMemConfig(trainable_delta_scale=True, delta_scale_init=0.3), HIDDEN, OUT)
    assert torch.sigmoid(module.delta_scale_raw).item() * 2 == pytest.approx(0.3, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5, 7)}, "x must be .*hidden=24.*got float32 .2, 5, 7."),
        ({"x": torch.zeros(5, HIDDEN)}, "x must be"),
        ({"x": torch.zeros(2, 5, HIDDEN).int()}, "x must be .*got int32"),
        ({"state": torch.zeros(3, 1, 8, 8)}, "state must be .* = .2, 1, 8, 8., got float32 .3, 1, 8, 8."),
        ({"state": torch.zeros(2, 1, 8, 8).bfloat16()}, "state must be float32 or float64, got bfloat16"),
        ({"mask": torch.ones(2, 5)}, "mask must be a bool tensor"),
        ({"mask": torch.ones(2, 4) > 0}, "mask must be"),
        ({"segment_ids": torch.zeros(2, 5).long()}, "no num_segments"),
        ({"num_segments": 1}, "no segment_ids"),
        ({"segment_ids": torch.zeros(2, 4).long(), "num_segments": 1}, "segment_ids must be"),
        (
            {"segment_ids": torch.zeros(2, 5), "num_segments": 3, "write": False},
            "segment_ids must be an int32 or int64",
        ),
        ({"segment_ids": torch.zeros(2, 5).long(), "num_segments": 1.5, "write": False}, "num_segments must be an int"),
        ({"write": "no"}, "write must be True or False, got str 'no'"),
        ({"write": 0}, "write must be True or False, got int 0"),
        ({"state": torch.zeros(2, 1, 8, 8, device="meta")}, "^state must be on x's device cpu, got .* on meta"),
        ({"mask": torch.ones(2, 5, device="meta") > 0}, "^mask must be on x's device cpu, got .* on meta"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_raise(change, message):
    arguments = {"x": torch.zeros(2, 5, HIDDEN), **change}
    with pytest.raises((TypeError, ValueError), match=message):
        memory().read(**arguments)


def test_modules_that_do_not_fit_raise():
    with pytest.raises(ValueError, match="out_features must name q, k, v, o, got q"):
        DeltaMemory(DeltaMemConfig(), HIDDEN, {"q": 3})
    with pytest.raises(ValueError, match=r"base_weights\['q'\] must be the floating weight .*base_slice.*got NoneType"):
        DeltaMemory(DeltaMemConfig(output_init="base_slice"), HIDDEN, OUT)
    for dtype in (torch.uint8, torch.float8_e4m3fn, torch.complex64, "float32", None):
        with pytest.raises(TypeError, match="dtype must be float16, bfloat16, float32 or float64, got"):
            DeltaMemory(DeltaMemConfig(), HIDDEN, OUT, dtype=dtype)
    with pytest.raises(TypeError, match="config must be a DeltaMemConfig, got dict"):
        DeltaMemory({}, HIDDEN, OUT)
    for size, kind in ((2.0, TypeError), (True, TypeError), ("8", TypeError), (0, ValueError)):
        with pytest.raises(kind, match=f"hidden_size must be an int, at least 1, got .* {size!r}"):
            DeltaMemory(DeltaMemConfig(), size, OUT)
        with pytest.raises(kind, match=rf"out_features\['k'\] must be an int, at least 1, got .* {size!r}"):
            DeltaMemory(DeltaMemConfig(), HIDDEN, OUT | {"k": size})
    with pytest.raises(TypeError, match=r"out_features must be a dict of q, k, v, o, got list \[8\]"):
        DeltaMemory(DeltaMemConfig(), HIDDEN, [8])
    with pytest.raises(ValueError, match="out_features must name q, k, v, o, got q, 1"):
        DeltaMemory(DeltaMemConfig(), HIDDEN, {"q": 3, 1: 3})
    with pytest.raises(ValueError, match="head must be one of q, k, v, o, got 'x'"):
        memory().correct(torch.zeros(1, 1, 32), torch.zeros(1, 1, 1, 8), "x")
