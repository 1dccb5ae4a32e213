"""Where adapters come from: a folder, or the cache of the Hugging Face Hub. What does not hold one raises."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import huggingface_hub
import pytest
import torch
from models import backbone, logits, one_thread, remembering, tokens  # noqa: F401
from safetensors import safe_open

from deltamem_kernels.integrations.transformers import (
    adapter,
    load_adapter,
    load_memory,
    memory_layers,
    save_adapter,
    save_memory,
)
from deltamem_kernels.nn import DeltaMemConfig

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "fedcba9876543210fedcba9876543210fedcba98"


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty cache of the Hub, without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def cache_adapter(hub: Path, model, name: str, commit: str = COMMIT, revision: str = "main") -> None:
    """Lay out an adapter as the Hub's cache does: blobs, snapshots of links to them, and a commit for each revision."""
    storage = hub / f"models--{name.replace('/', '--')}"
    snapshot = storage / "snapshots" / commit
    for folder in (storage / "refs", storage / "blobs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    save_adapter(model, snapshot)
    for number, file in enumerate(sorted(snapshot.iterdir())):
        blob = storage / "blobs" / f"{commit[:8]}{number}"
        file.rename(blob)
        file.symlink_to(os.path.relpath(blob, snapshot))
    (storage / "refs" / revision).write_text(commit)


def assert_loads(model, expected, source, **options) -> None:
    ids = tokens(1, 7)
    assert not torch.equal(logits(model, ids), logits(expected, ids))
    config = load_adapter(model, source, **options)
    assert config == memory_layers(expected)[0][1].delta_memory.config
    assert torch.equal(logits(model, ids), logits(expected, ids))


def like(model):
    """Return a model with the same backbone and no memory."""
    bare = backbone()
    bare.load_state_dict({n: w for n, w in model.state_dict().items() if ".delta_memory." not in n})
    return bare


def test_an_adapter_is_loaded_from_the_cache_of_the_hub(hub):
    model = remembering(rank=4)
    cache_adapter(hub, model, "someone/memory")
    assert_loads(like(model), model, "someone/memory")


def test_the_revision_chooses_a_branch_a_tag_or_a_commit(hub):
    first, second = remembering(), remembering()
    cache_adapter(hub, first, "someone/memory")
    cache_adapter(hub, second, "someone/memory", OTHER_COMMIT, "v2")
    assert_loads(like(first), first, "someone/memory")
    assert_loads(like(second), second, "someone/memory", revision="v2")
    assert_loads(like(second), second, "someone/memory", revision=OTHER_COMMIT)
    with pytest.raises(FileNotFoundError, match=r"someone/memory: .*\(revision v3\)"):
        load_adapter(like(first), "someone/memory", revision="v3")


def test_a_folder_of_the_same_name_is_preferred(hub):
    local, cached = remembering(), remembering()
    cache_adapter(hub, cached, "someone/memory")
    save_adapter(local, "someone/memory")
    assert_loads(like(local), local, "someone/memory")
    with pytest.raises(ValueError, match="revision must be None for a local folder, got 'main' with someone/memory"):
        load_adapter(like(local), "someone/memory", revision="main")


def test_only_the_files_of_an_adapter_are_downloaded(tmp_path, monkeypatch):
    model, asked = remembering(), []
    save_adapter(model, tmp_path)

    def download(name, **options):
        asked.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr(adapter, "snapshot_download", download)
    assert_loads(like(model), model, "someone/memory", revision="v2")
    files = ["delta_mem_config.json", "delta_mem_adapter.safetensors", "delta_mem_adapter.pt"]
    assert asked == [("someone/memory", {"revision": "v2", "allow_patterns": files})]


def test_an_adapter_that_is_not_in_the_cache_raises_without_a_network(hub):
    model = backbone()
    with pytest.raises(FileNotFoundError, match="someone/memory: no such folder, and it could not be loaded from the"):
        load_adapter(model, "someone/memory")
    with pytest.raises(FileNotFoundError, match=r"a--b/c: no such folder, and .* Cannot have -- or \.\."):
        load_adapter(model, "a--b/c")
    assert memory_layers(model) == []


def test_an_incomplete_adapter_in_the_cache_names_the_missing_file(hub):
    cache_adapter(hub, remembering(), "someone/memory")
    snapshot = hub / "models--someone--memory" / "snapshots" / COMMIT
    (snapshot / "delta_mem_adapter.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"delta_mem_adapter\.safetensors: no such file"):
        load_adapter(backbone(), "someone/memory")


@pytest.mark.parametrize(
    "source", ["missing", "./some/folder", "a/b/c", Path("someone/memory"), "/no/folder", "someone/"], ids=repr
)
def test_a_missing_folder_that_is_no_name_on_the_hub_raises(source, hub):
    cache_adapter(hub, remembering(), "someone/memory")
    with pytest.raises(FileNotFoundError, match=f"^{Path(source)}: no such folder$"):
        load_adapter(backbone(), source)


def test_a_file_instead_of_a_folder_raises(tmp_path):
    save_adapter(remembering(), tmp_path)
    for name in ("delta_mem_adapter.safetensors", "delta_mem_config.json"):
        message = f"^{tmp_path / name}: must be the folder that holds delta_mem_config.json, got a file$"
        with pytest.raises(NotADirectoryError, match=message):
            load_adapter(backbone(), str(tmp_path / name))


class Creates:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("write", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))])
@pytest.mark.parametrize("wrap", [lambda thing: thing, lambda thing: {"a.beta_proj": thing, "b": torch.zeros(1)}])
def test_code_in_an_adapter_is_not_run(write, wrap, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # applies to calls of torch.load that do not choose
    created = tmp_path / "created"
    DeltaMemConfig().save(tmp_path)
    write(wrap(Creates(created)), tmp_path / "delta_mem_adapter.pt")
    model = backbone()
    with pytest.raises(ValueError, match=r"delta_mem_adapter\.pt: not a complete file of tensors"):
        load_adapter(model, tmp_path)
    assert not created.exists()
    assert memory_layers(model) == []
    pickle.loads(pickle.dumps(Creates(created)))  # the pickle does what it says
    assert created.exists()


# Tensors that share their storage


def test_states_that_share_their_storage_are_saved_in_full(tmp_path):
    one, many = torch.randn(2, 1, 8, 8), torch.randn(3, 2, 1, 8, 8)
    states = {0: one, 1: one, 2: many[0], 3: many[1], 4: many[1:].flatten(0, 1)[:2], 5: many.mT[2], 6: one[:1]}
    save_memory(states, tmp_path / "memory")
    loaded = load_memory(tmp_path / "memory")
    assert loaded.keys() == states.keys()
    for index, state in states.items():
        assert torch.equal(loaded[index], state), index
    storages = {state.untyped_storage().data_ptr() for state in loaded.values()}
    assert len(storages) == len(states)


@pytest.mark.parametrize("sharing", ["one parameter", "views", "across layers"])
def test_an_adapter_of_tied_weights_is_saved_in_full(sharing, tmp_path):
    model = remembering()
    first, second = (layer.delta_memory for _, layer in memory_layers(model))
    if sharing == "one parameter":
        first.memory_k_proj = first.memory_q_proj
    elif sharing == "views":
        both = torch.randn(16, 64)
        first.memory_q_proj, first.memory_k_proj = (torch.nn.Parameter(x) for x in (both[:8], both[4:12]))
    else:
        second.memory_v_proj = first.memory_v_proj
    save_adapter(model, tmp_path)
    with safe_open(tmp_path / "delta_mem_adapter.safetensors", framework="pt") as file:
        for name, layer in memory_layers(model):
            for key, weight in layer.delta_memory.named_parameters(remove_duplicate=False):
                assert torch.equal(file.get_tensor(f"{name}.{key}"), weight), key
    assert_loads(like(model), model, tmp_path)
    load_adapter(model, tmp_path)
