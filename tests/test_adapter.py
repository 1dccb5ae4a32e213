"""Adapters and states on disk: they are loaded unchanged, and a file that is damaged or of another kind raises."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from models import CLOSE, backbone, logits, remembering, tokens
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from transformers import DynamicCache

from deltamem_kernels.integrations.transformers import (
    attach_memory,
    detach_memory,
    get_memory,
    load_adapter,
    load_memory,
    memory_layers,
    save_adapter,
    save_memory,
    set_memory,
    states,
)
from deltamem_kernels.integrations.transformers.cache_keyword import cache_keyword
from deltamem_kernels.nn import DeltaMemConfig
from deltamem_kernels.testing import relative_error

FIELDS = [
    {"delta_heads": ("q", "o"), "output_init": "base_slice"},
    {"num_state_heads": 2, "couple_lambda": False, "trainable_delta_scale": True, "delta_o_rmsnorm": True},
]
WEIGHTS = "delta_mem_adapter.safetensors"


def bare(model):
    """Return a copy of the backbone without its memory."""
    model = copy.deepcopy(model)
    detach_memory(model)
    return model


def authors_file(model, folder) -> None:
    """Write the files that the δ-mem authors' code writes: a flat dict of tensors, and the configuration."""
    weights = {
        f"{name}.{n}": p.detach() for name, m in memory_layers(model) for n, p in m.delta_memory.named_parameters()
    }
    memory_layers(model)[0][1].delta_memory.config.save(folder)
    torch.save(weights, folder / "delta_mem_adapter.pt")


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize("save", [save_adapter, authors_file])
def test_a_saved_adapter_gives_the_same_logits(save, fields, tmp_path):
    model, ids = remembering("qwen3", **fields), tokens(2, 11)
    exact = logits(model, ids)
    save(model, tmp_path)
    fresh = bare(model)
    assert not torch.equal(logits(fresh, ids), exact)
    config = load_adapter(fresh, tmp_path)
    assert config == model.model.layers[0].self_attn.delta_memory.config
    assert all(layer.delta_memory.config == config for _, layer in memory_layers(fresh))
    assert torch.equal(logits(fresh, ids), exact)
    attached = bare(model)
    attach_memory(attached, config)
    load_adapter(attached, tmp_path)
    assert torch.equal(logits(attached, ids), exact)


def test_weights_of_heads_that_are_not_corrected_stay_zero(tmp_path):
    """The authors' code saves weights for every projection, but uses only those of delta_heads."""
    model, ids = remembering(delta_heads=("o",)), tokens(1, 7)
    authors_file(model, tmp_path)
    weights = torch.load(tmp_path / "delta_mem_adapter.pt", weights_only=True)
    for name in weights:
        if name.endswith("delta_q_proj"):
            weights[name] = torch.randn_like(weights[name])
    torch.save(weights, tmp_path / "delta_mem_adapter.pt")
    fresh = bare(model)
    load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh, ids), logits(model, ids))
    assert not fresh.model.layers[0].self_attn.delta_memory.delta_q_proj.any()


def test_saving_again_replaces_the_files(tmp_path):
    first, second = remembering(), remembering()
    save_adapter(first, tmp_path)
    save_adapter(second, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [WEIGHTS, "delta_mem_config.json"]
    written = load_file(tmp_path / WEIGHTS)
    for name, layer in memory_layers(second):
        for n, p in layer.delta_memory.named_parameters():
            assert torch.equal(written[f"{name}.{n}"], p)
    with pytest.raises(ValueError, match="the model has no memory"):
        save_adapter(backbone(), tmp_path)


def shorten(folder, name=WEIGHTS) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def rewrite(change):
    def spoil(folder) -> None:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            metadata = file.metadata()
        weights = load_file(folder / WEIGHTS)
        change(weights, metadata)
        save_file(weights, folder / WEIGHTS, metadata)

    return spoil


def change_config(folder) -> None:
    path = folder / "delta_mem_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "alpha": 3.0}))


NAME = "model.layers.0.self_attn.beta_proj"
SPOILT = {
    "truncated": (shorten, ValueError, "not a complete safetensors file"),
    "empty": (lambda folder: (folder / WEIGHTS).write_bytes(b""), ValueError, "not a complete safetensors file"),
    "missing": (lambda folder: (folder / WEIGHTS).unlink(), FileNotFoundError, "no such file"),
    "no config": (lambda folder: (folder / "delta_mem_config.json").unlink(), FileNotFoundError, "delta_mem_config"),
    "foreign": (rewrite(lambda w, m: m.clear()), ValueError, "not a file of memory weights"),
    "other config": (change_config, ValueError, "saved with another configuration"),
    "lacking": (rewrite(lambda w, m: w.pop(NAME)), ValueError, f"it lacks {NAME}"),
    "surplus": (rewrite(lambda w, m: w.update(more=torch.zeros(1))), ValueError, "it also has more"),
    "size": (rewrite(lambda w, m: w.update({NAME: torch.zeros(8, 65)})), ValueError, r"got float32 \[8, 65\]"),
    "dtype": (rewrite(lambda w, m: w.update({NAME: torch.zeros(8, 64).int()})), ValueError, "must be a floating"),
}  # fmt: skip


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("kind", SPOILT)
def test_a_damaged_adapter_raises_and_changes_nothing(kind, attached, tmp_path):
    spoil, kind_of_error, message = SPOILT[kind]
    save_adapter(remembering(), tmp_path)
    spoil(tmp_path)
    unchanged(remembering() if attached else backbone(), tmp_path, kind_of_error, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04 nothing", "not a complete file of tensors"),
        (b"", "not a complete file of tensors"),
        (["a list"], "not a dict of tensors"),
        ({"a": 1}, "not a dict of tensors"),
        ({"a": torch.zeros(1)}, "it lacks"),
        (DeltaMemConfig(), "not a complete file of tensors"),  # code that weights_only does not run
    ],
    ids=str,
)
def test_a_file_of_another_kind_raises_and_changes_nothing(content, message, tmp_path):
    DeltaMemConfig().save(tmp_path)
    path = tmp_path / "delta_mem_adapter.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    unchanged(backbone(), tmp_path, ValueError, message)


def unchanged(model, folder, kind_of_error, message) -> None:
    ids = tokens(1, 6)
    before, names = logits(model, ids), [n for n, _ in model.named_modules()]
    with pytest.raises(kind_of_error, match=message):
        load_adapter(model, folder)
    assert [n for n, _ in model.named_modules()] == names
    assert torch.equal(logits(model, ids), before)


def test_an_adapter_of_another_model_raises(tmp_path):
    save_adapter(remembering(), tmp_path)
    unchanged(backbone(num_hidden_layers=3), tmp_path, ValueError, "it lacks model.layers.2")
    unchanged(remembering(rank=4), tmp_path, ValueError, "another configuration")


def test_a_saved_memory_continues_after_a_restart(tmp_path):
    model, ids = remembering(), tokens(2, 15)
    cache = DynamicCache(config=model.config)
    logits(model, ids, cache=cache)
    save_memory(get_memory(cache), tmp_path / "memory.safetensors")
    save_adapter(model, tmp_path)
    restarted = bare(model)
    load_adapter(restarted, tmp_path)
    generated = []
    for one, kept in ((model, get_memory(cache)), (restarted, load_memory(tmp_path / "memory.safetensors"))):
        fresh = DynamicCache(config=one.config)
        set_memory(one, fresh, kept)
        options = {"max_new_tokens": 8, "do_sample": False, cache_keyword(one): fresh}
        generated.append(one.generate(ids[:, :4], **options))
    assert torch.equal(*generated)
    assert sorted(p.name for p in tmp_path.iterdir()) == [WEIGHTS, "delta_mem_config.json", "memory.safetensors"]


@pytest.mark.parametrize(
    "prefix", [["_orig_mod"], ["module"], ["module", "_orig_mod"], ["base_model", "model"]], ids=".".join
)
def test_names_of_wrappers_are_not_in_the_file(prefix, tmp_path):
    """torch.compile, DistributedDataParallel and PEFT wrap a model in modules of these names."""
    model, ids = remembering(), tokens(1, 5)
    wrapped = model
    for name in reversed(prefix):
        inside, wrapped = wrapped, torch.nn.Module()
        wrapped.add_module(name, inside)
    save_adapter(wrapped, tmp_path)
    plain = bare(model)
    load_adapter(plain, tmp_path)
    assert torch.equal(logits(plain, ids), logits(model, ids))
    load_adapter(wrapped, tmp_path)


def test_other_serializers_keep_every_weight(tmp_path):
    """Those of safetensors and accelerate leave out tensors that share their storage with another one."""
    model = remembering()
    save_model(model, tmp_path / "whole.safetensors")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.zero_()
    load_model(other, tmp_path / "whole.safetensors")
    for name, weight in model.named_parameters():
        assert torch.equal(other.get_parameter(name), weight), name
    ids = tokens(1, 5)
    assert torch.equal(logits(other, ids), logits(model, ids))  # by the weights that are read too


def test_saving_no_states_raises(tmp_path):
    path = tmp_path / "memory.safetensors"
    save_memory({0: torch.zeros(1, 1, 8, 8)}, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="at least one layer, got none"):
        save_memory({}, path)
    assert path.read_bytes() == before
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path / 'no'}: no such folder$"):
        save_memory(load_memory(path), tmp_path / "no" / "memory.safetensors")
    with pytest.raises(TypeError, match="must be a Cache of transformers"):
        get_memory(remembering()(input_ids=tokens(1, 3)))


def test_a_pickled_cache_continues(tmp_path):
    model, ids = remembering(), tokens(2, 9)
    cache = DynamicCache(config=model.config)
    logits(model, ids[:, :6], cache=cache)
    torch.save(cache, tmp_path / "cache.pt")
    again = torch.load(tmp_path / "cache.pt", weights_only=False)
    assert type(again) is type(cache)
    assert torch.equal(logits(model, ids[:, 6:], cache=again), logits(model, ids[:, 6:], cache=cache))
    again.crop(-5)
    assert relative_error(logits(model, ids[:, 4:], cache=again), logits(model, ids)[:, 4:]) <= CLOSE


def test_damaged_states_raise(tmp_path):
    path, kept = tmp_path / "memory", {0: torch.randn(1, 1, 8, 8), 1: torch.randn(1, 1, 8, 8)}
    with pytest.raises(FileNotFoundError):
        load_memory(path)
    save_memory(kept, path)
    loaded = load_memory(path)
    assert loaded.keys() == kept.keys()
    assert all(torch.equal(kept[index], state) for index, state in loaded.items())
    shorten(tmp_path, "memory")
    with pytest.raises(ValueError, match="memory: not a complete safetensors file"):
        load_memory(path)
    for metadata, message in (
        ({}, "not a file of memory states: its format is None"),
        ({"format": "deltamem_kernels.states", "version": "2"}, "version must be '1', got '2'"),
    ):
        save_file({"layers.0": torch.zeros(1)}, path, metadata)
        with pytest.raises(ValueError, match=message):
            load_memory(path)
    with pytest.raises(TypeError, match="states must be a dict"):
        save_memory({"0": torch.zeros(1)}, path)
    save_memory({0: torch.randn(1, 1, 4, 4), 1: torch.randn(1, 1, 4, 4)}, path)
    model, cache = remembering(), DynamicCache()
    with pytest.raises(
        ValueError, match=r"states\[0\] must be float32 or float64 \[B, 1, 8, 8\], got float32 \[1, 1, 4, 4\]"
    ):
        set_memory(model, cache, load_memory(path))
    assert get_memory(cache) == {}


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "memory"
    save_memory({0: torch.ones(1)}, path)

    def half(tensors, name, metadata):
        with open(name, "wb") as file:
            file.write(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(states, "save_file", half)
    with pytest.raises(OSError, match="the disk is full"):
        save_memory({0: torch.zeros(1)}, path)
    assert torch.equal(load_memory(path)[0], torch.ones(1))
    assert [p.name for p in tmp_path.iterdir()] == ["memory"]


def test_a_failed_write_leaves_the_old_configuration(tmp_path, monkeypatch):
    DeltaMemConfig(rank=4).save(tmp_path)

    def half(path, text, encoding):
        path.write_bytes(text.encode()[:20])
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", half)
        with pytest.raises(OSError, match="the disk is full"):
            DeltaMemConfig().save(tmp_path)
        with pytest.raises(OSError, match="the disk is full"):
            save_adapter(remembering(), tmp_path)
    assert DeltaMemConfig.load(tmp_path).rank == 4
    assert [p.name for p in tmp_path.iterdir()] == ["delta_mem_config.json"]
