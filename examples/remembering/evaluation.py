"""Evaluate a memory: the same questions with and without the passage, its state, and another passage's state."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from deltamem_kernels.integrations.transformers import MemoryCall, memory_layers

from .passes import Batch, Scores, States, ask, collate, run_decoder, score, tokenize, write, writes_messages
from .statistics import interval
from .tasks import Dialogues, Episode, World, python_reference

BATCH = 16
FROZEN = ("frozen, no context", "frozen, with context")
MEMORY = ("memory, state only", "memory, another passage's state", "memory, with context")


def held_out_sets(largest: int, recall: tuple[int, ...]) -> dict[str, tuple[str, str, int]]:
    """Return the held-out question sets: name to (task, part, number of facts in a passage)."""
    named = {f"facts, {count} in a passage": ("facts", "held-out", count) for count in range(1, largest + 1)}
    named["facts, 1 in a passage, new words"] = ("facts", "new", 1)
    named |= {f"passwords, {count} in a passage": ("recall", "held-out", count) for count in recall}
    return named


def episodes(world: World, task: str, part: str, count: int, passages: int, seed: int = 0) -> list[Episode]:
    rng = random.Random(f"evaluation/{task}/{part}/{count}/{seed}")
    if task == "dialogue":
        dialogues = Dialogues(part)
        return [dialogues.episode(rng) for _ in range(passages)]
    return [world.episode_of(task, part, count, rng) for _ in range(passages)]


def batches(tokenizer, found: list[Episode], device: str) -> Iterator[Batch]:
    for start in range(0, len(found), BATCH):
        yield collate(tokenizer, found[start : start + BATCH]).to(device)


@torch.no_grad()
def answers(model, tokenizer, found: list[Episode], ways: tuple[str, ...], device: str) -> dict[str, dict[str, Any]]:
    """Return accuracy and log-likelihood of the answers, with intervals, for each way to answer."""
    scores: dict[str, list[Scores]] = {way: [] for way in ways}
    owners: list[Tensor] = []
    for number, batch in enumerate(batches(tokenizer, found, device)):
        owners.append(batch.owner.cpu() + number * BATCH)
        states = write(model, batch) if memory_layers(model) else None
        for way in ways:
            scores[way].append(score(_answer_logits(model, batch, way, states), batch))
    passages = torch.cat(owners)
    return {
        way: {
            "accuracy": interval(torch.cat([x.correct for x in scores[way]]), passages),
            "log_likelihood": interval(torch.cat([x.log_likelihood for x in scores[way]]), passages),
        }
        for way in ways
    }


def _answer_logits(model, batch: Batch, way: str, states: States | None) -> Tensor:
    if way.endswith("with context"):
        cache = DynamicCache(config=model.config)
        if memory_layers(model):
            write(model, batch, cache=cache)
        else:
            run_decoder(model, batch.passage, batch.passage_mask, cache)
        return ask(model, batch, cache=cache)
    if way == "memory, another passage's state":
        states = {index: state.roll(1, 0) for index, state in (states or {}).items()}
    return ask(model, batch, states)


@torch.no_grad()
def text_likelihood(model, windows: Tensor, states: States | None = None, writes: bool = True) -> Tensor:
    """Return the mean log-likelihood per token of each window, `[W]`, in nats.

    Args:
        windows: `[W, T]` token ids.
        states: initial states of the memory, one for each window. None means zeros.
        writes: whether the windows are also written to the memory.
    """
    found = []
    for number, window in enumerate(windows):
        call = nullcontext()
        if memory_layers(model):
            own = None if states is None else {i: x[number : number + 1] for i, x in states.items()}
            one_message = writes and writes_messages(model)
            ids = torch.zeros_like(window)[None] if one_message else None
            call = MemoryCall(model, own, write=writes, message_ids=ids)
        with call:
            hidden = run_decoder(model, window[None], torch.ones_like(window)[None])
        log_p = model.get_output_embeddings()(hidden[0, :-1]).float().log_softmax(-1)
        found.append(log_p.gather(1, window[1:, None]).mean())
    return torch.stack(found).cpu()


def unrelated_text(tokenizer, windows: int, length: int) -> Tensor:
    """Return consecutive windows `[windows, length]` of the Python reference topics held out from training."""
    ids = tokenize(tokenizer, "\n".join(python_reference("held-out")))
    if len(ids) < windows * length:
        raise ValueError(
            f"windows * length must be at most {len(ids)}, the tokens of the held-out topics, got {windows} * {length}"
        )
    return torch.tensor(ids[: windows * length]).view(windows, length)


@torch.no_grad()
def price(model, windows: Tensor, frozen: Tensor, states: States) -> dict[str, dict[str, Any]]:
    """Return the likelihood of unrelated text with the memory attached, for each way to use the memory.

    `log_likelihood` is the mean in nats per token. `change_percent` is the change relative to the frozen model; it is
    negative if the memory makes the text less likely.

    Args:
        windows: `[W, T]` token ids.
        frozen: `[W]`, each window's log-likelihood without a memory.
        states: states of passages, one for each window.
    """
    ways = {
        "empty, written and read": (None, True),
        "a passage's state, read only": (states, False),
        "a passage's state, written and read": (states, True),
    }
    each = torch.arange(len(windows))
    found = {"frozen": {"log_likelihood": interval(frozen, each)}}
    for name, (start, writes) in ways.items():
        ours = text_likelihood(model, windows, start, writes)
        change = interval((ours - frozen) / -frozen.mean() * 100, each)
        found[name] = {"log_likelihood": interval(ours, each), "change_percent": change}
    return found
