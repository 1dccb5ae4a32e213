"""A memory in every text decoder of transformers: each property holds, or the page says that the model lacks it."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import transformers
from architectures import PROPERTIES, examine, kinds
from models import one_thread

__all__ = ["one_thread"]

PAGE = (Path(__file__).parent.parent / "docs" / "architectures.md").read_text(encoding="utf-8")
SAME = f"transformers {transformers.__version__}," in PAGE
QUICK = ["llama", "qwen3", "stablelm", "nemotron", "gemma2", "gemma3_text", "mixtral", "qwen3_moe", "olmo2", "phi"]
TABLE = {
    cells[0]: dict(zip(PROPERTIES, cells[1:], strict=True))
    for cells in (
        [cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")
    )
    if cells[0] != "architecture"
}


def check(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = examine(kind)
    assert not any(cell.startswith("wrong") for cell in row.values()), row
    assert (row["memory"] == "yes") == (kind in TABLE), row
    for name in PROPERTIES:
        if kind in TABLE and TABLE[kind][name] == "yes":
            assert row[name] == "yes", row


@pytest.mark.parametrize("kind", QUICK)
def test_a_memory_is_right_in_common_architectures(kind):
    check(kind)


@pytest.mark.slow
@pytest.mark.skipif(not SAME, reason="the page is of another release of transformers")
@pytest.mark.parametrize("kind", sorted(set(kinds()) - set(QUICK)))
def test_a_memory_is_right_in_every_architecture_or_does_not_fit(kind):
    check(kind)


@pytest.mark.skipif(not SAME, reason="the page is of another release of transformers")
def test_the_page_names_every_architecture_once():
    lists = [line.removesuffix(".").split(", ") for line in PAGE.split("## Without a memory")[1].splitlines()]
    named = [name for names in lists if all(re.fullmatch(r"[\w-]+", name) for name in names) for name in names]
    assert sorted([*TABLE, *named]) == kinds()
