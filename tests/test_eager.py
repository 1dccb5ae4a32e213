"""The fast path of eager calls in C++: it takes plain calls whose operands fit, and leaves everything else alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from eager_calls import CALLS, CHECKS, HEAD_DIM, WIDTH, D, H, N, R, correct, decode, prefill, project, scan, step
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: PLC2701
from torch.fx.experimental.proxy_tensor import make_fx

import deltamem_kernels
from deltamem_kernels import attention_correction, delta_step, delta_update, memory_decode, memory_projection, operands
from deltamem_kernels.backends import choose, select
from deltamem_kernels.backends.eager import FUNCTIONS, eager
from deltamem_kernels.backends.native import library
from deltamem_kernels.ops.layer_step import layer_step


@pytest.fixture(autouse=True)
def _enabled() -> None:
    choose("cpu", torch.device("cpu"))


def answer(name: str, call: tuple, backend: str | None = None) -> object:
    return getattr(eager, name)(*call, backend)


def takes(name: str, call: tuple, backend: str | None = None) -> bool:
    """Return whether the kernel ran."""
    results = answer(name, call, backend)
    return results is not None and results is not False


def test_every_function_has_a_case():
    assert set(CALLS) == set(FUNCTIONS)


def test_records_have_the_same_fields_in_both_languages():
    fields = library.load("cpu").record_fields()
    assert fields.keys() >= {type(call()[0]).__name__ for call in CALLS.values()}
    for name, names in fields.items():
        assert tuple(names) == getattr(operands, name)._fields, name


@pytest.mark.parametrize("name", CALLS)
def test_plain_calls_are_taken(name):
    assert takes(name, CALLS[name]())
    assert takes(name, CALLS[name](), "cpu")
    with torch.no_grad():
        assert takes(name, CALLS[name]())
    with torch.inference_mode():
        assert takes(name, CALLS[name]())


@pytest.mark.parametrize("name", CALLS)
def test_calls_for_another_backend_are_left_to_the_operator(name, monkeypatch):
    assert answer(name, CALLS[name](), "reference") is False
    monkeypatch.setenv("DELTAMEM_BACKEND", "reference")
    assert answer(name, CALLS[name]()) is False
    assert takes(name, CALLS[name](), "cpu")
    monkeypatch.setenv("DELTAMEM_BACKEND", "cpu")
    assert takes(name, CALLS[name]())


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_something_observes_are_declined(name):
    call = CALLS[name]()
    with torch.profiler.profile():
        assert not takes(name, call)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert not takes(name, call)
    with torch.overrides.TorchFunctionMode():
        assert not takes(name, call)
    with eager.disabled():
        assert not takes(name, call)
    assert takes(name, call)


def test_the_profiler_sees_the_operator():
    x = torch.randn(N, D)
    with torch.profiler.profile() as profile:
        memory_projection(x, torch.randn(3 * R, D), torch.randn(R, D), None)
    assert any(event.name == "deltamem_kernels::memory_projection" for event in profile.events())


class Subclass(Tensor):
    pass


DEPARTURES: dict[str, Callable[[Tensor], Tensor]] = {
    "a subclass": lambda x: x.as_subclass(Subclass),
    "another device": lambda x: x.to("meta"),
    "a sparse layout": lambda x: x.to_sparse(),
    "a negated view": lambda x: torch._neg_view(x) if x.is_floating_point() else x.to_sparse(),
    "a quantised dtype": lambda x: x.to(torch.uint16),
}


@pytest.mark.parametrize("what", DEPARTURES)
@pytest.mark.parametrize("name", CALLS)
def test_tensors_that_are_not_plain_are_declined(name, what):
    record, *rest = CALLS[name]()
    for field, x in record._asdict().items():
        if isinstance(x, Tensor):
            assert not takes(name, (record._replace(**{field: DEPARTURES[what](x)}), *rest)), field


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_want_a_gradient_are_left_to_the_operator(name):
    """Without another look at the operands, unless Python raises because there is no such gradient."""
    record, *rest = CALLS[name]()
    for field, x in record._asdict().items():
        if isinstance(x, Tensor) and x.is_floating_point():
            wanted = (record._replace(**{field: x.clone().requires_grad_()}), *rest)
            no_gradient = name in ("step", "decode", "layer_step") or field in ("cos", "sin")
            assert answer(name, wanted) is (None if no_gradient else False), field
            with torch.no_grad():
                assert takes(name, wanted), field


def mutations(x: object, others: list[Tensor], rng: random.Random) -> Iterator[object]:
    """Yield values that may or may not fit in the place of x."""
    other = rng.choice(others)
    if isinstance(x, Tensor):
        yield None
        yield x.double() if x.is_floating_point() else x.int()
        yield x.to(torch.bfloat16)
        yield x.long()
        yield x.bool()
        yield x.unsqueeze(0)
        yield x.flatten()
        yield x[:0]
        for d in range(x.ndim):
            yield x.narrow(d, 0, x.shape[d] - 1)
            yield x.narrow(d, 0, 1)
            yield x.narrow(d, 0, 1).expand(x.shape)
            yield x.repeat_interleave(2, d)[(slice(None),) * d + (slice(None, None, 2),)]
        yield x.transpose(0, -1) if x.ndim else x
        yield other
        for memory in others:  # of the same shape, in the memory of another operand
            if memory.numel() >= x.numel():
                yield memory.view(-1)[: x.numel()].view(x.shape)
    elif isinstance(x, operands.LayerStepWeights):
        for name in x._fields:
            yield from (x._replace(**{name: value}) for value in mutations(getattr(x, name), others, rng))
        yield x[:-1]
    elif isinstance(x, (tuple, list)) and len(x) == 2:
        yield from (x[:1], [*x, other], [x[0], other], [x[0], x[1].bool()], [], [x[1], x[0]], None)
    elif isinstance(x, (tuple, list)):
        yield x[:1]
        yield x[:2]
        yield (torch.cat(list(x)),)
        yield (x[0], x[1][:-1], x[2])
        yield (x[0], x[1].double(), x[2].T.contiguous().T)
    elif x is None:
        yield other
        yield torch.tensor(rng.random())
        yield torch.zeros(N, dtype=torch.int64)
        yield torch.ones(N, 5, dtype=torch.int32)
        yield torch.tensor([0, 2, 5])
    elif isinstance(x, bool):
        yield from (not x, int(x), None)
    elif isinstance(x, (int, float)):
        yield from (
            0,
            1,
            2,
            3,
            -1,
            0.5,
            -2.0,
            True,
            None,
            "1",
            float("nan"),
            2**70,
            (2**64 + 2) // 3,
            10**400,
            torch.tensor([4, 2]),
        )
    elif isinstance(x, str):
        yield from ("standard", "lambda_outside", "no_lambda", "affine", "fast", None)


def raises(check: Callable[[], None]) -> Exception | None:
    try:
        check()
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        return error
    return None


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_what_the_fast_path_takes_passes_the_checks(name, gradients, request):
    """One or two fields are changed at a time. What a check refuses must be declined. The reverse may fail where a
    check looks closer, such as at slices of one storage that do not overlap, but not for most calls that fit."""
    rng = random.Random(request.config.getoption("--seed"))
    taken = refused = 0
    fields = list(CALLS[name]()[0]._fields)
    for first in fields:
        for second in (first, rng.choice(fields)):
            record, *rest = CALLS[name]()
            others = [x for x in record if isinstance(x, Tensor)]
            for value in mutations(getattr(record, first), others, rng):
                changed = {first: value}
                if second != first:
                    changed[second] = rng.choice(list(mutations(getattr(record, second), others, rng)))
                call = (record._replace(**changed), *rest)
                with torch.set_grad_enabled(gradients):
                    error = raises(lambda call=call: CHECKS[name](*call))
                    try:
                        accepted = answer(name, call) is not None
                    except ValueError:  # raised by the kernel, about values that no check looks at
                        accepted = True
                assert not (accepted and error), (changed, error)
                taken, refused = taken + accepted, refused + (error is not None)
    assert taken > 20
    assert refused > 100


@pytest.mark.parametrize("name", CALLS)
def test_the_fast_path_gives_the_same_bits_as_the_operator(name):
    """Through the public functions, written tensors included."""
    torch.manual_seed(0)
    fast = PUBLIC[name]()
    torch.manual_seed(0)
    with eager.disabled():
        slow = PUBLIC[name]()
    assert len(fast) == len(slow)
    for a, b in zip(fast, slow, strict=True):
        assert a.count_nonzero()
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def public_scan() -> list[Tensor]:
    (s,) = scan()
    return list(delta_update(s.q, s.k, s.v, s.beta, s.decay, initial_state=s.initial_state, mask=s.mask))


def public_step() -> list[Tensor]:
    (s,) = step()
    reads = delta_step(s.state, s.q, s.k, s.v, s.beta, state_indices=s.state_indices, out=s.out)
    assert reads is s.out
    return [reads, s.state]


def public_correct() -> list[Tensor]:
    record, out = correct()
    plain = attention_correction(record.base, record.reads, record.weight, 0.5)
    result = deltamem_kernels.attention_correction_norm_rope(
        record.base, record.reads, record.weight, 0.5, head_dim=HEAD_DIM, norm_weight=record.norm_weight,
        cos=record.cos, sin=record.sin, out=out,
    )  # fmt: skip
    assert result is out
    return [plain, result]


def public_project() -> list[Tensor]:
    (p,) = project()
    return list(memory_projection(*p[:6], heads=H))


def public_prefill() -> list[Tensor]:
    (p,) = prefill()
    return list(deltamem_kernels.memory_prefill(*p[:6], heads=H, initial_state=p.initial_state, mask=p.mask))


def public_decode() -> list[Tensor]:
    (d,) = decode()
    result = memory_decode(
        d.state, d.x, *d[2:7], heads=H, mode=d.mode, state_indices=d.state_indices, base=d.base,
        delta_weight=d.delta_weight, scale=d.scale, head_dim=HEAD_DIM, norm_weight=d.norm_weight, cos=d.cos, sin=d.sin,
        out=d.out,
    )  # fmt: skip
    assert result.corrected is d.out
    return [*result, d.state]


def public_layer_step() -> list[Tensor]:
    reads, state, corrections = layer_step(*CALLS["layer_step"]()[0])
    return [reads, state, *corrections]


PUBLIC = {name: globals()[f"public_{name}"] for name in CALLS}


WRONG: dict[str, Callable[[dict], dict]] = {
    "another view of base": lambda call: {"out": call["base"].view(N, WIDTH)},
    "memory shared with an operand": lambda call: {"delta_weight": call["out"]._base[:, :R]},
    "shape": lambda call: {"cos": torch.randn(N, 6)},
    "dtype": lambda call: {"delta_weight": torch.zeros(WIDTH, R, dtype=torch.int32)},
    "device": lambda call: {"beta_bias": torch.zeros(R, device="meta")},
    "a string as a number": lambda call: {"scale": "0.5"},
    "an unknown mode": lambda call: {"mode": "fast"},
    "a bool as a size": lambda call: {"head_dim": True},
    "a size of zero": lambda call: {"head_dim": 0},
    "a bool as a slot": lambda call: {"pad_slot_id": True},
    "a slot outside of the pool": lambda call: {"state_indices": torch.tensor([0, 1, 3])},
    "gradients": lambda call: {"x": call["x"].requires_grad_()},
}


@pytest.mark.parametrize("what", WRONG)
def test_a_mistake_raises_after_good_calls(what):
    pool, x, base = torch.zeros(N, 1, R, R), torch.randn(N, D), torch.randn(N, WIDTH)
    call = {"state": pool, "x": x, "qkv_weight": torch.randn(3 * R, D), "beta_weight": torch.randn(R, D)}
    call |= {"beta_bias": torch.randn(R), "base": base, "delta_weight": torch.randn(WIDTH, R), "out": base}
    call |= {"scale": 0.5, "head_dim": 4, "cos": torch.randn(N, 4), "sin": torch.randn(N, 4)}
    if what == "memory shared with an operand":
        call = {name: x for name, x in call.items() if name not in ("head_dim", "cos", "sin")}
        call |= {"out": torch.empty(WIDTH, WIDTH)[:N], "delta_weight": torch.zeros(WIDTH, WIDTH)[:, :R]}
    with torch.no_grad():
        memory_decode(**call)
        memory_decode(**call)
    change = WRONG[what](call)
    before = call["state"].clone()
    assert before.any()
    with torch.set_grad_enabled(what == "gradients"), pytest.raises((ValueError, TypeError)):
        memory_decode(**call | change)
    assert torch.equal(call["state"], before)


def test_tensors_written_in_place_have_another_version():
    """Autograd refuses to use a tensor that a kernel has overwritten."""
    weight = torch.randn(WIDTH, R, requires_grad=True)
    base, reads = torch.randn(N, WIDTH), torch.randn(N, R)
    product = (base * weight[:N, :1]).sum()
    with torch.no_grad():
        attention_correction(base, reads, weight, out=base)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    pool, weight = torch.randn(N, 1, R, R), torch.randn(N, 1, R, R, requires_grad=True)
    product = (pool * weight).sum()
    with torch.no_grad():
        delta_step(pool, *torch.rand(4, N, 1, R))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_inference_tensors_are_written_outside_of_inference_mode_too():
    with torch.inference_mode():
        pool = torch.randn(N, 1, R, R)
    other, step = pool.clone(), torch.rand(4, N, 1, R)
    torch.testing.assert_close(delta_step(pool, *step), delta_step(other, *step), rtol=0, atol=0)
    torch.testing.assert_close(pool, other, rtol=0, atol=0)


def test_fake_traced_and_vmapped_calls_go_through_the_dispatcher():
    weights = torch.randn(3 * R, D), torch.randn(R, D), torch.zeros(R)
    with torch.no_grad():
        mode = FakeTensorMode()
        fakes = [mode.from_tensor(x) for x in (torch.randn(2, D), *weights)]
        assert memory_projection(*fakes).q.shape == (2, 1, R)
        graph = make_fx(lambda x, *w: memory_projection(x, *w), tracing_mode="symbolic")(torch.randn(2, D), *weights)
        assert any("memory_projection" in str(node.target) for node in graph.graph.nodes)
        base, reads, weight = torch.randn(5, N, WIDTH), torch.randn(5, N, R), torch.randn(WIDTH, R)
        mapped = torch.vmap(attention_correction, in_dims=(0, 0, None))(base, reads, weight)
        torch.testing.assert_close(mapped, attention_correction(base, reads, weight))


def test_gradients_are_recorded_after_a_call_without():
    x, weights = torch.randn(2, 3, D), (torch.randn(3 * R, D), torch.randn(R, D), None)
    with torch.no_grad():
        memory_projection(x, *weights)
        assert not memory_projection(x.requires_grad_(), *weights).q.requires_grad
    assert memory_projection(x, *weights).q.requires_grad


def test_the_fast_path_stays_off_where_another_backend_is_the_default(monkeypatch):
    """After a failed compilation `reference` is the default, also once `cpu` is loaded by its name."""
    monkeypatch.setattr(select, "_chosen", {})
    monkeypatch.setattr(library, "loaded", lambda kind: pytest.fail("loaded"))
    with monkeypatch.context() as patch:
        patch.setattr(select.BACKENDS["cpu"], "unavailable_reason", lambda device: "no compiler")
        with pytest.warns(UserWarning, match="no compiler"):
            assert choose("", torch.device("cpu")).name == "reference"
    monkeypatch.setattr(library, "load", lambda kind: None)
    assert choose("cpu", torch.device("cpu")).name == "cpu"  # whose library is not asked for the fast path


def test_disabling_nests_and_survives_enabling():
    functions = {name: getattr(eager, name) for name in FUNCTIONS}
    with eager.disabled():
        with eager.disabled():
            eager.enable(library.load("cpu"))
            assert not takes("scan", scan())
        assert not takes("scan", scan())
    assert takes("scan", scan())
    assert {name: getattr(eager, name) for name in FUNCTIONS} == functions


@pytest.mark.parametrize("head_dim", [torch.tensor([4, 2]), 4.0, True, "4", 0])
def test_a_wrong_head_dim_raises_the_designed_error(head_dim):
    record, _ = correct()
    with pytest.raises((TypeError, ValueError), match="head_dim must"):
        deltamem_kernels.attention_correction_norm_rope(record.base, record.reads, record.weight, head_dim=head_dim)
    (d,) = decode()
    with torch.no_grad(), pytest.raises((TypeError, ValueError), match="head_dim must"):
        memory_decode(d.state, d.x, *d[2:7], heads=H, base=d.base, delta_weight=d.delta_weight, head_dim=head_dim)


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_a_tuple_of_weights_holds_three(count):
    (p,) = project()
    with pytest.raises(ValueError, match=f"qkv_weight must be .* got {count} tensors"):
        memory_projection(p.x, tuple(p.qkv_weight[0] for _ in range(count)), *p[2:6], heads=H)
