"""A memory attached to small random models of transformers."""

from __future__ import annotations

import copy

import pytest
import torch
from models import (
    ARCHITECTURES,
    CLOSE,
    MEMORIES,
    TRANSFORMERS_5,
    VOCABULARY,
    backbone,
    logits,
    one_thread,
    remembering,
    states_of,
    tokens,
)
from torch.nn.attention.flex_attention import create_block_mask
from transformers import (
    DynamicCache,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from deltamem_kernels.integrations.transformers import (
    MemoryCall,
    attach_memory,
    detach_memory,
    get_memory,
    memory_layers,
)
from deltamem_kernels.integrations.transformers.context import running
from deltamem_kernels.integrations.transformers.masks import token_mask
from deltamem_kernels.nn import DeltaMemConfig
from deltamem_kernels.testing import relative_error

__all__ = ["one_thread"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_fresh_memory_changes_no_logit(kind, attention):
    model, ids = backbone(kind, attention), tokens(2, 13)
    before = logits(model, ids)
    names = attach_memory(model, DeltaMemConfig())
    assert names == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert torch.equal(logits(model, ids), before)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{name}.delta_memory.{weight}"
        for name in names
        for weight in [
            "beta_proj",
            "beta_bias",
            *(f"memory_{n}_proj" for n in "qkv"),
            *(f"delta_{n}_proj" for n in "qkvo"),
        ]
    }


@pytest.mark.parametrize("fields", MEMORIES, ids=str)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_token_by_token_gives_what_one_call_gives(kind, fields):
    model, ids = remembering(kind, **fields), tokens(2, 12)
    whole = logits(model, ids, use_cache=False)
    changed = relative_error(whole, logits_without(model, ids))
    assert changed > 1e-2  # the memory has a say
    cache = DynamicCache(config=model.config)
    steps = [logits(model, part, cache=cache) for part in ids.split([5, *[1] * 6, 1], dim=1)]
    assert relative_error(torch.cat(steps, 1), whole) <= CLOSE
    with MemoryCall(model) as call:
        logits(model, ids, use_cache=False)
    for index, state in states_of(cache).items():
        assert state.dtype == torch.float32
        assert relative_error(state, call.states[index]) <= CLOSE


def logits_without(model, ids):
    model = copy.deepcopy(model)
    detach_memory(model)
    return logits(model, ids)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_padding_does_not_change_the_result(kind, attention):
    """Leading and trailing. A padded row gives the logits and the state that it gives alone."""
    model, lengths, longest = remembering(kind, attention), (5, 9, 12), 12
    for left in (True, False):
        rows = [tokens(1, n) for n in lengths]
        ids, mask = torch.zeros(3, longest, dtype=torch.long), torch.zeros(3, longest, dtype=torch.long)
        places = [slice(longest - n, None) if left else slice(0, n) for n in lengths]
        for b, (row, place) in enumerate(zip(rows, places, strict=True)):
            ids[b, place], mask[b, place] = row[0], 1
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        cache = DynamicCache(config=model.config)
        batch = logits(model, ids, attention_mask=mask, position_ids=positions, cache=cache)
        for b, (row, place) in enumerate(zip(rows, places, strict=True)):
            alone = DynamicCache(config=model.config)
            assert relative_error(batch[b, place], logits(model, row, cache=alone)[0]) <= CLOSE
            for index, state in states_of(alone).items():
                assert relative_error(get_memory(cache)[index][b], state[0]) <= CLOSE


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_masks_of_four_dimensions_give_what_unpadded_rows_give(kind):
    """Boolean and additive masks, as a caller may give them."""
    model, ids = remembering(kind), tokens(2, 8)
    real = torch.arange(8)[None] >= torch.tensor([[0], [3]])
    allowed = torch.ones(8, 8).tril().bool() & real[:, None, :]
    boolean = (allowed | torch.eye(8).bool() & real[:, :, None])[:, None]
    additive = torch.zeros(boolean.shape).masked_fill(~boolean, torch.finfo(torch.float32).min)
    positions = (real.long().cumsum(1) - 1).clamp_min(0)
    exact = logits(model, ids[1:, 3:])[0]
    for mask in (boolean, additive):
        assert relative_error(logits(model, ids, attention_mask=mask, position_ids=positions)[1, 3:], exact) <= CLOSE


def test_flex_attention_gives_what_sdpa_gives():
    """The batch is padded, and flex attention's mask is a program."""
    model, ids, mask = remembering(attention="flex_attention"), tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    flex = logits(model, ids, **given)
    model.set_attn_implementation("sdpa")
    exact = logits(model, ids, **given)
    assert relative_error(flex[mask.bool()], exact[mask.bool()]) <= CLOSE


def test_a_block_mask_after_a_cache_masks_its_tokens():
    real = torch.tensor([[True] * 6, [False] * 4 + [True] * 2])
    block = create_block_mask(lambda b, h, q, k: (k <= q + 3) & real[b, k], 2, None, 3, 6, device="cpu", BLOCK_SIZE=2)
    assert token_mask(block, 2, 3, 3).tolist() == [[True] * 3, [False, True, True]]


def test_every_kind_of_attention_mask_masks_its_tokens():
    row = torch.tensor([[0, 1, 1, 1]])
    assert token_mask(None, 1, 2, 0) is None
    assert token_mask(row, 1, 4, 0).tolist() == [[False, True, True, True]]
    assert token_mask(row, 1, 1, 3).tolist() == [[True]]
    static = torch.zeros(1, 1, 2, 9, dtype=torch.bool)  # of nine places three are taken, the tokens come to 3 and 4
    static[0, 0, 1, 4] = True
    assert token_mask(static, 2, 2, torch.tensor(3)).tolist() == [[False, True]] * 2
    window = torch.tensor([[[[0.0, -1e9, 0.0]]]]).masked_fill(torch.tensor([True, False, False]), float("-inf"))
    assert token_mask(window, 1, 1, 50).tolist() == [[True]]
    rolled = torch.tensor([[[[0, 0, 1, 0], [0, 0, 0, 0]]]]).bool()  # two tokens after two that are kept
    assert token_mask(rolled, 1, 2, 50).tolist() == [[True, False]]
    for bad in (torch.zeros(2, 4), torch.zeros(1, 3), torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 4)):
        with pytest.raises(ValueError, match="attention_mask must have shape"):
            token_mask(bad, 1, 4, 0)
    with pytest.raises(TypeError, match=r"attention_mask must be a tensor, a BlockMask or None.*got dict"):
        token_mask({}, 1, 4, 0)
    with pytest.raises(TypeError, match=r"bool or floating, got torch\.int64"):
        token_mask(torch.zeros(1, 1, 4, 4).long(), 1, 4, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_memory_is_float32_with_a_backbone_of_16_bits(dtype):
    model, ids = backbone("qwen3").to(dtype), tokens(2, 9)
    before = logits(model, ids)
    attach_memory(model, DeltaMemConfig(output_init="random"))
    memory = model.model.layers[0].self_attn.delta_memory
    assert {p.dtype for p in memory.parameters()} == {torch.float32}
    cache = DynamicCache(config=model.config)
    after = logits(model, ids, cache=cache)
    assert after.dtype == dtype
    assert not torch.equal(after, before)
    assert {state.dtype for state in states_of(cache).values()} == {torch.float32}


class Quantised(torch.nn.Module):
    """A linear layer with its weight in bytes, as in a quantised backbone."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.abs().max() / 127
        weight = (linear.weight / self.scale).round() + 128
        self.weight = torch.nn.Parameter(weight.to(torch.uint8), requires_grad=False)

    def forward(self, x):
        return x @ ((self.weight.to(x.dtype) - 128) * self.scale).T


def in_bytes(model):
    for layer in model.model.layers:
        for head in ("q", "k", "v", "o"):
            name = f"{head}_proj"
            setattr(layer.self_attn, name, Quantised(getattr(layer.self_attn, name)))
    return model


def in_int8(model):
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)


@pytest.mark.parametrize("quantised", [in_bytes, in_int8])
def test_a_quantised_backbone_is_corrected_and_restored(quantised):
    """The memory has a dtype of its own, and corrects as it does without quantisation."""
    model, ids = quantised(backbone()), tokens(2, 9)
    before = logits(model, ids)
    attach_memory(model, DeltaMemConfig(output_init="random"))
    for _, layer in memory_layers(model):
        assert {p.dtype for p in layer.delta_memory.parameters()} == {torch.float32}
    cache = DynamicCache(config=model.config)
    steps = [logits(model, part, cache=cache) for part in ids.split([4, *[1] * 5], dim=1)]
    assert relative_error(torch.cat(steps, 1), before) > 1e-3
    assert {state.dtype for state in states_of(cache).values()} == {torch.float32}
    attention = model.model.layers[0].self_attn
    x, outputs = torch.randn(1, 3, 64), []
    attention.k_proj.register_forward_hook(lambda m, a, output: outputs.append(output.clone()))
    with torch.no_grad():
        attention(x, (torch.ones(1, 3, 16), torch.zeros(1, 3, 16)), None)
        reads = attention.delta_memory.read(x).reads
        assert relative_error(outputs[0], attention.delta_memory.correct(attention.k_proj(x), reads, "k")) <= 1e-5
    detach_memory(model)
    with pytest.raises(ValueError, match="must be the floating weight"):
        attach_memory(model, DeltaMemConfig(output_init="base_slice"))
    assert torch.equal(logits(model, ids), before)


def test_only_the_text_layers_of_a_vision_language_model_have_a_memory():
    """The attention of the vision tower has the same name and another shape. It is not changed."""
    text = {"model_type": "llama", **backbone().config.to_diff_dict(), "vocab_size": VOCABULARY}
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = SmolVLMConfig(
        text_config=text,
        vision_config={**vision, "image_size": 32, "patch_size": 8},
        image_token_id=VOCABULARY - 1,
        scale_factor=2,
    )
    model = SmolVLMForConditionalGeneration(config).eval().requires_grad_(False)
    ids, pixels = tokens(1, 14).clamp(max=VOCABULARY - 2), torch.randn(1, 1, 3, 32, 32)
    ids[0, 3:7] = VOCABULARY - 1
    before = logits(model, ids, pixel_values=pixels)
    names = attach_memory(model, DeltaMemConfig())
    assert names == [f"model.text_model.layers.{index}.self_attn" for index in (0, 1)]
    assert torch.equal(logits(model, ids, pixel_values=pixels), before)
    for _, layer in memory_layers(model):
        torch.nn.init.normal_(layer.delta_memory.delta_q_proj)
    whole = logits(model, ids, pixel_values=pixels, use_cache=False)
    assert relative_error(whole, before) > 1e-2
    cache = DynamicCache(config=model.config)
    parts = [logits(model, ids[:, :9], pixel_values=pixels, cache=cache)]
    parts += [logits(model, part, cache=cache) for part in ids[:, 9:].split(1, dim=1)]
    assert relative_error(torch.cat(parts, 1), whole) <= CLOSE


def test_the_text_layers_of_qwen2_vl_have_a_memory():
    """Its positions have three dimensions."""
    rope = "rope_parameters" if TRANSFORMERS_5 else "rope_scaling"
    text = {
        **backbone("qwen2").config.to_diff_dict(),
        rope: {"rope_type": "default", "mrope_section": [2, 3, 3]},
    }
    vision = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "patch_size": 4, "temporal_patch_size": 1}
    ends = {"image_token_id": 96, "vision_start_token_id": 97, "vision_end_token_id": 98}
    config = Qwen2VLConfig(text_config={**text, "model_type": "qwen2_vl_text"}, vision_config=vision, **ends)
    model = Qwen2VLForConditionalGeneration(config).eval().requires_grad_(False)
    ids = tokens(1, 14).clamp(max=95)
    ids[0, 2:8] = torch.tensor([97, 96, 96, 96, 96, 98])  # 16 patches, of which four make a token
    image = {"pixel_values": torch.randn(16, 3 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    if TRANSFORMERS_5:  # before, the model finds its image tokens by their id
        image["mm_token_type_ids"] = (ids == 96).int()
    before = logits(model, ids, **image)
    assert attach_memory(model, DeltaMemConfig()) == [f"model.language_model.layers.{i}.self_attn" for i in (0, 1)]
    assert torch.equal(logits(model, ids, **image), before)
    for _, layer in memory_layers(model):
        torch.nn.init.normal_(layer.delta_memory.delta_q_proj)
    whole = logits(model, ids, **image, use_cache=False)
    assert relative_error(whole, before) > 1e-2
    usual = {"do_sample": False, "eos_token_id": VOCABULARY, "suppress_tokens": [96, 97, 98], **image}  # no other image
    new = model.generate(ids, max_new_tokens=4, **usual)
    plain = model.generate(ids, max_new_tokens=4, **usual, use_cache=False)
    assert torch.equal(new, plain)


def test_a_compiled_model_gives_what_the_model_gives():
    model, ids = remembering(), tokens(2, 9)
    exact, compiled = logits(model, ids), torch.compile(model, backend="aot_eager")
    cache = DynamicCache(config=model.config)
    ours = [logits(compiled, part, cache=cache) for part in ids.split([6, 1, 1, 1], dim=1)]
    assert relative_error(torch.cat(ours, 1), exact) <= CLOSE


def test_detaching_leaves_the_model_as_it_was():
    model, ids = backbone(), tokens(2, 6)
    before, names = logits(model, ids), [n for n, _ in model.named_modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    attach_memory(model, DeltaMemConfig(output_init="random"))
    assert not torch.equal(logits(model, ids), before)
    detach_memory(model)
    assert torch.equal(logits(model, ids), before)
    assert [n for n, _ in model.named_modules()] == names
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    attach_memory(model, DeltaMemConfig(target_layers=(1,)))
    assert [name for name, _ in memory_layers(model)] == ["model.layers.1.self_attn"]


def test_after_an_error_the_memory_is_as_it_was():
    model, ids = remembering(), tokens(2, 6)
    cache = DynamicCache(config=model.config)
    logits(model, ids, cache=cache)
    before = states_of(cache)
    broken = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model, ids, cache=cache)
    broken.remove()
    assert all(get_memory(cache)[index] is state for index, state in before.items())
    assert running.layer_call is None
    assert running.context is None


class Odd(torch.nn.Module):
    """A model with one layer whose attention module does not fit."""

    def __init__(self, **parts) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Module()])
        self.layers[0].self_attn = torch.nn.Module()
        for name, part in parts.items():
            setattr(self.layers[0].self_attn, name, part)


LINEARS = {f"{head}_proj": torch.nn.Linear(2, 2) for head in "qkvo"}


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (lambda: Odd(), {}, r"does not fit: layers.0.self_attn \(Module\) has no layer_idx"),
        (lambda: Odd(layer_idx=0, q_proj=torch.nn.Linear(2, 2)), {}, "has no k_proj"),
        (lambda: Odd(layer_idx=0, q_proj=torch.nn.Identity()), {}, r"has a q_proj \(Identity\) without in_features"),
        (lambda: Odd(layer_idx=0, **LINEARS), {}, "does not take cache or past_key_values, which holds the states"),
        (lambda: backbone().to("meta"), {}, "layers.0.self_attn is on the meta device"),
        (backbone, {"target_modules": ("attn",)}, "target_modules: the model has no module named attn"),
        (backbone, {"target_layers": (1, 7)}, r"target_layers must be among the layers \[0, 1\], got \[7\]"),
        (remembering, {}, "already has a memory"),
        (
            lambda: T5ForConditionalGeneration(T5Config(d_model=8, d_ff=8, num_layers=1)),
            {},
            "must be a decoder, got an encoder-decoder",
        ),
    ],
)
def test_models_that_do_not_fit_raise(model, config, message):
    with pytest.raises(ValueError, match=message):
        attach_memory(model(), DeltaMemConfig(**config))


@pytest.mark.parametrize("heads", [("q", "o"), ()])
@torch.no_grad()
def test_a_replaced_projection_is_corrected(heads):
    """PEFT replaces projections by modules that contain them."""
    model, ids = remembering(delta_heads=heads), tokens(1, 5)
    before, attention = logits(model, ids), model.model.layers[1].self_attn
    attention.v_proj = torch.nn.Sequential(attention.v_proj)
    attention.q_proj = torch.nn.Sequential(attention.q_proj)
    assert torch.equal(logits(model, ids), before)
    attention.o_proj = copy.deepcopy(attention.o_proj)
    assert torch.equal(logits(model, ids), before)
    attention.q_proj[0].weight.mul_(2)
    doubled = logits_without(model, ids)
    detach_memory(model)
    assert torch.equal(logits(model, ids), doubled)


def test_a_projection_that_is_not_called_raises():
    model, ids = remembering(), tokens(1, 5)
    attention = model.model.layers[1].self_attn
    attention.q_proj.forward = attention.q_proj.original_class.forward.__get__(attention.q_proj)
    with pytest.raises(RuntimeError, match=r"q_proj of layer 1 was not called, .* leave 'q' out of delta_heads"):
        logits(model, ids)
