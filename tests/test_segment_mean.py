"""segment_mean: every backend against sums in float64, one token after another."""

from __future__ import annotations

import pytest
import torch
from problems import FLOAT32_TOLERANCE, error, fence, rounding
from torch import Tensor

from deltamem_kernels import BackendUnavailableError, segment_mean

NAN = float("nan")


def oracle(x: Tensor, ids: Tensor, M: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Means and written as one says it: the mean of x[b, t] over the tokens whose id is m."""
    B, T, D = x.shape
    means, written = torch.zeros(B, M, D, dtype=torch.float64), torch.zeros(B, M, dtype=torch.bool)
    for b in range(B):
        for m in range(M):
            tokens = [t for t in range(T) if ids[b, t] == m and (mask is None or mask[b, t])]
            if tokens:
                means[b, m], written[b, m] = x[b, tokens].double().cpu().mean(0), True
    return means, written


def gradient(d_means: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Of a token: its segment's, shared among its tokens."""
    d_means, d_x = d_means.double().cpu(), torch.zeros(*ids.shape, d_means.shape[2], dtype=torch.float64)
    live = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    for b, t in live.nonzero().tolist():
        m = int(ids[b, t])
        if 0 <= m < d_means.shape[1]:
            d_x[b, t] = d_means[b, m] / int(((ids[b] == m) & live[b]).sum())
    return d_x


def check(x, ids, M, mask, implementation, tolerance=FLOAT32_TOLERANCE, cotangent=None) -> None:
    device = implementation.device
    leaf = x if x.device.type == device else x.to(device)
    leaf = leaf.detach().requires_grad_()
    on_device = [None if y is None else y if y.device.type == device else y.to(device) for y in (ids, mask)]
    out = segment_mean(leaf, on_device[0], M, on_device[1], backend=implementation.backend)
    means, written = oracle(x, ids, M, mask)
    assert (out.means.dtype, out.written.dtype) == (x.dtype, torch.bool)
    assert torch.equal(out.written.cpu(), written)
    assert error(out.means, means) <= tolerance
    assert torch.count_nonzero(out.means[~out.written]) == 0
    d_means = torch.randn(out.means.shape).to(x.dtype) if cotangent is None else cotangent
    (d_x,) = torch.autograd.grad(out.means, leaf, d_means.to(device))
    assert (d_x.dtype, d_x.shape) == (x.dtype, x.shape)
    assert error(d_x, gradient(d_means, ids, mask)) <= tolerance


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("order", ["rising", "any"])
def test_parity(implementation, order, masked, index_dtype):
    B, T, D, M = 3, 12 if implementation.slow else 70, 133, 6
    ids = torch.randint(-2, M - 1, (B, T), dtype=index_dtype)  # the last segment is empty
    ids = ids.sort(dim=1).values if order == "rising" else ids
    mask = torch.rand(B, T) < 0.6 if masked else None
    check(torch.randn(B, T, D), ids, M, mask, implementation)


@pytest.mark.parametrize("T", [0, 1, 31, 32, 33, 511, 512, 513, 1100])
def test_lengths(implementation, T):
    check(torch.randn(1, T, 5), torch.randint(-1, 3, (1, T)), 3, None, implementation)


@pytest.mark.parametrize("D", [1, 15, 127, 128, 129, 256, 300])
def test_widths(implementation, D):
    check(torch.randn(2, 9, D), torch.randint(-1, 2, (2, 9)), 2, None, implementation)


@pytest.mark.parametrize(("B", "T", "D", "M"), [(0, 4, 3, 2), (2, 4, 3, 0), (2, 4, 0, 2), (2, 0, 3, 2), (1, 3, 2, 40)])
def test_sizes_of_zero_and_more_segments_than_tokens(implementation, B, T, D, M):
    check(torch.randn(B, T, D), torch.randint(-1, max(M, 1), (B, T)).clamp(max=M - 1), M, None, implementation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(implementation, dtype):
    """Rounded once: within half a last bit of the truth, so never further than means taken in that dtype."""
    x, ids = torch.randn(2, 90, 20).to(dtype), torch.randint(-1, 4, (2, 90))
    check(x, ids, 4, None, implementation, tolerance=1e-14 + rounding(dtype, implementation))


def test_operands_between_nans(implementation):
    B, T, D, M = 2, 40, 17, 5
    device = implementation.device
    x, mask = fence(torch.randn(B, T, D, device=device)), torch.rand(B, T) < 0.7
    ids = torch.full((T + 3, 2 * B), 3)  # what lies between counts for a segment too
    ids = ids.t()[::2, 2:-1]
    ids.copy_(torch.randint(-1, M, (B, T)))
    mask = mask.t().contiguous().t()
    check(x, ids, M, mask, implementation, cotangent=fence(torch.randn(B, M, D)))


def test_what_belongs_to_no_segment_reaches_no_result(implementation):
    """NaN in a token without a segment, or of a masked one; and NaN in one segment stays there."""
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


def test_the_same_bits_beside_any_neighbours(implementation):
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


def test_ids_past_the_last_segment(implementation):
    """An error where the ids can be looked at for nothing; a masked token's id is never looked at."""
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


def test_nothing_but_ids_and_counts_is_kept():
    x, ids = torch.randn(2, 60, 33, requires_grad=True), torch.randint(-1, 3, (2, 60))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: (kept.append(y), y)[1], lambda y: y):
        segment_mean(x, ids, 3)
    assert sorted(tuple(y.shape) for y in kept) == [(2, 3), (2, 60)]


def test_gradcheck_of_the_reference():
    ids, mask = torch.tensor([[0, 2, 0, -1, 2], [-5, 1, 1, 1, 0]]), torch.rand(2, 5) < 0.7
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: segment_mean(x, ids, 4, mask, backend="reference").means, (x,))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(backend, masked):
    x, ids = torch.randn(2, 7, 5), torch.randint(-1, 3, (2, 7))
    mask = torch.rand(2, 7) < 0.5 if masked else None
    torch.library.opcheck(torch.ops.deltamem_kernels.segment_mean.default, (x, ids, 3, mask, backend))
    means, counts = torch.ops.deltamem_kernels.segment_mean(x, ids, 3, mask, backend)
    torch.library.opcheck(torch.ops.deltamem_kernels.segment_mean_backward.default, (means, ids, counts, mask, backend))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_under_torch_compile(backend):
    """One graph for all lengths and numbers of segments."""
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
def test_bad_input(change, exception, words, gradients):
    call = {"x": torch.zeros(2, 7, 5), "segment_ids": torch.zeros(2, 7).long(), "num_segments": 3, **change}
    if gradients and isinstance(call["x"], Tensor) and call["x"].is_floating_point():
        call["x"] = call["x"].clone().requires_grad_()
    with pytest.raises(exception) as raised:
        segment_mean(**call)
    for word in words:
        assert word in str(raised.value)
