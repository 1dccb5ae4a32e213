"""Passages with questions whose answers can be checked: facts told in a dialogue, passwords of things, and the next
utterance of a human dialogue. Train and held-out episodes share no fact and no template; a share of the values is never
an answer in training (`new`)."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from typing import NamedTuple

from .words import PASSWORDS, PEOPLE, RELATIONS, THINGS, Relation, Templates

HELD_OUT_SHARE = 0.25
"""of the pairs of a subject and a value"""
NEW_SHARE = 0.2
"""of the values: no training passage tells them"""


class Question(NamedTuple):
    text: str
    lead: str
    """How the reply begins, up to the answer."""
    answer: str
    choices: tuple[str, ...]
    """The words that the answer is one of; empty where the answer is free text."""


class Episode(NamedTuple):
    messages: tuple[str, ...]
    """The passage. Two speakers take turns."""
    questions: tuple[Question, ...]


class Fact(NamedTuple):
    relation: str
    subject: str
    value: str


def share(*parts: str) -> float:
    """A number from 0 to 1 that depends on the words alone, the same in every process."""
    return zlib.crc32("|".join(parts).encode()) / 2**32


class World:
    """The facts there are, divided into train, held-out, and new (held-out, of values that training never tells).

    Args:
        is_word: whether the model reads a word (with a space before it) as one token; answers are such words.
        most: so many words at most are the values of a relation.
    """

    def __init__(self, is_word: Callable[[str], bool], most: int = 32) -> None:
        self.relations: dict[str, Relation] = {}
        self.facts: dict[str, dict[str, list[Fact]]] = {"train": {}, "held-out": {}, "new": {}}
        for name, relation in {**RELATIONS, "password": PASSWORDS}.items():
            values = tuple(value for value in relation.values if is_word(value))[:most]
            self.relations[name] = relation._replace(values=values)
            new = sorted(values, key=lambda value: share(name, value))[: round(NEW_SHARE * len(values))]
            for part in self.facts.values():
                part[name] = []
            for subject in THINGS if name == "password" else PEOPLE:
                for value in values:
                    held_out = share(name, subject, value) < HELD_OUT_SHARE
                    part = "new" if value in new else "held-out" if held_out else "train"
                    self.facts[part][name].append(Fact(name, subject, value))

    def question(self, fact: Fact, templates: Templates, rng: random.Random) -> Question:
        text, lead = rng.choice(templates.ask)
        return Question(
            text.format(fact.subject), lead.format(fact.subject), fact.value, self.relations[fact.relation].values
        )

    def episode(self, part: str, relations: list[str], rng: random.Random) -> Episode:
        """One fact of each of the relations named, each asked for. No subject has two facts of one relation, and no
        value comes twice while there are others."""
        facts: list[Fact] = []
        for name in relations:
            told_of = [fact for fact in facts if fact.relation == name]
            known = [x for x in self.facts[part][name] if all(x.subject != fact.subject for fact in told_of)]
            fresh = [x for x in known if all(x.value != fact.value for fact in told_of)]
            facts.append(rng.choice(fresh or known))
        told, asked = [], []
        for fact in facts:
            relation = self.relations[fact.relation]
            templates = relation.train if part == "train" else relation.held_out
            told.append(rng.choice(templates.tell).format(fact.subject, fact.value))
            asked.append(self.question(fact, templates, rng))
        return Episode(tuple(told), tuple(asked))

    def episode_of(self, task: str, part: str, count: int, rng: random.Random) -> Episode:
        """ "facts": of different relations, told of people; "recall": the passwords of so many things."""
        if task not in ("facts", "recall"):
            raise ValueError(f"task must be facts, recall or dialogue, got {task!r}")
        names = rng.sample(sorted(RELATIONS), count) if task == "facts" else ["password"] * count
        return self.episode(part, names, rng)


def reference(part: str) -> list[str]:
    """Texts about something else: the topics of the language reference that comes with Python."""
    from pydoc_data.topics import topics

    names = [name for name in sorted(topics) if (share("topic", name) < HELD_OUT_SHARE) == (part != "train")]
    return [topics[name] for name in names]


class Dialogues:
    """Human dialogues of chitchat-dataset: what was said, and the next utterance as the answer."""

    def __init__(self, part: str, utterances: int = 6, longest: int = 300) -> None:
        from chitchat_dataset import ConversationDataset

        self.utterances, self.longest = utterances, longest
        self.dialogues: list[list[str]] = []
        for index, dialogue in enumerate(ConversationDataset()):
            texts = [line for text in dialogue if (line := " ".join(text.split()))]
            held_out = share("dialogue", str(index)) < HELD_OUT_SHARE
            if held_out == (part != "train") and len(texts) > utterances + 1:
                self.dialogues.append(texts)

    def episode(self, rng: random.Random) -> Episode:
        texts = rng.choice(self.dialogues)
        start = rng.randrange(len(texts) - self.utterances)
        *passage, before, answer = (text[: self.longest] for text in texts[start : start + self.utterances + 1])
        return Episode(tuple(passage), (Question(before, "", answer, ()),))
