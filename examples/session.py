"""Measure how long a memory lasts: recall as a function of the tokens written since, as a plot and as JSON.

python examples/session.py memory --json session.json --plot session.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from remembering.backbone import load_backbone
from remembering.checkpoint import write_whole
from remembering.evaluation import episodes
from remembering.machine import header
from remembering.passes import collate, tokenize
from remembering.plots import plot_session
from remembering.report import format_accuracy
from remembering.session import session
from remembering.tasks import python_reference
from remembering.training import load_runs, world_of

from deltamem_kernels.integrations.transformers import detach_memory, load_adapter


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="written by train.py, all with the same model")
    parser.add_argument("--passages", type=int, default=32)
    parser.add_argument("--window", type=int, default=64, help="tokens in a call")
    parser.add_argument("--longest", type=int, default=4096, help="tokens in the longest session")
    parser.add_argument(
        "--state",
        nargs="+",
        choices=["float32", "bfloat16"],
        default=["float32", "bfloat16"],
        help="dtype of the states between calls",
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    runs = [run["settings"] for run in load_runs(given.folders)]
    model, tokenizer = load_backbone(runs[0]["model"], getattr(torch, runs[0]["dtype"]), given.device)
    some = episodes(world_of(tokenizer, runs[0]["words"]), "facts", "held-out", 1, given.passages, seed=2)
    batch = collate(tokenizer, some).to(given.device)
    text = torch.tensor(tokenize(tokenizer, "\n".join(python_reference("held-out")))[: given.longest])
    longest = max(given.longest // given.window, 1) * given.window
    lengths = [0, given.window]
    while lengths[-1] < longest:
        lengths.append(min(lengths[-1] * 2, longest))
    rows = []
    for folder in given.folders:
        load_adapter(model, folder)
        for state in given.state:
            for row in session(model, batch, text.to(given.device), lengths, state == "bfloat16", given.window):
                right, norm = format_accuracy(row["accuracy"]), row["norm"]
                print(f"{folder.name} {state:9} {row['tokens']:7,} tokens since: {right}, norm {norm:.3f}", flush=True)
                rows.append({"memory": folder.name, **row})
        detach_memory(model)
    if given.json:
        results = {**header(), "settings": dict(zip((x.name for x in given.folders), runs, strict=True)), "rows": rows}
        write_whole(given.json, (json.dumps(results, indent=1) + "\n").encode())
    if given.plot:
        plot_session(rows, given.plot)


if __name__ == "__main__":
    main()
