"""segment_mean: every backend against its definition in float64."""

from __future__ import annotations

import pytest
import torch
from problems import check
from torch import Tensor

from deltamem_kernels import BackendUnavailableError, segment_mean
from deltamem_kernels.testing import Problem, between_nans, segment_problem

NAN = float("nan")
pytestmark = pytest.mark.one_isa


def plain_segment_mean(
    x: Tensor, segment_ids: Tensor, num_segments: int, mask: Tensor | None = None, backend: str | None = None
) -> dict[str, Tensor]:
    """The mean of x over the tokens of each segment, as it is defined."""
    tokens = [segment_ids == m if mask is None else (segment_ids == m) & mask for m in range(num_segments)]
    means = [torch.stack([row[own].sum(0) for row, own in zip(x, of_m, strict=True)]) for of_m in tokens if len(x)]
    counts = [of_m.sum(1) for of_m in tokens]
    if not means:
        shape = x.shape[0], num_segments, x.shape[2]
        return {"means": x.new_zeros(shape) + 0 * x.sum(), "written": torch.zeros(shape[:2], dtype=torch.bool)}
    count = torch.stack(counts, 1)
    return {"means": torch.stack(means, 1) / count.clamp(min=1).unsqueeze(-1), "written": count > 0}


def check_means(problem: Problem, implementation, **options) -> None:
    """Check means and gradients. The mean of an empty segment is zero."""
    ours = check(problem, implementation, oracle=plain_segment_mean, **options)
    assert (ours["means"].dtype, ours["written"].dtype) == (problem.operands["x"].dtype, torch.bool)
    assert torch.count_nonzero(ours["means"][~ours["written"]]) == 0


@pytest.mark.each_isa
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("rising", [False, True])
def test_means_and_gradients_are_exact(implementation, rising, mask, index_dtype):
    T = 12 if implementation.slow else 70
    problem = segment_problem(3, T, 133, 6, rising=rising, mask=mask, index_dtype=index_dtype)
    check_means(problem, implementation)


@pytest.mark.each_isa
@pytest.mark.parametrize("T", [0, 1, 31, 32, 33, 511, 512, 513, 1100])
def test_every_number_of_tokens_is_exact(implementation, T):
    check_means(segment_problem(1, T, 5, 4), implementation)


@pytest.mark.each_isa
@pytest.mark.parametrize("D", [1, 15, 127, 128, 129, 256, 300])
def test_every_width_is_exact(implementation, D):
    check_means(segment_problem(2, 9, D, 3), implementation)


@pytest.mark.parametrize(("B", "T", "D", "M"), [(0, 4, 3, 2), (2, 4, 3, 0), (2, 4, 0, 2), (2, 0, 3, 2), (1, 3, 2, 40)])
def test_sizes_of_zero_and_more_segments_than_tokens_are_exact(implementation, B, T, D, M):
    check_means(segment_problem(B, T, D, M), implementation)


@pytest.mark.each_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_results_are_rounded_only_once(implementation, dtype):
    """They are within half a last bit of the truth, so never further away than means taken in that dtype."""
    check_means(segment_problem(2, 90, 20, 5, dtype=dtype), implementation, tolerance=1e-14)


@pytest.mark.each_isa
def test_nothing_outside_of_strided_operands_is_read(implementation):
    problem = segment_problem(2, 40, 17, 6, mask=True, fenced=True, device=implementation.device)
    check_means(problem, implementation, cotangents={"means": between_nans(torch.randn(2, 6, 17))})


def test_tokens_without_a_segment_reach_no_result(implementation):
    """A token without a segment or a masked one may hold NaN. NaN in one segment stays there."""
    B, T, D, M = 2, 50, 9, 4
    device = implementation.device
    ids, mask = torch.randint(-1, M, (B, T), device=device), torch.rand(B, T, device=device) < 0.7
    belongs = (ids >= 0) & mask
    x = torch.randn(B, T, D, device=device)
    clean = segment_mean(x, ids, M, mask, backend=implementation.backend)
    leaf = x.masked_fill(~belongs[..., None], NAN).requires_grad_()
    out = segment_mean(leaf, ids, M, mask, backend=implementation.backend)
    assert torch.equal(out.means, clean.means)
    (d_x,) = torch.autograd.grad(out.means.sum(), leaf)
    assert torch.count_nonzero(d_x[~belongs]) == 0
    assert torch.isfinite(d_x).all()
    out = segment_mean(x.masked_fill((ids == 1)[..., None], NAN), ids, M, mask, backend=implementation.backend)
    others = [0, 2, 3]
    assert torch.equal(out.means[:, others], clean.means[:, others])
    assert out.means[:, 1][out.written[:, 1]].isnan().all()


def test_results_do_not_depend_on_the_batch_or_the_threads(implementation):
    B, T, D, M = 3, 80, 140, 5
    x, ids = (y.to(implementation.device) for y in (torch.randn(B, T, D), torch.randint(-1, M, (B, T))))
    together = segment_mean(x, ids, M, backend=implementation.backend).means
    for b in range(B):
        alone = segment_mean(x[b : b + 1], ids[b : b + 1], M + b, backend=implementation.backend).means
        assert torch.equal(alone[0, :M], together[b])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(segment_mean(x, ids, M, backend=implementation.backend).means, together)
    finally:
        torch.set_num_threads(threads)


def test_ids_after_the_last_segment_raise_or_are_left_out(implementation):
    """They raise where looking at them costs nothing. The id of a masked token is not looked at."""
    x, ids = torch.randn(1, 4, 3), torch.tensor([[0, 2, 1, 0]])
    mask = torch.tensor([[True, False, True, True]])
    masked = segment_mean(x, ids, 2, mask, backend="cpu")
    x, ids, mask = (y.to(implementation.device) for y in (x, ids, mask))
    if implementation.backend == "triton":
        out = segment_mean(x.requires_grad_(), ids, 2, backend="triton")
        torch.testing.assert_close(out.means.cpu(), masked.means)
        (d_x,) = torch.autograd.grad(out.means.sum(), x)
        assert torch.count_nonzero(d_x[0, 1]) == 0
        return
    ours = segment_mean(x, ids, 2, mask, backend=implementation.backend)
    assert torch.equal(ours.written.cpu(), masked.written)
    if implementation.device == "cpu":
        with pytest.raises(ValueError, match="segment_ids must be below num_segments=2, got 2"):
            segment_mean(x, ids, 2, backend=implementation.backend)


def test_only_ids_and_counts_are_kept_for_backward():
    x, ids = torch.randn(2, 60, 33, requires_grad=True), torch.randint(-1, 3, (2, 60))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: (kept.append(y), y)[1], lambda y: y):
        segment_mean(x, ids, 3)
    assert sorted(tuple(y.shape) for y in kept) == [(2, 3), (2, 60)]


def test_gradients_of_the_reference_are_those_of_finite_differences():
    ids, mask = torch.tensor([[0, 2, 0, -1, 2], [-5, 1, 1, 1, 0]]), torch.rand(2, 5) < 0.7
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: segment_mean(x, ids, 4, mask, backend="reference").means, (x,))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_operators_pass_opcheck(backend, masked):
    x, ids = torch.randn(2, 7, 5), torch.randint(-1, 3, (2, 7))
    mask = torch.rand(2, 7) < 0.5 if masked else None
    torch.library.opcheck(torch.ops.deltamem_kernels.segment_mean.default, (x, ids, 3, mask, backend))
    means, counts = torch.ops.deltamem_kernels.segment_mean(x, ids, 3, mask, backend)
    torch.library.opcheck(torch.ops.deltamem_kernels.segment_mean_backward.default, (means, ids, counts, mask, backend))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_torch_compile_makes_one_graph_for_all_sizes(backend):
    """Lengths and numbers of segments."""
    torch._dynamo.reset()
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def layer(x: Tensor, ids: Tensor, like: Tensor) -> Tensor:
        out = segment_mean(x * 2, ids, like.shape[0], backend=backend)
        return out.means * out.written.unsqueeze(-1)

    compiled = torch.compile(layer, backend=compiler, fullgraph=True, dynamic=True)
    for T, M in ((9, 3), (12, 4), (30, 7)):
        x, ids, like = torch.randn(2, T, 5, requires_grad=True), torch.randint(-1, M, (2, T)), torch.zeros(M)
        ours, eager = compiled(x, ids, like), layer(x, ids, like)
        torch.testing.assert_close(ours, eager)
        d = torch.randn_like(eager)
        torch.testing.assert_close(torch.autograd.grad(ours, x, d), torch.autograd.grad(eager, x, d))
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_meta_tensors_have_shapes_and_dtypes():
    x, ids = torch.empty(2, 7, 5, device="meta", dtype=torch.bfloat16), torch.empty(2, 7, device="meta").long()
    out = segment_mean(x, ids, 3)
    assert (out.means.shape, out.means.dtype, out.written.shape) == ((2, 3, 5), torch.bfloat16, (2, 3))


@pytest.mark.parametrize(
    ("change", "exception", "words"),
    [
        ({"x": [1.0]}, TypeError, ["x must be a tensor [B, T, D]", "list"]),
        ({"x": torch.zeros(2, 7, 5).long()}, TypeError, ["x must be float16", "int64"]),
        ({"x": torch.zeros(7, 5)}, ValueError, ["x must be [B, T, D]", "[7, 5]"]),
        ({"segment_ids": None}, TypeError, ["segment_ids must be an int32 or int64 tensor [B, T]", "None"]),
        ({"segment_ids": torch.zeros(2, 7)}, TypeError, ["segment_ids must be an int32 or int64", "float32"]),
        ({"segment_ids": torch.zeros(7, 2).long()}, ValueError, ["segment_ids must be [B, T] = [2, 7]", "[7, 2]"]),
        ({"segment_ids": torch.zeros(2, 7, device="meta").long()}, ValueError, ["segment_ids must be on x's", "meta"]),
        ({"mask": torch.zeros(2, 7)}, TypeError, ["mask must be a bool tensor [B, T]", "float32"]),
        ({"mask": torch.zeros(2, 7, 1).bool()}, ValueError, ["mask must be [B, T] = [2, 7]", "[2, 7, 1]"]),
        ({"num_segments": 2.0}, TypeError, ["num_segments must be an int", "float 2.0"]),
        ({"num_segments": True}, TypeError, ["num_segments must be an int", "bool True"]),
        ({"num_segments": torch.tensor(3)}, TypeError, ["num_segments must be an int", "int64 []"]),
        ({"num_segments": -1}, ValueError, ["num_segments must be 0 or more", "-1"]),
        ({"backend": "gpu"}, ValueError, ["backend must be one of", "gpu"]),
        ({"backend": 3}, TypeError, ["backend must be the name", "int 3"]),
        ({"backend": "cuda"}, BackendUnavailableError, ["backend 'cuda' cannot run on cpu"]),
    ],
)
@pytest.mark.parametrize("gradients", [False, True])
def test_arguments_that_do_not_fit_raise(change, exception, words, gradients):
    call = {"x": torch.zeros(2, 7, 5), "segment_ids": torch.zeros(2, 7).long(), "num_segments": 3, **change}
    if gradients and isinstance(call["x"], Tensor) and call["x"].is_floating_point():
        call["x"] = call["x"].clone().requires_grad_()
    with pytest.raises(exception) as raised:
        segment_mean(**call)
    for word in words:
        assert word in str(raised.value)
