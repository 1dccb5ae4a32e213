"""TRL's SFTTrainer on a model with a memory: examples packed into one row do not share a memory."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from models import CLOSE, one_thread, remembering
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from deltamem_kernels.integrations.transformers import MemoryCheckpoint
from deltamem_kernels.testing import relative_error

__all__ = ["one_thread"]
pytestmark = pytest.mark.slow


def tokenizer():
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, 99)}}
    model = Tokenizer(WordLevel(words, unk_token="<pad>"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<pad>"
    )


def trainer(model, folder, rows, **options):
    args = SFTConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        max_steps=1,
        **{"max_length": 32, **options},
    )
    return SFTTrainer(
        model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer(), callbacks=[MemoryCheckpoint()]
    )


def texts(*lengths):
    return [{"text": " ".join(f"w{i}" for i in torch.randint(3, 99, (length,)).tolist())} for length in lengths]


def loss_and_gradients(run):
    batch = next(iter(run.get_train_dataloader()))
    run.model.zero_grad()
    loss = run.compute_loss(run.model, dict(batch))
    loss.backward()
    return batch, loss.detach(), {n: p.grad for n, p in run.model.named_parameters() if p.grad is not None}


def assert_equal_results(found, wanted):
    assert relative_error(found[1], wanted[1]) <= CLOSE
    assert found[2].keys() == wanted[2].keys()
    compared = [name for name, gradient in wanted[2].items() if gradient.any()]
    assert len(compared) >= 8
    for name in compared:
        assert relative_error(found[2][name], wanted[2][name]) <= CLOSE, name


@pytest.mark.parametrize(
    "packed",
    [
        {"packing": True, "packing_strategy": "bfd", "per_device_train_batch_size": 1},
        {"packing": True, "packing_strategy": "bfd_split", "per_device_train_batch_size": 1},
        {"padding_free": True, "max_length": None, "per_device_train_batch_size": 3},
    ],
    ids=["bfd", "bfd_split", "padding_free"],
)
def test_packed_examples_give_the_loss_and_gradients_of_padded_ones(packed, tmp_path):
    model, rows = remembering(), texts(7, 12, 9)
    padded = loss_and_gradients(trainer(copy.deepcopy(model), tmp_path, rows, per_device_train_batch_size=3))
    found = loss_and_gradients(trainer(copy.deepcopy(model), tmp_path, rows, **packed))
    assert padded[0]["input_ids"].shape[0] == 3
    assert found[0]["input_ids"].shape[0] == 1
    assert_equal_results(found, padded)


def test_wrapped_rows_are_one_sequence_each(tmp_path):
    """This strategy gives no boundaries: attention and memory see the whole row."""
    model, rows = remembering(), texts(14, 16)
    options = {"packing": True, "packing_strategy": "wrapped", "per_device_train_batch_size": 1}
    found = loss_and_gradients(trainer(copy.deepcopy(model), tmp_path, rows, **options))
    ids = found[0]["input_ids"]
    assert ids.shape == (1, 32)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_equal_results(found, (None, loss.detach(), gradients))


def test_packed_training_checkpoints_the_memory(tmp_path):
    run = trainer(remembering(), tmp_path, texts(7, 12, 9), packing=True, per_device_train_batch_size=1, save_steps=1)
    run.train()
    assert (tmp_path / "checkpoint-1" / "delta_mem_adapter.safetensors").is_file()
    assert not (tmp_path / "checkpoint-1" / "config.json").exists()
