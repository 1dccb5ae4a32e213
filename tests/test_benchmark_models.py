"""The benchmarks of whole models, on a tiny one: every implementation gives the frozen model's logits and gradients."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # the harness is not installed

from benchmarks import measure, models, report
from benchmarks.__main__ import main
from benchmarks.operations import model as cases
from benchmarks.registry import Shape

NAMES = ("model tiny Qwen3", "model tiny Qwen3 training", "model tiny Qwen3 attention")


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Run main() on the tiny model, without an installed peer. Return its rows by operation, implementation and T."""
    monkeypatch.setattr(measure, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(report, "plot", lambda *arguments: None)
    monkeypatch.setattr(models, "PEER", tmp_path / "none")
    monkeypatch.setitem(sys.modules, "deltamem", None)
    threads = torch.get_num_threads()

    def run(*arguments: str) -> dict:
        path = tmp_path / "result.json"
        options = ["--op", *NAMES, "--threads", "1", "--seconds", "5", "--samples", "3", "--json", str(path)]
        assert main([*options, *arguments]) == 0
        found = json.loads(path.read_text())["rows"]
        return {(row["operation"], row["implementation"], row["shape"]["tokens"]): row for row in found}

    yield run
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_memory_that_corrects_nothing_changes_no_logit(rows):
    found = rows("--tokens", "1", "6")
    for name in NAMES:
        for tokens in (1, 6):
            peer = found[name, "upstream", tokens]
            assert peer["status"] == "not run"
            frozen, ours = (found[name, kind, tokens] for kind in ("frozen", "ours"))
            if "training" in name and tokens == 1:
                assert frozen["note"] == ours["note"] == peer["note"] == "a loss needs at least 2 tokens"
                continue
            assert "git clone https://github.com/declare-lab/delta-Mem" in peer["note"]
            assert (frozen["status"], ours["status"]) == ("ok", "ok")
            assert (frozen["error"], ours["error"]) == (0.0, 0.0)
            assert (frozen["samples"], ours["samples"]) == (3, 3)
            outputs = {"loss", "d_x"} if "training" in name else {"out" if "attention" in name else "logits"}
            assert set(ours["errors"]) == outputs
    training = [found["model tiny Qwen3 training", kind, 6]["kept_bytes"] for kind in ("frozen", "ours")]
    assert 0 < training[0] < training[1] < 4 * models.TINY_QWEN3.parameters  # the weights are not counted


def test_real_inputs_are_not_run(rows):
    found = rows("--tokens", "6", "--input", "smollm2")
    assert {row["note"] for row in found.values()} == {"its inputs are random token ids: needs --input random"}
    assert {row["status"] for row in found.values()} == {"not run"}


def test_a_model_of_gigabytes_is_for_gpus(rows):
    """Its size is counted on the meta device. On a CPU it is not built."""
    built = models.QWEN3_4B.build(torch.bfloat16, "meta")
    assert sum(p.numel() for p in built.parameters()) == models.QWEN3_4B.parameters
    assert {p.dtype for p in built.parameters()} == {torch.bfloat16}
    found = rows("--tokens", "2", "--op", "model Qwen3-4B")
    assert {(row["status"], row["note"]) for row in found.values()} == {
        ("not run", "4 billion parameters: needs a GPU")
    }


@pytest.mark.parametrize("fields", [{}, {"heads": 2, "rank": 4, "mode": "no_lambda", "gates": "head"}])
def test_the_memory_is_as_the_shape_says(fields):
    shape = Shape(6, batch=2, **fields)
    base, ours = models.model("frozen", models.TINY_QWEN3, shape), models.model("ours", models.TINY_QWEN3, shape)
    assert sum(p.numel() for p in base.parameters()) == models.TINY_QWEN3.parameters
    memory = ours.model.layers[3].self_attn.delta_memory
    config = memory.config
    got = (config.num_state_heads, config.rank, config.state_update_mode, config.rankwise_gates)
    assert got == (shape.heads, shape.rank, shape.mode, shape.gates == "row")
    shared = {p.data_ptr() for p in base.parameters()}
    assert {p.data_ptr() for p in ours.parameters()} > shared
    assert {id(p) for p in ours.parameters() if p.requires_grad} == {
        id(p) for layer in ours.model.layers for p in layer.self_attn.delta_memory.parameters() if p.requires_grad
    }
    with torch.no_grad():
        memory.delta_o_proj.normal_()
    try:  # the check of the harness sees a memory that corrects
        inputs = cases._inputs(models.TINY_QWEN3, shape)
        outputs = [cases._forward(kind, models.TINY_QWEN3, inputs, shape)["logits"] for kind in ("frozen", "ours")]
        assert not torch.allclose(*outputs, rtol=1e-3)
    finally:
        memory.delta_o_proj.data.zero_()


def test_too_few_samples_raise(capsys):
    with pytest.raises(SystemExit):
        main(["--samples", "2"])
    assert "--samples must be at least 3" in capsys.readouterr().err
