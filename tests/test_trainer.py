"""`MemoryCheckpoint` in transformers' Trainer."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from models import VOCABULARY, backbone, one_thread, remembering
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from deltamem_kernels.integrations.transformers import MemoryCheckpoint, attach_memory, load_adapter, memory_layers
from deltamem_kernels.nn import DeltaMemConfig

__all__ = ["one_thread"]
pytestmark = pytest.mark.slow


@pytest.fixture
def data():
    """Rows whose second half repeats the first."""
    half = torch.randint(2, VOCABULARY, (16, 8))
    return [{"input_ids": row, "labels": row} for row in torch.cat([half, half], 1)]


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


class SpoilMemory(TrainerCallback):
    """Make the memory random after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                for _, attention in memory_layers(model):
                    for weight in attention.delta_memory.parameters():
                        weight.normal_(std=10.0)


class Losses(TrainerCallback):
    def __init__(self):
        self.found = {}

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.found[state.global_step] = logs["loss"]


def trainer(model, folder, data, *callbacks, **options):
    fields = {
        "max_steps": 12,
        "save_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-2,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        **options,
    }
    args = TrainingArguments(output_dir=str(folder), **fields)
    return Trainer(model, args, train_dataset=data, eval_dataset=data, callbacks=[MemoryCheckpoint(), *callbacks])


def weights(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def random_model():
    """Dropout makes the random numbers matter."""
    return remembering(backbone_fields={"attention_dropout": 0.2})


def test_a_resumed_training_equals_an_uninterrupted_one_bit_for_bit(tmp_path, data):
    model, losses, resumed_losses = random_model(), Losses(), Losses()
    untrained = copy.deepcopy(model)
    stopped, fresh = copy.deepcopy(model), copy.deepcopy(model)
    trainer(model, tmp_path / "whole", data, losses).train()
    trainer(stopped, tmp_path / "parts", data, Stop(6)).train()
    with torch.no_grad():
        for _, attention in memory_layers(fresh):
            for weight in attention.delta_memory.parameters():
                weight.normal_()
    trainer(fresh, tmp_path / "parts", data, resumed_losses).train(resume_from_checkpoint=True)
    assert min(resumed_losses.found) == 7
    assert resumed_losses.found == {step: loss for step, loss in losses.found.items() if step > 6}
    assert losses.found[12] < losses.found[1]
    whole, resumed = weights(model), weights(fresh)
    for name, weight in whole.items():
        assert torch.equal(resumed[name], weight), name
    changed = {name for name, weight in weights(untrained).items() if not torch.equal(weight, whole[name])}
    assert changed
    assert all(".delta_memory." in name for name in changed)


def test_a_checkpoint_holds_the_adapter_and_not_the_backbone(tmp_path, data):
    model = random_model()
    run = trainer(model, tmp_path, data, save_total_limit=2)
    run.train()
    assert sorted(x.name for x in tmp_path.iterdir()) == ["checkpoint-12", "checkpoint-9"]
    last = tmp_path / "checkpoint-12"
    saved = load_file(last / "model.safetensors")
    assert saved.keys() == {name for name, _ in model.named_parameters() if ".delta_memory." in name}
    loaded = backbone()
    load_adapter(loaded, last)
    names = [name for name in weights(model) if ".delta_memory." in name]
    assert all(torch.equal(loaded.state_dict()[name], model.state_dict()[name]) for name in names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the whole model may be saved with a warning that the memory is in it
        run.save_model(str(tmp_path / "whole"))
    assert load_file(tmp_path / "whole" / "model.safetensors").keys() > saved.keys()


def test_other_trained_weights_are_checkpointed_too(tmp_path, data):
    model = random_model()
    model.model.norm.requires_grad_(True)
    fresh = copy.deepcopy(model)
    trainer(model, tmp_path, data, max_steps=3).train()
    trainer(fresh, tmp_path, data, max_steps=3).train(resume_from_checkpoint=True)
    assert torch.equal(fresh.model.norm.weight, model.model.norm.weight)
    assert not torch.equal(fresh.model.norm.weight, torch.ones(64))


def test_the_best_memory_is_loaded_at_the_end(tmp_path, data):
    model = random_model()
    options = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    run = trainer(model, tmp_path, data, SpoilMemory(7), **options)
    run.train()
    assert run.state.best_global_step in (3, 6)
    best = load_file(f"{run.state.best_model_checkpoint}/model.safetensors")
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in best.items())
    evaluated = {x["step"]: x["eval_loss"] for x in run.state.log_history if "eval_loss" in x}
    assert evaluated[12] > evaluated[run.state.best_global_step]
    assert run.evaluate()["eval_loss"] == pytest.approx(evaluated[run.state.best_global_step], rel=1e-6)


def test_resuming_with_another_memory_raises(tmp_path, data):
    trainer(random_model(), tmp_path, data, max_steps=3).train()
    for layers, message in (((0,), "also has model.layers.1"), ((), "")):
        other = backbone()
        config = DeltaMemConfig(target_layers=layers, num_state_heads=1 if layers else 2)
        attach_memory(other, config)
        with pytest.raises(RuntimeError, match=message or "size mismatch"):
            trainer(other, tmp_path, data).train(resume_from_checkpoint=True)
    one_layer = backbone()
    attach_memory(one_layer, DeltaMemConfig(target_layers=(0,)))
    trainer(one_layer, tmp_path / "one", data, max_steps=3).train()
    with pytest.raises(RuntimeError, match=r"lacks model\.layers\.1"):
        trainer(random_model(), tmp_path / "one", data).train(resume_from_checkpoint=True)


def test_a_model_without_a_memory_raises(tmp_path, data):
    with pytest.raises(ValueError, match="attach_memory before the Trainer"):
        trainer(backbone(), tmp_path, data)
