"""Train a memory on a frozen model: write a passage, then answer its questions from the states alone."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deltamem_kernels.integrations.transformers import attach_memory

from .calibration import calibrate
from .checkpoint import load_checkpoint, save_checkpoint
from .passes import Batch, answer_loss, ask, collate, drift, first, score, tokenize, write, write_text
from .settings import Settings
from .tasks import Dialogues, Episode, World, python_reference

CALIBRATION = 8  # batches
WINDOWS, WINDOW = 4, 64  # windows of other text in a step, for the divergence, and tokens in each
LONGEST_GAP = 1024  # tokens; several topics are at least this long
CHARACTERS = 60  # characters of a topic to tokenize for each token needed
CHECKPOINT = "checkpoint.pt"
LOSSES = "losses.json"


def world_of(tokenizer, words: int) -> World:
    """Return the world of facts whose values are single tokens, at most `words` values per relation."""
    return World(lambda word: len(tokenize(tokenizer, f" {word}")) == 1, words)


def load_runs(folders: list[Path]) -> list[dict[str, Any]]:
    """Load losses.json from each of `train.py`'s folders.

    Raises:
        SystemExit: the runs differ in their model, dtype or number of words and cannot be compared.
    """
    runs = [json.loads((folder / LOSSES).read_text()) for folder in folders]
    if len({(run["settings"]["model"], run["settings"]["dtype"], run["settings"]["words"]) for run in runs}) > 1:
        raise SystemExit("the folders must have the same model, dtype and words")
    return runs


class Lessons:
    """The training data. A batch depends only on the seed, the step, the part and the process, so a resumed run sees
    the same batches as an uninterrupted one."""

    def __init__(self, settings: Settings, tokenizer) -> None:
        if not 0 <= settings.gap <= LONGEST_GAP:
            raise ValueError(f"gap must be from 0 to {LONGEST_GAP} tokens, got {settings.gap}")
        self.settings, self.tokenizer = settings, tokenizer
        self.world = world_of(tokenizer, settings.words)
        self.tasks = settings.tasks.split(",")
        self.texts = python_reference("train")
        self.dialogues = Dialogues("train") if "dialogue" in self.tasks else None

    def batch(self, step: int, part: int = 0, process: int = 0) -> Batch:
        """Return batch `part` of the batches accumulated in a step. All its passages belong to one task."""
        rng = random.Random(f"{self.settings.seed}/{step}/{part}/{process}")
        task = self.tasks[(step + part) % len(self.tasks)]
        return collate(self.tokenizer, [self._episode(task, rng) for _ in range(self.settings.batch)])

    def other_text(self, rows: int, length: int, *seed: int | str) -> Tensor:
        """Return random windows of Python's language reference, `[rows, length]`."""
        rng = random.Random(f"text/{self.settings.seed}/" + "/".join(map(str, seed)))
        found: list[list[int]] = []
        while len(found) < rows:
            ids = tokenize(self.tokenizer, rng.choice(self.texts)[: CHARACTERS * length])
            if len(ids) > length:
                start = rng.randrange(len(ids) - length)
                found.append(ids[start : start + length])
        return torch.tensor(found)

    def gap_text(self, step: int, part: int = 0, process: int = 0) -> Tensor | None:
        """Return 0 to `gap` tokens of other text to write between a batch's passages and their questions."""
        rng = random.Random(f"gap/{self.settings.seed}/{step}/{part}/{process}")
        length = rng.randint(0, self.settings.gap)
        return self.other_text(self.settings.batch, length, "gap", step, part, process) if length else None

    def _episode(self, task: str, rng: random.Random) -> Episode:
        if task == "dialogue" and self.dialogues is not None:
            return self.dialogues.episode(rng)
        return self.world.episode_of(task, "train", rng.randint(1, self.settings.most), rng)


class Trainer:
    """Train the memory's weights with AdamW, a warm-up and a cosine schedule. The model stays frozen.

    If torch.distributed is initialised, each process draws its own batches and the gradients are averaged. There are
    few trained weights, so no wrapper is needed.

    Attributes:
        step: number of completed steps.
        losses, accuracies: loss and accuracy of each completed step, in this process.
    """

    def __init__(self, model, tokenizer, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.lessons = Lessons(settings, tokenizer)
        torch.manual_seed(settings.seed)
        attach_memory(model, settings.memory(model.config.num_hidden_layers))
        self.weights = {name: x for name, x in model.named_parameters() if x.requires_grad}
        self.device = next(iter(self.weights.values())).device
        self.optimizer = torch.optim.AdamW(
            self.weights.values(), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
        )
        self.step = 0
        self.losses: list[float] = []
        self.accuracies: list[float] = []

    def calibrate(self) -> None:
        """Initialise the memory's value weights, identically in every process."""
        batches = (self.lessons.batch(-1 - part).to(self.device) for part in range(CALIBRATION))
        calibrate(self.model, batches, self.settings.seed)
        if dist.is_initialized():
            for weight in self.weights.values():
                dist.broadcast(weight.detach(), 0)

    def learning_rate(self, step: int) -> float:
        settings = self.settings
        warm = min(1.0, (step + 1) / max(settings.warmup, 1))
        return settings.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / settings.steps))

    def advance(self) -> None:
        """Run one optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        loss_sum = accuracy_sum = 0.0
        parts = self.settings.accumulate
        for part in range(parts):
            batch = self.lessons.batch(self.step, part, _rank()).to(self.device)
            states = write(self.model, batch)
            gap_text = self.lessons.gap_text(self.step, part, _rank())
            if gap_text is not None:
                states = write_text(self.model, gap_text.to(self.device), states)
            logits = ask(self.model, batch, states)
            loss = total = answer_loss(logits, batch)
            if self.settings.keep:
                rows = min(WINDOWS, self.settings.batch)
                windows = self.lessons.other_text(rows, WINDOW, self.step, part, _rank()).to(self.device)
                writes = self.step % 2 == 0  # train both uses of a memory: read and written, and read only
                total = loss + self.settings.keep * drift(self.model, windows, first(states, len(windows)), writes)
            (total / parts).backward()
            loss_sum += loss.item()
            accuracy_sum += score(logits.detach(), batch).correct.float().mean().item()
        self._average([x.grad for x in self.weights.values() if x.grad is not None])
        torch.nn.utils.clip_grad_norm_(self.weights.values(), self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.losses.append(loss_sum / parts)
        self.accuracies.append(accuracy_sum / parts)

    def _average(self, gradients: list[Tensor]) -> None:
        if dist.is_initialized():
            for gradient in gradients:
                dist.all_reduce(gradient)
                gradient /= dist.get_world_size()

    def save(self, folder: Path) -> None:
        save_checkpoint(
            folder / CHECKPOINT,
            settings=self.settings.to_dict(),
            step=self.step,
            losses=self.losses,
            accuracies=self.accuracies,
            weights={name: x.detach().cpu() for name, x in self.weights.items()},
            optimizer=self.optimizer.state_dict(),
        )

    def resume(self, folder: Path) -> bool:
        """Resume from the checkpoint in the folder. Return False if there is none.

        Raises:
            ValueError: the checkpoint belongs to a run with other settings.
        """
        if not (folder / CHECKPOINT).exists():
            return False
        saved: dict[str, Any] = load_checkpoint(folder / CHECKPOINT)
        mine = self.settings.to_dict()
        if saved["settings"] != mine:
            different = sorted(key for key in mine if saved["settings"].get(key) != mine[key])
            raise ValueError(f"{folder / CHECKPOINT} comes from a run with other settings: {', '.join(different)}")
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(saved["weights"][name])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.losses, self.accuracies = saved["step"], saved["losses"], saved["accuracies"]
        return True

    def run(self, folder: Path, save_every: int, after_step: Callable[[Trainer], None] = lambda trainer: None) -> None:
        """Train to the last step. Save a checkpoint every `save_every` steps and after the last one."""
        if self.step == 0 and self.settings.calibrate:
            self.calibrate()
        while self.step < self.settings.steps:
            self.advance()
            if _rank() == 0 and (self.step % save_every == 0 or self.step == self.settings.steps):
                self.save(folder)
            after_step(self)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
