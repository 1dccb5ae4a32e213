"""A memory together with PEFT's LoRA, before and after `attach_memory`."""

from __future__ import annotations

import copy

import pytest
import torch
from models import CLOSE, VOCABULARY, backbone, logits, one_thread, states_of, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import DynamicCache, Trainer, TrainingArguments

from deltamem_kernels.integrations.transformers import (
    MemoryCall,
    MemoryCheckpoint,
    attach_memory,
    detach_memory,
    load_adapter,
    memory_layers,
    save_adapter,
)
from deltamem_kernels.nn import DeltaMemConfig
from deltamem_kernels.testing import relative_error

__all__ = ["one_thread"]

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
MEMORY = DeltaMemConfig(delta_heads=("q", "k", "v", "o"))


def lora(**more) -> LoraConfig:
    return LoraConfig(r=4, target_modules=PROJECTIONS, init_lora_weights=False, task_type="CAUSAL_LM", **more)


def lora_and_memory(order: str):
    """Return a backbone, and a copy of it with random LoRA weights and a random memory."""
    plain = backbone()
    model = copy.deepcopy(plain)
    if order == "LoRA before the memory":
        model = get_peft_model(model, lora())
        attach_memory(model, MEMORY)
    elif order == "LoRA after the memory":
        attach_memory(model, MEMORY)
        model = get_peft_model(model, lora())
    else:
        attach_memory(model, MEMORY)
        model = get_peft_model(model, lora(modules_to_save=["delta_memory"]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".delta_memory." in name and "delta_scale" not in name:
                weight.add_(torch.randn_like(weight) * 0.1)
    return plain, model.eval()


def memory_weights(model):
    """Return the weights of the memory in use, under the names that they have without PEFT."""
    return {
        name.replace("base_model.model.", "").replace("modules_to_save.default.", ""): weight
        for name, weight in model.named_parameters()
        if ".delta_memory." in name and ".original_module." not in name
    }


ORDERS = ["LoRA before the memory", "LoRA after the memory", "the memory in modules_to_save"]
orders = pytest.mark.parametrize("order", ORDERS)


def by_hand(plain, model, folder):
    """Add LoRA's products to the backbone's weights, then attach the same memory."""
    expected = copy.deepcopy(plain)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, module in expected.named_modules():
            if name.rpartition(".")[2] in PROJECTIONS:
                adapted = modules[f"base_model.model.{name}"]
                product = adapted.lora_B["default"].weight @ adapted.lora_A["default"].weight
                module.weight += adapted.scaling["default"] * product
    without_memory = copy.deepcopy(expected)
    save_adapter(model, folder)
    load_adapter(expected, folder)
    return expected, without_memory


@orders
def test_logits_are_those_of_merged_weights_with_the_same_memory(order, tmp_path):
    plain, model = lora_and_memory(order)
    expected, without_memory = by_hand(plain, model, tmp_path)
    ids = tokens(2, 12)
    found, wanted = logits(model, ids), logits(expected, ids)
    assert relative_error(found, wanted) <= CLOSE
    assert relative_error(logits(without_memory, ids), wanted) > 100 * CLOSE
    assert relative_error(logits(plain, ids), logits(without_memory, ids)) > 100 * CLOSE
    cache = DynamicCache(config=plain.config)
    parts = [logits(model, part, past_key_values=cache) for part in (ids[:, :7], *ids[:, 7:].split(1, 1))]
    assert relative_error(torch.cat(parts, 1), wanted) <= CLOSE
    assert states_of(cache).keys() == {0, 1}


@orders
def test_gradients_reach_lora_and_the_memory(order, tmp_path):
    plain, model = lora_and_memory(order)
    expected, _ = by_hand(plain, model, tmp_path)
    for weight in memory_weights(model).values():
        weight.requires_grad_(True)
    ids = tokens(2, 12)
    for each in (model, expected):
        each.train()
        each(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    wanted, found = ({name: p.grad for name, p in memory_weights(each).items()} for each in (expected, model))
    assert found.keys() == wanted.keys()
    compared = [name for name, gradient in wanted.items() if gradient is not None and gradient.any()]
    assert len(compared) >= 2 * len(PROJECTIONS)
    for name in compared:
        assert relative_error(found[name], wanted[name]) <= CLOSE, name
    adapted = [p.grad for n, p in model.named_parameters() if "lora_" in n]
    assert len(adapted) == 2 * 2 * len(PROJECTIONS)
    assert all(gradient.any() for gradient in adapted)


@orders
def test_memory_call_sees_the_memory(order):
    _, model = lora_and_memory(order)
    ids = tokens(2, 12)
    with MemoryCall(model) as call:
        logits(model, ids[:, :7])
    assert len(call.states) == 2
    assert all(state.any() for state in call.states.values())
    with MemoryCall(model, call.states):
        continued = logits(model, ids[:, 7:])
    assert relative_error(logits(model, ids[:, 7:]), continued) > 100 * CLOSE


@orders
def test_attaching_twice_raises(order):
    _, model = lora_and_memory(order)
    with pytest.raises(ValueError, match="already has a memory"):
        attach_memory(model, MEMORY)


@orders
def test_detaching_leaves_lora(order, tmp_path):
    plain, model = lora_and_memory(order)
    _, without_memory = by_hand(plain, model, tmp_path)
    ids = tokens(2, 12)
    detach_memory(model)
    assert not memory_layers(model)
    assert relative_error(logits(model, ids), logits(without_memory, ids)) <= CLOSE


@pytest.mark.parametrize("order", ORDERS[:2])
def test_both_adapters_are_saved_and_loaded(order, tmp_path):
    plain, model = lora_and_memory(order)
    model.save_pretrained(tmp_path / "lora")
    save_adapter(model, tmp_path / "memory")
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "lora").eval()
    load_adapter(loaded, tmp_path / "memory")
    ids = tokens(2, 12)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_peft_saves_and_loads_a_memory_in_modules_to_save(tmp_path):
    plain, model = lora_and_memory(ORDERS[2])
    model.save_pretrained(tmp_path)
    loaded = copy.deepcopy(plain)
    attach_memory(loaded, MEMORY)
    loaded = PeftModel.from_pretrained(loaded, tmp_path).eval()
    ids = tokens(2, 12)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


@pytest.mark.slow
@orders
def test_the_trainer_checkpoints_and_resumes_both(order, tmp_path):
    _, model = lora_and_memory(order)
    for weight in memory_weights(model).values():
        weight.requires_grad_(True)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(2, VOCABULARY, (8, 12))]
    stopped, fresh = copy.deepcopy(model), copy.deepcopy(model)

    def train(each, folder, steps, **options):
        args = TrainingArguments(
            output_dir=str(tmp_path / folder),
            max_steps=steps,
            save_steps=2,
            lr_scheduler_type="constant",
            learning_rate=1e-2,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            **options,
        )
        return Trainer(each, args, train_dataset=rows, eval_dataset=rows, callbacks=[MemoryCheckpoint()])

    train(model, "whole", 4, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True).train()
    train(stopped, "parts", 2).train()
    train(fresh, "parts", 4).train(resume_from_checkpoint=True)
    trained = [name for name, _ in model.named_parameters() if "lora_" in name or "delta_memory" in name]
    assert trained
    assert all(torch.equal(fresh.state_dict()[name], model.state_dict()[name]) for name in trained)
    assert any(not torch.equal(stopped.state_dict()[name], model.state_dict()[name]) for name in trained)


@pytest.mark.slow
def test_the_best_weights_of_a_peft_model_are_loaded_at_the_end(tmp_path):
    _, model = lora_and_memory(ORDERS[0])
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(2, VOCABULARY, (8, 12))]

    scores = iter([2.0, 1.0])  # the first checkpoint is the best
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    data = {"train_dataset": rows, "eval_dataset": rows, "compute_metrics": lambda _: {"score": next(scores)}}
    run = Trainer(model, args, **data, callbacks=[MemoryCheckpoint()])
    run.train()
    assert run.state.best_global_step == 1
    best, last = (load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in (1, 2))
    assert any(not torch.equal(last[name], weight) for name, weight in best.items())
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in best.items())
