"""The two passes of the model: write a passage to the memory, and answer questions from the resulting states."""

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

TURN = "<|im_start|>{role}\n{text}<|im_end|>\n"  # the chat format of SmolLM2 and Qwen
REPLY = "<|im_start|>assistant\n{lead}"
ROLES = ("user", "assistant")
LONGEST_ANSWER = 32

States = dict[int, Tensor]


@dataclass
class Batch:
    """Passages, padded on the left, and their questions with answers, padded on the right."""

    passage: Tensor
    """`[P, T]`: token ids."""
    passage_mask: Tensor
    """`[P, T]`: 0 for padding."""
    message_ids: Tensor
    """`[P, T]`: the index of each token's message; -1 for padding."""
    owner: Tensor
    """`[Q]`: the index of each question's passage."""
    ids: Tensor
    """`[Q, L]`: token ids of the questions and answers."""
    mask: Tensor
    """`[Q, L]`: 0 for padding."""
    targets: Tensor
    """`[Q, L]`: the next token at each position of an answer; -100 elsewhere."""
    choices: Tensor
    """`[Q, C]`: first tokens of the possible answers, the right one first; padded with -1."""

    def to(self, device: torch.device | str) -> Batch:
        return Batch(**{name: value.to(device) for name, value in vars(self).items()})


def tokenize(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def collate(tokenizer, episodes: Sequence[Episode]) -> Batch:
    padding = tokenizer.pad_token_id or 0
    passages, messages, owner, ids, targets, choices = [], [], [], [], [], []
    for number, episode in enumerate(episodes):
        parts = [
            tokenize(tokenizer, TURN.format(role=ROLES[turn % 2], text=text))
            for turn, text in enumerate(episode.messages)
        ]
        passages.append([token for part in parts for token in part])
        messages.append([turn for turn, part in enumerate(parts) for _ in part])
        for question in episode.questions:
            prompt, answer = _tokenize_question(tokenizer, question)
            owner.append(number)
            ids.append((prompt + answer)[:-1])
            targets.append([-100] * (len(prompt) - 1) + answer)
            others = [word for word in question.choices if word != question.answer]
            choices.append([answer[0], *(tokenize(tokenizer, f" {word}")[0] for word in others)])
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


def _tokenize_question(tokenizer, question: Question) -> tuple[list[int], list[int]]:
    prompt = TURN.format(role="user", text=question.text) + REPLY.format(lead=question.lead)
    answer = f" {question.answer}" if question.lead else question.answer
    return tokenize(tokenizer, prompt), tokenize(tokenizer, answer)[:LONGEST_ANSWER]


def _padded(rows: list[list[int]], value: int, *, left: bool = False) -> Tensor:
    longest = max(map(len, rows))
    fill = [[value] * (longest - len(row)) for row in rows]
    return torch.tensor([gap + row if left else row + gap for row, gap in zip(rows, fill, strict=True)])


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp_min(0)


def writes_messages(model) -> bool:
    """Whether the model's memory writes the means of messages (SSW)."""
    return memory_layers(model)[0][1].delta_memory.config.memory_write_granularity != "token"


def write(model, batch: Batch, states: States | None = None, cache: DynamicCache | None = None) -> States:
    """Write the passages of a batch to the memory and return the states, which carry gradients.

    Args:
        states: initial states. None means zeros.
        cache: if given, it also receives the passages' keys and values.
    """
    with MemoryCall(model, states, message_ids=batch.message_ids if writes_messages(model) else None) as call:
        run_decoder(model, batch.passage, batch.passage_mask, cache)
    return call.states


def write_text(model, ids: Tensor, states: States) -> States:
    """Write text `[P, T]`, as one message in a new context, to memories in these states. Return the new states."""
    with MemoryCall(model, states, message_ids=torch.zeros_like(ids) if writes_messages(model) else None) as call:
        run_decoder(model, ids, torch.ones_like(ids))
    return call.states


def first(states: States, passages: int) -> States:
    """Return the states of the first passages."""
    return {index: state[:passages] for index, state in states.items()}


def run_decoder(model, ids: Tensor, mask: Tensor, cache: DynamicCache | None = None) -> Tensor:
    """Return the last hidden states. The language model head is left to the caller, who needs few of its outputs.

    Args:
        ids: `[B, T]`, the tokens that follow those in the cache.
        mask: `[B, cached + T]`, 0 for padding.
    """
    past = 0 if cache is None else cache.get_seq_length()
    assert mask[:, past:].shape == ids.shape
    positions = _positions(mask)[:, past:]
    decoder = model.get_decoder()
    return decoder(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        use_cache=cache is not None,
        **{cache_keyword(decoder): cache},
    ).last_hidden_state


def ask(model, batch: Batch, states: States | None = None, cache: DynamicCache | None = None) -> Tensor:
    """Return the logits for every token of the answers, `[N, vocabulary]`, float32, one question after the other.

    Args:
        states: the passages' states; each question reads the state of its own passage. None means no states.
        cache: the passages' keys and values, and their states if the model has a memory. `states` is then ignored.
    """
    mask = batch.mask
    if cache is not None:
        cache.batch_select_indices(batch.owner)
        mask = torch.cat([batch.passage_mask[batch.owner], mask], 1)
    call = nullcontext()
    if memory_layers(model):
        own = None if states is None or cache is not None else {i: state[batch.owner] for i, state in states.items()}
        call = MemoryCall(model, own, write=False)
    with call:
        hidden = run_decoder(model, batch.ids, mask, cache)
    return model.get_output_embeddings()(hidden[batch.targets >= 0]).float()


def answer_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Return the mean over questions of the answer's mean cross-entropy per token."""
    wanted = batch.targets >= 0
    loss = F.cross_entropy(logits, batch.targets[wanted], reduction="none")
    weight = (1 / wanted.sum(1, keepdim=True)).expand(wanted.shape)[wanted]
    return (loss * weight).sum() / len(batch.owner)


def drift(model, windows: Tensor, states: States, writes: bool) -> Tensor:
    """Return the mean Kullback-Leibler divergence per token from the frozen model's predictions of other text.

    Args:
        windows: `[W, T]` token ids of the text.
        states: initial states of the memory, one for each window.
        writes: whether the windows are also written to the memory.
    """
    mask, messages = torch.ones_like(windows), torch.zeros_like(windows) if writes_messages(model) else None
    head = model.get_output_embeddings()
    with torch.no_grad(), MemoryCall(model, write=False):  # a memory of zeros reads zeros: the frozen model
        frozen = head(run_decoder(model, windows, mask)).float().log_softmax(-1)
    with MemoryCall(model, states, message_ids=messages if writes else None, write=writes):
        ours = head(run_decoder(model, windows, mask)).float().log_softmax(-1)
    return F.kl_div(ours, frozen, log_target=True, reduction="none").sum(-1).mean()


@dataclass
class Scores:
    """The scores of each question."""

    log_likelihood: Tensor
    """`[Q]`: mean log-likelihood per token of the answer, in nats."""
    correct: Tensor
    """`[Q]` bool: whether the answer is the most likely choice. Meaningless for answers without choices."""


def score(logits: Tensor, batch: Batch) -> Scores:
    """Score the answers from the logits that `ask` returned."""
    wanted = batch.targets >= 0
    rows = wanted.nonzero()[:, 0]
    log_p = logits.log_softmax(-1)
    own = log_p.gather(1, batch.targets[wanted][:, None])[:, 0]
    total = torch.zeros(len(batch.owner)).index_add_(0, rows.cpu(), own.cpu())
    first = torch.searchsorted(rows, torch.arange(len(batch.owner), device=rows.device))
    among = log_p[first].gather(1, batch.choices.clamp_min(0)).masked_fill(batch.choices < 0, -torch.inf)
    return Scores(total / wanted.sum(1).cpu(), (among.argmax(1) == 0).cpu())
