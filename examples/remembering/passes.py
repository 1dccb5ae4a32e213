"""The two passes: a passage is written, and questions are answered from the states it left."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from deltamem_kernels.integrations.transformers import MemoryCall, memory_layers
from deltamem_kernels.integrations.transformers.cache_keyword import cache_keyword

from .tasks import Episode, Question

TURN = "<|im_start|>{role}\n{text}<|im_end|>\n"  # as SmolLM2 and Qwen write it
REPLY = "<|im_start|>assistant\n{lead}"
ROLES = ("user", "assistant")
LONGEST_ANSWER = 32

States = dict[int, Tensor]


@dataclass
class Batch:
    """Passages, padded on the left, and their questions with answers, padded on the right."""

    passage: Tensor
    """`[P, T]`"""
    passage_mask: Tensor
    """`[P, T]`"""
    message_ids: Tensor
    """`[P, T]`: which message a token is of; -1 for padding."""
    owner: Tensor
    """`[Q]`: the passage that a question is about."""
    ids: Tensor
    """`[Q, L]`"""
    mask: Tensor
    """`[Q, L]`"""
    targets: Tensor
    """`[Q, L]`: the token that is to follow each token of a question; -100 outside of the answer."""
    choices: Tensor
    """`[Q, C]`: first tokens of the words that the answer is one of, padded with -1; the answer's own comes first."""

    def to(self, device: torch.device | str) -> Batch:
        return Batch(**{name: value.to(device) for name, value in vars(self).items()})


def tokens_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def collate(tokenizer, episodes: Sequence[Episode]) -> Batch:
    padding = tokenizer.pad_token_id or 0
    passages, messages, owner, ids, targets, choices = [], [], [], [], [], []
    for number, episode in enumerate(episodes):
        parts = [
            tokens_of(tokenizer, TURN.format(role=ROLES[turn % 2], text=text))
            for turn, text in enumerate(episode.messages)
        ]
        passages.append([token for part in parts for token in part])
        messages.append([turn for turn, part in enumerate(parts) for _ in part])
        for question in episode.questions:
            prompt, answer = _question(tokenizer, question)
            owner.append(number)
            ids.append((prompt + answer)[:-1])
            targets.append([-100] * (len(prompt) - 1) + answer)
            others = [word for word in question.choices if word != question.answer]
            choices.append([answer[0], *(tokens_of(tokenizer, f" {word}")[0] for word in others)])
    passage = _padded(passages, padding, left=True)
    return Batch(
        passage,
        _padded([[1] * len(row) for row in passages], 0, left=True),
        _padded(messages, -1, left=True),
        torch.tensor(owner),
        _padded(ids, padding),
        _padded([[1] * len(row) for row in ids], 0),
        _padded(targets, -100),
        _padded(choices, -1),
    )


def _question(tokenizer, question: Question) -> tuple[list[int], list[int]]:
    prompt = TURN.format(role="user", text=question.text) + REPLY.format(lead=question.lead)
    answer = f" {question.answer}" if question.lead else question.answer
    return tokens_of(tokenizer, prompt), tokens_of(tokenizer, answer)[:LONGEST_ANSWER]


def _padded(rows: list[list[int]], value: int, *, left: bool = False) -> Tensor:
    longest = max(map(len, rows))
    fill = [[value] * (longest - len(row)) for row in rows]
    return torch.tensor([gap + row if left else row + gap for row, gap in zip(rows, fill, strict=True)])


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp_min(0)


def by_message(model) -> bool:
    """Whether the memory writes messages' means (SSW)."""
    return memory_layers(model)[0][1].delta_memory.config.memory_write_granularity != "token"


def write(model, batch: Batch, states: States | None = None, cache: DynamicCache | None = None) -> States:
    """The states behind each passage; they carry gradients. A cache also keeps the passage's keys and values."""
    with MemoryCall(model, states, message_ids=batch.message_ids if by_message(model) else None) as call:
        run_stack(model, batch.passage, batch.passage_mask, cache)
    return call.states


def go_on(model, ids: Tensor, states: States) -> States:
    """The states behind other text, `[P, T]`, that is written after them: one message, in a context of its own."""
    with MemoryCall(model, states, message_ids=torch.zeros_like(ids) if by_message(model) else None) as call:
        run_stack(model, ids, torch.ones_like(ids))
    return call.states


def first(states: States, passages: int) -> States:
    return {index: state[:passages] for index, state in states.items()}


def run_stack(model, ids: Tensor, mask: Tensor, cache: DynamicCache | None = None) -> Tensor:
    """The last hidden states; the head runs only where a token is wanted."""
    held = 0 if cache is None else cache.get_seq_length()
    given = mask[:, held:] if held else mask
    positions = _positions(mask)[:, held:]
    assert given.shape == ids.shape
    decoder = model.get_decoder()
    return decoder(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        use_cache=cache is not None,
        **{cache_keyword(decoder): cache},
    ).last_hidden_state


def ask(model, batch: Batch, states: States | None = None, cache: DynamicCache | None = None) -> Tensor:
    """`[N, vocabulary]`: for each token of the answers, one question after the other, what the model expects, float32.

    Args:
        states: of the passages; each question reads those of its own. None, or a model without a memory: none.
        cache: keys and values of the passages too.
    """
    mask = batch.mask
    if cache is not None:
        cache.batch_select_indices(batch.owner)
        mask = torch.cat([batch.passage_mask[batch.owner], mask], 1)
    calls = nullcontext()
    if memory_layers(model):
        own = None if states is None or cache is not None else {i: state[batch.owner] for i, state in states.items()}
        calls = MemoryCall(model, own, write=False)
    with calls:
        hidden = run_stack(model, batch.ids, mask, cache)
    return model.get_output_embeddings()(hidden[batch.targets >= 0]).float()


def answer_loss(logits: Tensor, batch: Batch) -> Tensor:
    """The mean over questions of the answer's mean cross-entropy a token."""
    wanted = batch.targets >= 0
    loss = F.cross_entropy(logits, batch.targets[wanted], reduction="none")
    weight = (1 / wanted.sum(1, keepdim=True)).expand(wanted.shape)[wanted]
    return (loss * weight).sum() / len(batch.owner)


def drift(model, windows: Tensor, states: States, writes: bool) -> Tensor:
    """How far the model's expectations of other text are from the frozen model's: the mean over tokens of the
    Kullback-Leibler divergence, with a memory that starts from `states`, one for each window, is read, and written
    where `writes` says so."""
    mask, messages = torch.ones_like(windows), torch.zeros_like(windows) if by_message(model) else None
    head = model.get_output_embeddings()
    with torch.no_grad(), MemoryCall(model, write=False):  # an empty memory returns zeros
        frozen = head(run_stack(model, windows, mask)).float().log_softmax(-1)
    with MemoryCall(model, states, message_ids=messages if writes else None, write=writes):
        ours = head(run_stack(model, windows, mask)).float().log_softmax(-1)
    return F.kl_div(ours, frozen, log_target=True, reduction="none").sum(-1).mean()


@dataclass
class Scores:
    """For each question."""

    log_likelihood: Tensor
    """`[Q]`: of the answer, a token, in nats."""
    correct: Tensor
    """`[Q]` bool: of all choices the answer's is the likeliest. Of answers without choices it means nothing."""


def score(logits: Tensor, batch: Batch) -> Scores:
    wanted = batch.targets >= 0
    rows = wanted.nonzero()[:, 0]
    log_p = logits.log_softmax(-1)
    own = log_p.gather(1, batch.targets[wanted][:, None])[:, 0]
    total = torch.zeros(len(batch.owner)).index_add_(0, rows.cpu(), own.cpu())
    first = torch.searchsorted(rows, torch.arange(len(batch.owner), device=rows.device))
    among = log_p[first].gather(1, batch.choices.clamp_min(0)).masked_fill(batch.choices < 0, -torch.inf)
    return Scores(total / wanted.sum(1).cpu(), (among.argmax(1) == 0).cpu())
