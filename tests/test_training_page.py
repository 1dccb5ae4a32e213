"""The code of docs/training.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from models import backbone, logits, one_thread, tokens
from safetensors.torch import load_file
from test_trl import texts, tokenizer
from transformers import TrainingArguments

from deltamem_kernels.integrations.transformers import memory_layers

__all__ = ["one_thread"]

PAGE = Path(__file__).parent.parent / "docs" / "training.md"


@pytest.mark.slow
def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 8
    model = backbone()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 12)]
    names = {"model": model, "data": rows, "texts": Dataset.from_list(texts(7, 12, 9)), "tokenizer": tokenizer()}
    for block in blocks:
        exec(block, names)
    assert isinstance(names["args"], TrainingArguments)
    assert [x.name for x in (tmp_path / "training").glob("checkpoint-*")] == ["checkpoint-6"]
    assert len(memory_layers(names["quantised"])) == 2
    assert logits(names["quantised"], tokens(1, 8)).isfinite().all()
    first, again = (load_file(tmp_path / x / "delta_mem_adapter.safetensors") for x in ("adapter", "adapter_with_lora"))
    assert first.keys() == again.keys()
    assert all(torch.equal(again[name], weight) for name, weight in first.items())
    kept = [name for name in before if "norm" in name or "embed" in name]
    assert kept
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in kept)
