"""A memory in every text decoder of transformers, and the page that says what holds for each."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from architectures import HEADER, NO, Row, examine
from models import one_thread
from tiny_models import MODEL_TYPES

__all__ = ["one_thread"]

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architectures.md").read_text()
HEAD = str(Row(*Row._fields))
ROWS = {row.split(" | ")[0].removeprefix("| "): row for row in PAGE.partition(HEAD)[2].splitlines()[2:]}
QUICK = ("llama", "qwen3", "stablelm", "nemotron", "gemma2", "gemma3_text", "qwen3_moe", "qwen3_next", "phi3")


@pytest.mark.parametrize(
    "model_type", [pytest.param(x, marks=[] if x in QUICK else pytest.mark.slow) for x in MODEL_TYPES]
)
def test_a_memory_either_fits_or_is_refused_as_the_page_says(model_type):
    row = examine(model_type)
    assert NO not in row
    assert str(row) == ROWS[model_type]


def test_the_page_has_a_row_for_each_text_decoder_of_the_pinned_release():
    pinned = f"transformers=={transformers.__version__}"
    assert pinned in (ROOT / "constraints.txt").read_text().splitlines()
    assert PAGE.startswith(HEADER), "write the page again: python tests/architectures.py > docs/architectures.md"
    assert list(ROWS) == MODEL_TYPES
    assert HEAD in PAGE
