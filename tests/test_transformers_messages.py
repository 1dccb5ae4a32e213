"""Messages for what users of the transformers integration get wrong: they name what came and what is wanted."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from models import backbone, logits, one_thread, remembering, tokens  # noqa: F401
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from deltamem_kernels.integrations.transformers import (
    attach_memory,
    get_memory,
    load_adapter,
    memory_layers,
    save_adapter,
    save_memory,
    set_memory,
)
from deltamem_kernels.integrations.transformers.layers import check_model
from deltamem_kernels.nn import DeltaMemConfig

SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize("call", [attach_memory, check_model])
def test_a_name_instead_of_a_model_raises(call):
    with pytest.raises(
        TypeError, match=r"model must be a loaded transformers model .*, got str 'Qwen/Qwen3-4B': load it first"
    ):
        call("Qwen/Qwen3-4B", DeltaMemConfig())


@pytest.mark.parametrize("call", [attach_memory, check_model])
def test_swapped_arguments_raise(call):
    with pytest.raises(TypeError, match="got a DeltaMemConfig: the model is the first argument, the configuration the"):
        call(DeltaMemConfig(), backbone())


@pytest.mark.parametrize("call", [attach_memory, check_model])
@pytest.mark.parametrize("config", [None, {"rank": 8}, "config.json"], ids=repr)
def test_something_else_instead_of_a_configuration_raises(call, config):
    model = backbone()
    with pytest.raises(TypeError, match=f"^config must be a DeltaMemConfig, got {type(config).__name__} "):
        call(model, config)
    assert memory_layers(model) == []


def test_adapters_want_a_model(tmp_path):
    save_adapter(remembering(), tmp_path)
    for call in (lambda: load_adapter("model", tmp_path), lambda: save_adapter("model", tmp_path)):
        with pytest.raises(TypeError, match=r"model must be a loaded transformers model .*, got str 'model'"):
            call()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=99)),
            r"no module named self_attn, with q_proj, k_proj, v_proj, o_proj and layer_idx\. Its attention seems to be "
            r"transformer\.h\.0\.attn \(GPT2Attention\), which has c_attn, c_proj",
        ),
        (
            lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=32)),
            r"no module named self_attn, .* gpt_neox\.layers\.0\.attention \(GPTNeoXAttention\), which has query_key",
        ),
        (
            lambda: Phi3ForCausalLM(Phi3Config(**SIZES, **SPECIAL, intermediate_size=32)),
            r"model\.layers\.0\.self_attn \(Phi3Attention\) has no q_proj, only o_proj, qkv_proj\. A memory needs "
            r"q_proj, k_proj, v_proj, o_proj and layer_idx",
        ),
        (
            lambda: torch.nn.Linear(2, 2),
            "no module named self_attn, with q_proj, k_proj, v_proj, o_proj and layer_idx$",
        ),
    ],
    ids=["gpt2", "gpt-neox", "phi3", "no attention"],
)
def test_a_model_that_does_not_fit_raises_with_what_was_found(build, message):
    model = build()
    with pytest.raises(ValueError, match=message):
        attach_memory(model, DeltaMemConfig())
    assert memory_layers(model) == []


def test_states_for_a_model_without_a_memory_raise():
    model, cache = backbone(), DynamicCache()
    with pytest.raises(ValueError, match=r"^the model has no memory: call attach_memory or load_adapter first$"):
        set_memory(model, cache, {0: torch.zeros(1, 1, 8, 8)})
    assert get_memory(cache) == {}


def test_a_cache_instead_of_its_states_raises(tmp_path):
    model, cache = remembering(), DynamicCache()
    logits(model, tokens(1, 5), cache=cache)
    message = (
        r"states must be a dict from layer indices to tensors, as get_memory\(cache\) returns it, got DynamicCache"
    )
    with pytest.raises(TypeError, match=message):
        save_memory(cache, tmp_path / "memory")
    with pytest.raises(TypeError, match=message):
        set_memory(model, DynamicCache(), cache)
    with pytest.raises(TypeError, match=r"dict from layer indices to tensors, got the key 'a' with float32 \[1\]"):
        save_memory({"a": torch.zeros(1)}, tmp_path / "memory")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["transformers", "safetensors"])
def test_a_missing_extra_is_named(missing, monkeypatch):
    package = "deltamem_kernels.integrations.transformers"
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.startswith(f"{missing}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    message = rf"{package} needs {missing}, which is not installed: pip install 'deltamem_kernels\[transformers\]'"
    with pytest.raises(ModuleNotFoundError, match=message) as caught:
        importlib.import_module(package)
    assert caught.value.name == missing
