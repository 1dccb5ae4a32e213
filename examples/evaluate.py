"""Evaluate trained memories on held-out questions. Print a table and write the figures as JSON.

    python examples/evaluate.py memory --json results.json

The folders are written by train.py and must all belong to one model. The frozen model answers without and with the
passage in its context. Each memory answers from its state alone, from another passage's state (the control), and with
both state and context. Accuracy compares the answer with the other words of its kind; likelihood is over the whole
vocabulary. Intervals are 95 % bootstrap intervals over passages. A second table gives the price: how the attached
memory changes the likelihood of unrelated text.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from remembering.backbone import load_backbone
from remembering.checkpoint import write_whole
from remembering.evaluation import (
    FROZEN,
    MEMORY,
    answers,
    episodes,
    held_out_sets,
    price,
    text_likelihood,
    unrelated_text,
)
from remembering.machine import header
from remembering.passes import collate, write
from remembering.report import markdown
from remembering.training import load_runs, world_of
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from deltamem_kernels.integrations.transformers import detach_memory, load_adapter


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--passages", type=int, default=128, help="passages in each set")
    parser.add_argument("--facts", type=int, default=3, help="largest number of facts in a passage, one set per number")
    parser.add_argument(
        "--recall", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32], help="passwords in a passage, one set per number"
    )
    parser.add_argument(
        "--dialogues", type=int, default=128, help="number of human dialogues (needs chitchat-dataset; 0 for none)"
    )
    parser.add_argument("--windows", type=int, default=32, help="windows of unrelated text")
    parser.add_argument("--window", type=int, default=256, help="tokens in a window")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    runs = load_runs(given.folders)
    settings = runs[0]["settings"]
    model, tokenizer = load_backbone(settings["model"], getattr(torch, settings["dtype"]), given.device)
    world = world_of(tokenizer, settings["words"])
    sets = {
        name: episodes(world, task, part, count, given.passages)
        for name, (task, part, count) in held_out_sets(given.facts, tuple(given.recall)).items()
    }
    if given.dialogues:
        sets["next utterance of a dialogue"] = episodes(world, "dialogue", "held-out", 1, given.dialogues)
    windows = unrelated_text(tokenizer, given.windows, given.window).to(given.device)
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("frozen", total=(len(sets) + 1) * (len(runs) + 1))

        def answer_all(ways: tuple[str, ...]) -> dict:
            found = {}
            for name, some in sets.items():
                found[name] = answers(model, tokenizer, some, ways, given.device)
                progress.advance(task)
            return found

        frozen = answer_all(FROZEN)
        frozen_text = text_likelihood(model, windows)
        progress.advance(task)
        passages = collate(tokenizer, episodes(world, "facts", "held-out", 1, given.windows, seed=1)).to(given.device)
        memories = []
        for folder, run in zip(given.folders, runs, strict=True):
            progress.update(task, description=folder.name)
            load_adapter(model, folder)
            last = run["loss"][-20:]
            found = {"name": folder.name, "settings": run["settings"], "loss": sum(last) / len(last)}
            found["answers"] = answer_all(MEMORY)
            with torch.no_grad():
                states = write(model, passages)
            found["price"] = price(model, windows, frozen_text, states)
            progress.advance(task)
            memories.append(found)
            detach_memory(model)
    results = {**header(), "frozen": frozen, "memories": memories}
    if given.json:
        write_whole(given.json, (json.dumps(results, indent=1) + "\n").encode())
    print(markdown(results))


if __name__ == "__main__":
    main()
