"""Passages with questions whose answers can be checked.

The tasks are facts stated in a dialogue, passwords of things, and the next utterance of a human dialogue. Training and
held-out episodes have no fact and no template in common. Some of the values are never an answer in training (part
"new").
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from typing import NamedTuple

from .words import PASSWORDS, PEOPLE, RELATIONS, THINGS, Relation, Templates

HELD_OUT_SHARE = 0.25
"""Fraction of the (subject, value) pairs that are held out."""
NEW_SHARE = 0.2
"""Fraction of the values that no training passage states."""


class Question(NamedTuple):
    text: str
    lead: str
    """The beginning of the reply, up to the answer."""
    answer: str
    choices: tuple[str, ...]
    """The possible answers; empty if the answer is free text."""


class Episode(NamedTuple):
    messages: tuple[str, ...]
    """The passage: messages of two speakers in turn."""
    questions: tuple[Question, ...]


class Fact(NamedTuple):
    relation: str
    subject: str
    value: str


def hash_fraction(*parts: str) -> float:
    """Hash strings to a number from 0 to 1, the same in every process."""
    return zlib.crc32("|".join(parts).encode()) / 2**32


class World:
    """All facts, split into train, held-out and new (held-out facts whose values never occur in training).

    Args:
        is_word: whether the tokenizer reads a word, with a space before it, as one token. Only such words are answers.
        most: maximum number of values of a relation.
    """

    def __init__(self, is_word: Callable[[str], bool], most: int = 32) -> None:
        self.relations: dict[str, Relation] = {}
        self.facts: dict[str, dict[str, list[Fact]]] = {"train": {}, "held-out": {}, "new": {}}
        for name, relation in {**RELATIONS, "password": PASSWORDS}.items():
            values = tuple(value for value in relation.values if is_word(value))[:most]
            self.relations[name] = relation._replace(values=values)
            new = sorted(values, key=lambda value: hash_fraction(name, value))[: round(NEW_SHARE * len(values))]
            for part in self.facts.values():
                part[name] = []
            for subject in THINGS if name == "password" else PEOPLE:
                for value in values:
                    held_out = hash_fraction(name, subject, value) < HELD_OUT_SHARE
                    part = "new" if value in new else "held-out" if held_out else "train"
                    self.facts[part][name].append(Fact(name, subject, value))

    def question(self, fact: Fact, templates: Templates, rng: random.Random) -> Question:
        """Return a question about a fact, from a random template."""
        text, lead = rng.choice(templates.ask)
        return Question(
            text.format(fact.subject), lead.format(fact.subject), fact.value, self.relations[fact.relation].values
        )

    def episode(self, part: str, relations: list[str], rng: random.Random) -> Episode:
        """Return an episode with one fact and one question for each of the named relations.

        A subject has at most one fact of a relation. A value repeats only when all others have been used.
        """
        facts: list[Fact] = []
        for name in relations:
            used = [fact for fact in facts if fact.relation == name]
            allowed = [x for x in self.facts[part][name] if all(x.subject != fact.subject for fact in used)]
            unused_values = [x for x in allowed if all(x.value != fact.value for fact in used)]
            facts.append(rng.choice(unused_values or allowed))
        messages, questions = [], []
        for fact in facts:
            relation = self.relations[fact.relation]
            templates = relation.train if part == "train" else relation.held_out
            messages.append(rng.choice(templates.tell).format(fact.subject, fact.value))
            questions.append(self.question(fact, templates, rng))
        return Episode(tuple(messages), tuple(questions))

    def episode_of(self, task: str, part: str, count: int, rng: random.Random) -> Episode:
        """Return an episode with `count` facts.

        The task "facts" states facts of different relations about people; "recall" states passwords of things.
        """
        if task not in ("facts", "recall"):
            raise ValueError(f"task must be facts, recall or dialogue, got {task!r}")
        names = rng.sample(sorted(RELATIONS), count) if task == "facts" else ["password"] * count
        return self.episode(part, names, rng)


def python_reference(part: str) -> list[str]:
    """Return unrelated texts: topics of the language reference that comes with Python."""
    from pydoc_data.topics import topics

    held_out = part != "train"
    return [topics[name] for name in sorted(topics) if (hash_fraction("topic", name) < HELD_OUT_SHARE) == held_out]


class Dialogues:
    """Human dialogues from chitchat-dataset. The passage is a part of a dialogue; the answer is the next utterance.

    Args:
        part: "train" or "held-out".
        utterances: utterances before the answer.
        longest: maximum length of an utterance, in characters.
    """

    def __init__(self, part: str, utterances: int = 6, longest: int = 300) -> None:
        from chitchat_dataset import ConversationDataset

        self.utterances, self.longest = utterances, longest
        self.dialogues: list[list[str]] = []
        for index, dialogue in enumerate(ConversationDataset()):
            texts = [line for text in dialogue if (line := " ".join(text.split()))]
            held_out = hash_fraction("dialogue", str(index)) < HELD_OUT_SHARE
            if held_out == (part != "train") and len(texts) > utterances + 1:
                self.dialogues.append(texts)

    def episode(self, rng: random.Random) -> Episode:
        texts = rng.choice(self.dialogues)
        start = rng.randrange(len(texts) - self.utterances)
        *passage, before, answer = (text[: self.longest] for text in texts[start : start + self.utterances + 1])
        return Episode(tuple(passage), (Question(before, "", answer, ()),))
