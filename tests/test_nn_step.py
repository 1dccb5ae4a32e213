"""A decoding step of DeltaMemory, against its `read` and `correct`, also after its weights were changed or replaced."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from test_nn import HIDDEN, OUT, memory
from torch import multiprocessing, nn

from deltamem_kernels.testing import FLOAT32_TOLERANCE, between_nans, relative_error

FIELDS = [
    {},
    {"num_state_heads": 4, "rank": 4, "rankwise_gates": False, "normalize_qk": False},
    {"couple_lambda": False, "state_update_mode": "lambda_outside", "delta_o_rmsnorm": True},
    {"state_update_mode": "no_lambda", "trainable_delta_scale": True, "delta_scale_granularity": "head"},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_a_step_is_a_read_and_a_correction(fields, dtype):
    """In place. A row without a slot reads zeros and writes nothing."""
    module, rows = memory(**fields), 40
    config = module.config
    x = between_nans(torch.randn(rows, HIDDEN).to(dtype))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    start = torch.randn(rows, config.num_state_heads, config.rank, config.rank, dtype=wide)
    exact = module.read(x[:, None], start)
    for head in ("q", "k", "v", "o", None):
        base = None if head is None else torch.randn(rows, OUT[head]).to(dtype)
        for slots in (None, torch.randperm(rows).where(torch.arange(rows) % 4 != 0, -1)):
            state, given = start.clone(), None if base is None else base.clone()
            with torch.no_grad():
                reads = module.step(x, state, slots=slots, head=head, base=given)
            counts = torch.ones(rows, dtype=torch.bool) if slots is None else slots >= 0
            where = torch.arange(rows) if slots is None else slots
            if slots is not None:
                exact = module.read(x[:, None], start[where], mask=counts[:, None])
            assert relative_error(reads, exact.reads[:, 0]) <= FLOAT32_TOLERANCE
            assert relative_error(state[where[counts]], exact.state[counts]) <= FLOAT32_TOLERANCE
            rest = torch.ones(rows, dtype=torch.bool).index_fill(0, where[counts], False)
            assert torch.equal(state[rest], start[rest])
            if base is not None:
                corrected = module.correct(base[:, None].to(wide), exact.reads, head)[:, 0]
                rounding = torch.finfo(dtype).eps / 2 if dtype == torch.bfloat16 else 0.0
                assert relative_error(given, corrected) <= FLOAT32_TOLERANCE + rounding
        exact = module.read(x[:, None], start)


def reloaded(module, **options):
    other = memory()
    other.load_state_dict(module.state_dict(), **options)
    return other


def trained(module):
    optimizer = torch.optim.AdamW(module.parameters(), 0.1)
    module.read(torch.randn(2, 5, HIDDEN), torch.randn(2, 1, 8, 8)).reads.square().sum().backward()
    optimizer.step()
    return module


def through_a_file(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def replaced_by_one_vector(module):
    nn.utils.vector_to_parameters(torch.randn(sum(p.numel() for p in module.parameters())), module.parameters())
    return module


def scaled_in_place(module):
    """In place, without a new version for autograd."""
    for weight in module.parameters():
        weight.data.mul_(0.5)
    return module


def with_a_new_weight(module):
    module.memory_k_proj = nn.Parameter(torch.randn_like(module.memory_k_proj))
    return module


def with_new_gates(module):
    module.beta_bias = nn.Parameter(torch.randn_like(module.beta_bias))
    module.delta_q_proj = nn.Parameter(torch.randn_like(module.delta_q_proj))
    return module


def the_first_of_two(module):
    other = copy.deepcopy(module)
    scaled_in_place(other)
    assert not torch.equal(other.memory_q_proj, module.memory_q_proj)
    return module


def parametrised(module):
    return nn.utils.parametrizations.orthogonal(module, "memory_q_proj")


CHANGES = [
    trained,
    scaled_in_place,
    with_a_new_weight,
    with_new_gates,
    replaced_by_one_vector,
    through_a_file,
    reloaded,
    lambda module: reloaded(module, assign=True),
    copy.deepcopy,
    the_first_of_two,
    parametrised,
    lambda module: module.double(),
    lambda module: module.double().float(),
    lambda module: module.share_memory(),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_step_uses_the_current_weights(change):
    """Calls without gradients give what calls with gradients give."""
    module, x, state = memory(), torch.randn(40, HIDDEN), torch.randn(40, 1, 8, 8)
    base = torch.randn(40, OUT["q"])
    for _ in range(2):
        with torch.no_grad():
            module.step(x, state.clone(), head="q", base=base.clone())
        module = change(module)
        exact = module.read(x[:, None], state)
        corrected = module.correct(base[:, None], exact.reads, "q")[:, 0]
        with torch.no_grad():
            after, ours = state.clone(), base.clone()
            reads = module.step(x, after, head="q", base=ours)
            whole = module.read(x[:, None], state)
            again = module.correct(whole.reads.new_tensor(base)[:, None], whole.reads, "q")
        for found in (reads, whole.reads[:, 0]):
            assert relative_error(found, exact.reads[:, 0]) <= FLOAT32_TOLERANCE
        for found in (after, whole.state):
            assert relative_error(found, exact.state) <= FLOAT32_TOLERANCE
            in_place = base.clone()
            module.correct(in_place, whole.reads[:, 0], "q", out=in_place)
        for found in (ours, again[:, 0], in_place):
            assert relative_error(found, corrected) <= FLOAT32_TOLERANCE
        if change is parametrised:
            return


def test_a_correction_that_overlaps_its_reads_raises():
    module, base = memory(), torch.randn(1, 5, OUT["q"])
    reads = base.view(-1)[4:44].view(1, 5, 1, 8)
    with torch.no_grad(), pytest.raises(ValueError, match="out must not share memory with reads"):
        module.correct(base, reads, "q", out=base)


def test_every_parameter_has_a_storage_of_its_own():
    """Serializers and shared memory see each of them alone."""
    module = memory(couple_lambda=False)
    with torch.no_grad():
        module.step(torch.randn(1, HIDDEN), torch.zeros(1, 1, 8, 8))
    storages = [weight.untyped_storage() for weight in module.parameters()]
    assert len({storage.data_ptr() for storage in storages}) == len(storages)
    assert [storage.nbytes() for storage in storages] == [weight.nbytes for weight in module.parameters()]


def double_the_query_weight(module) -> None:
    with torch.no_grad():
        module.memory_q_proj.mul_(2)


@pytest.mark.slow
@pytest.mark.parametrize("shared_before", [True, False], ids=["share_memory", "sent"])
def test_a_weight_written_by_a_child_process_is_read_by_the_parent(shared_before):
    """share_memory moves the weights to shared memory, and so does sending a module to a process of
    torch.multiprocessing."""
    module, x, state = memory(), torch.randn(3, HIDDEN), torch.randn(3, 1, 8, 8)
    expected = copy.deepcopy(module)
    double_the_query_weight(expected)
    with torch.no_grad():
        before = module.step(x, state.clone())
        module = module.share_memory() if shared_before else module
        child = multiprocessing.get_context("spawn").Process(target=double_the_query_weight, args=(module,))
        child.start()
        child.join(300)
        assert child.exitcode == 0
        assert all(weight.is_shared() for weight in module.parameters())
        assert torch.equal(module.memory_q_proj, expected.memory_q_proj)
        after = module.step(x, state.clone())
        assert torch.equal(after, expected.step(x, state.clone()))
        assert torch.equal(module.read(x[:, None], state).reads, expected.read(x[:, None], state).reads)
    assert relative_error(after, before) > 1e-2


def test_gradients_reach_every_weight_after_a_step():
    """Also if the first call recorded none."""
    module, x = memory(), torch.randn(1, 6, HIDDEN)
    with torch.no_grad():
        module.step(x[:, 0], torch.zeros(1, 1, 8, 8))
    read = module.read(x)
    module.correct(torch.randn(1, 6, OUT["q"]), read.reads, "q").square().sum().backward()
    for name in ("memory_q_proj", "memory_k_proj", "memory_v_proj", "beta_proj", "beta_bias", "delta_q_proj"):
        assert getattr(module, name).grad.any(), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, HIDDEN + 1)}, "qkv_weight must be"),
        ({"x": torch.zeros(2, 2, HIDDEN)}, "x must be"),
        ({"x": torch.zeros(2, HIDDEN).int()}, "x must be"),
        ({"state": torch.zeros(2, 1, 4, 4)}, "state must be"),
        ({"state": torch.zeros(1, 1, 8, 8)}, "state must have a slot for each"),
        ({"slots": torch.zeros(2)}, "state_indices must be an int32 or int64"),
        ({"x": None}, "x must be a tensor .*got NoneType"),
        ({"state": None}, "state must be a tensor .*got NoneType"),
        ({"state": [0.0]}, "state must be a tensor .*got list"),
        ({"state": torch.zeros(1, 1, 8, 8).expand(2, -1, -1, -1)}, "state must be a tensor without internal overlap"),
        ({"head": "q", "base": [0.0]}, "base must be a tensor .*got list"),
        ({"base": torch.zeros(2, 5), "head": "q"}, "delta_weight must be"),
        ({"base": torch.zeros(2, 32)}, "head must be one of q, k, v, o and given with base, got None"),
        ({"head": "x", "base": torch.zeros(2, 32)}, "head must be one of q, k, v, o and given with base, got 'x'"),
        ({"head": "q"}, "head must be one of q, k, v, o and given with base, got 'q'"),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_arguments_that_do_not_fit_raise(change, message):
    arguments = {"x": torch.zeros(2, HIDDEN), "state": torch.zeros(2, 1, 8, 8), **change}
    with torch.no_grad(), pytest.raises((TypeError, ValueError), match=message):
        memory().step(**arguments)


def test_a_step_has_no_gradient():
    with pytest.raises(ValueError, match="memory_decode has no gradient"):
        memory().step(torch.zeros(2, HIDDEN), torch.zeros(2, 1, 8, 8))
