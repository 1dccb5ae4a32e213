"""The examples that train and evaluate a memory, on a tiny random model with a tokenizer of whole words."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import random
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from models import backbone
from remembering import tasks, words
from remembering.backbone import load_backbone
from remembering.checkpoint import write_whole
from remembering.evaluation import FROZEN, MEMORY, answers, episodes
from remembering.passes import ask, collate, drift, first, score, write
from remembering.report import markdown
from remembering.session import session
from remembering.settings import BY_STRATEGY, STRATEGIES, Settings
from remembering.statistics import apart, interval
from remembering.training import CALIBRATION, LOSSES, Trainer, world_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast

from deltamem_kernels.integrations.transformers import load_adapter, memory_layers

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
MARKUP = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def every_text() -> list[str]:
    relations = [*words.RELATIONS.values(), words.PASSWORDS]
    asked = [text for r in relations for part in (r.train, r.held_out) for pair in part.ask for text in pair]
    told = [text for r in relations for part in (r.train, r.held_out) for text in part.tell]
    values = [value for r in relations for value in r.values]
    return [*asked, *told, *values, *words.PEOPLE, *words.THINGS, "user assistant"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A folder with a model and its tokenizer."""
    folder = tmp_path_factory.mktemp("backbone")
    found = sorted({word for text in every_text() for word in re.findall(r"\w+|[^\w\s]", text)})
    vocabulary = {word: index for index, word in enumerate([*MARKUP, *found])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "additional_special_tokens": MARKUP[2:]}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    backbone(vocab_size=len(vocabulary)).save_pretrained(folder)
    return folder


def settings(folder: Path, **fields) -> Settings:
    given = {"steps": 5, "batch": 3, "warmup": 2, "dtype": "float32", "rank": 4, "learning_rate": 1e-2, "alpha": 16.0}
    return Settings(model=str(folder), **{**given, **fields})


def trainer(folder: Path, **fields) -> Trainer:
    return Trainer(*load_backbone(str(folder)), settings(folder, **fields))


def test_train_and_held_out_share_no_fact_and_no_template():
    world = tasks.World(lambda word: word != "Paris")
    parts = {part: {fact for facts in of.values() for fact in facts} for part, of in world.facts.items()}
    assert min(map(len, parts.values())) > 100
    assert not any(parts[a] & parts[b] for a, b in (("train", "held-out"), ("train", "new"), ("held-out", "new")))
    told = {(fact.relation, fact.value) for fact in parts["train"]}
    assert not any((fact.relation, fact.value) in told for fact in parts["new"])
    assert all((fact.relation, fact.value) in told for fact in parts["held-out"])
    assert not any(fact.value == "Paris" for facts in parts.values() for fact in facts)
    for relation in world.relations.values():
        assert not set(relation.train.tell) & set(relation.held_out.tell)
        assert not {text for text, _ in relation.train.ask} & {text for text, _ in relation.held_out.ask}
        assert not {lead for _, lead in relation.train.ask} & {lead for _, lead in relation.held_out.ask}
    rng = random.Random(torch.initial_seed())
    seen: dict[str, set] = {}
    for part in parts:
        for task, count in (("facts", 3), ("recall", 4), ("recall", 32)):
            episode = world.episode_of(task, part, count, rng)
            assert len(episode.messages) == len(episode.questions) == count
            for message, question in zip(episode.messages, episode.questions, strict=True):
                assert question.answer in message
                assert question.answer in question.choices
                assert question.answer not in question.text + question.lead
            assert len({question.text for question in episode.questions}) == count  # which one is meant is clear
            seen.setdefault(part, set()).update(episode.messages)
    assert not seen["train"] & (seen["held-out"] | seen["new"])
    again = tasks.World(lambda word: word != "Paris")
    assert again.facts == world.facts
    with pytest.raises(ValueError, match="task must be facts, recall or dialogue, got 'poems'"):
        world.episode_of("poems", "train", 1, rng)


def test_a_dialogue_is_of_one_part_and_its_answer_comes_next(monkeypatch):
    """The parts are train and held-out."""
    spoken = [[f"dialogue {i} says {j}" for j in range(9)] for i in range(40)]
    module = types.SimpleNamespace(ConversationDataset=lambda: (iter(dialogue) for dialogue in spoken))
    monkeypatch.setitem(sys.modules, "chitchat_dataset", module)
    parts = {part: tasks.Dialogues(part) for part in ("train", "held-out")}
    assert sorted(x for part in parts.values() for x in part.dialogues) == sorted(spoken)
    assert all(part.dialogues for part in parts.values())
    episode = parts["train"].episode(random.Random(0))
    (question,) = episode.questions
    texts = [*episode.messages, question.text, question.answer]
    first = int(texts[0].split()[-1])
    assert [int(text.split()[-1]) for text in texts] == list(range(first, first + 7))
    assert len({text.split()[1] for text in texts}) == 1


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_a_step_trains_the_memory_alone(folder, strategy):
    ours = trainer(folder, strategy=strategy, accumulate=2, tasks="facts,recall", gap=6)
    before = {name: x.clone() for name, x in ours.model.named_parameters()}
    ours.advance()
    ours.advance()  # in the first step the corrections are zero, and nothing before them has a gradient
    after = dict(ours.model.named_parameters())
    changed = {name for name, x in after.items() if not torch.equal(x, before[name])}
    assert changed == set(ours.weights)
    assert all(torch.isfinite(torch.tensor(ours.losses)))
    state = write(ours.model, ours.lessons.batch(7))[0]
    assert state.shape[1] == (4 if strategy == "msw" else 1)


def test_a_killed_and_resumed_run_is_an_uninterrupted_one(folder, tmp_path):
    whole = trainer(folder, seed=3, gap=6)
    whole.run(tmp_path, save_every=100)
    assert len(whole.losses) == 5
    (tmp_path / "killed").mkdir()

    class Killed(BaseException):
        """Nothing in the trainer catches it."""

    def kill(trainer: Trainer) -> None:
        if trainer.step == 3:
            raise Killed

    first = trainer(folder, seed=3, gap=6)
    assert not first.resume(tmp_path / "killed")
    with pytest.raises(Killed):
        first.run(tmp_path / "killed", save_every=2, after_step=kill)
    torch.manual_seed(99)  # another process
    second = trainer(folder, seed=3, gap=6)
    assert second.resume(tmp_path / "killed")
    assert second.step == 2
    second.run(tmp_path / "killed", save_every=2)
    assert second.losses == whole.losses
    assert all(torch.equal(x, whole.weights[name]) for name, x in second.weights.items())
    with pytest.raises(ValueError, match=r"from a run with other settings: rank, steps"):
        trainer(folder, seed=3, gap=6, steps=9, rank=2).resume(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_whole(tmp_path / "file", b"old")
    monkeypatch.setattr("os.fsync", lambda file: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_whole(tmp_path / "file", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]


def test_batches_and_caches_do_not_change_an_answer(folder):
    """Neither do padding or the other passages. Kept keys and values give what one sequence gives."""
    ours = trainer(folder, most=3)
    with torch.no_grad():
        for weight in ours.weights.values():
            weight.add_(torch.randn_like(weight) * 0.1)
    rng = random.Random(torch.initial_seed())
    some = [ours.lessons.world.episode_of("facts", "train", count, rng) for count in (3, 1, 2)]
    tokenizer = ours.lessons.tokenizer
    with torch.no_grad():
        batch = collate(tokenizer, some)
        together = score(ask(ours.model, batch, write(ours.model, batch)), batch)
        alone = [collate(tokenizer, [episode]) for episode in some]
        apart = [score(ask(ours.model, one, write(ours.model, one)), one) for one in alone]
        expected = torch.cat([x.log_likelihood for x in apart])
        torch.testing.assert_close(together.log_likelihood, expected, atol=1e-4, rtol=0)
        assert not torch.allclose(score(ask(ours.model, batch), batch).log_likelihood, expected, atol=1e-3, rtol=0)
        cache = DynamicCache(config=ours.model.config)
        write(ours.model, batch, cache=cache)
        kept = score(ask(ours.model, batch, cache=cache), batch).log_likelihood
        row = 0
        for episode, one in zip(some, alone, strict=True):
            states = write(ours.model, one)
            for question in range(len(episode.questions)):
                length = int(one.mask[question].sum())
                ids = torch.cat([one.passage[0], one.ids[question, :length]])[None]
                mine = DynamicCache(config=ours.model.config)
                write(ours.model, one, cache=mine)
                step = dataclasses.replace(
                    one,
                    owner=torch.tensor([0]),
                    ids=ids[:, one.passage.shape[1] :],
                    mask=torch.ones(1, length, dtype=torch.long),
                    targets=one.targets[question : question + 1, :length],
                    choices=one.choices[question : question + 1],
                )
                got = score(ask(ours.model, step, states, mine), step).log_likelihood
                torch.testing.assert_close(kept[row : row + 1], got, atol=1e-4, rtol=0)
                row += 1


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_calibrated_values_are_centred(folder, strategy):
    ours = trainer(folder, strategy=strategy, batch=16)
    ours.calibrate()
    memory = ours.model.model.layers[1].self_attn.delta_memory
    seen: list[torch.Tensor] = []
    project = memory._project
    memory._project = lambda x: seen.append(x) or project(x)
    written = []
    with torch.no_grad():
        for part in range(CALIBRATION):
            batch = ours.lessons.batch(-1 - part)
            write(ours.model, batch)
            everything = torch.ones(seen[-1].shape[:2], dtype=torch.bool)  # SSW: the last projected are the means
            written.append(seen[-1][everything if strategy == "ssw" else batch.passage_mask.bool()])
        values = torch.cat(written) @ memory.memory_v_proj.T
    assert values.mean(0).abs().max() < 1e-3  # by construction, over these passages
    assert 0.3 < values.std() < 3
    again = trainer(folder, strategy=strategy, batch=16)
    again.calibrate()
    assert all(torch.equal(x, again.weights[name]) for name, x in ours.weights.items())


def test_a_session_rounds_states_only_if_told(folder):
    """A session is a series of calls of a few tokens. Between them the state may be rounded to bfloat16."""
    ours = trainer(folder)
    ours.calibrate()
    with torch.no_grad():
        for name, weight in ours.weights.items():
            if ".delta_" in name:
                weight.normal_()
    batch = ours.lessons.batch(0)
    text = torch.randint(4, 200, (7,))
    exact = list(session(ours.model, batch, text, [0, 4, 12], rounded=False, window=4))
    assert [row["tokens"] for row in exact] == [0, 4, 12]
    start = score(ask(ours.model, batch, write(ours.model, batch)).detach(), batch).log_likelihood
    assert exact[0]["log_likelihood"]["mean"] == pytest.approx(start.mean().item(), rel=1e-6)
    rounded = session(ours.model, batch, text, [0, 4, 12], rounded=True, window=4)
    for a, b in zip(exact, rounded, strict=True):
        assert a["norm"] == pytest.approx(b["norm"], rel=0.05)
        assert a["norm"] != b["norm"]


@pytest.mark.parametrize("writes", [True, False])
@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_drift_is_zero_until_the_memory_corrects(folder, strategy, writes):
    ours = trainer(folder, strategy=strategy)
    windows = torch.randint(4, 200, (2, 9))
    states = write(ours.model, ours.lessons.batch(0))
    assert drift(ours.model, windows, first(states, 2), writes).abs() < 1e-5  # the corrections are zero
    with torch.no_grad():
        for name, weight in ours.weights.items():
            if ".delta_" in name:
                weight.normal_(std=5)
    states = write(ours.model, ours.lessons.batch(0))
    empty = {index: torch.zeros_like(state[:2]) for index, state in states.items()}
    only_read = not writes or strategy == "ssw"  # there, a message reads what was written before it
    assert (drift(ours.model, windows, empty, writes).abs() < 1e-5) == only_read
    changed = drift(ours.model, windows, first(states, 2), writes)
    changed.backward()
    assert changed > 1e-3
    assert all(weight.grad.abs().sum() > 0 for name, weight in ours.weights.items() if "delta_o_proj" in name)


def test_intervals_cover_the_mean_and_widen_with_clusters():
    values = (torch.arange(200) % 4 == 0).float()
    found = interval(values, torch.arange(200))
    assert found["mean"] == 0.25
    assert 0.17 < found["low"] < 0.22 < 0.28 < found["high"] < 0.33  # 0.25 ± 1.96 · 0.0306
    clustered = interval(values, torch.arange(200) % 4)  # whole passages right or wrong
    assert clustered["high"] - clustered["low"] > 2 * (found["high"] - found["low"])
    assert apart({"low": 0.5, "high": 0.6}, {"low": 0.1, "high": 0.4})
    assert not apart({"low": 0.5, "high": 0.6}, {"low": 0.1, "high": 0.5})


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_the_strategy_has_defaults_of_its_own(strategy, monkeypatch):
    train = importlib.import_module("train")
    monkeypatch.setattr(sys, "argv", ["train.py", "folder", "--strategy", strategy])
    given = train.arguments()
    assert {name: getattr(given, name) for name in BY_STRATEGY[strategy]} == BY_STRATEGY[strategy]
    config = Settings(strategy=strategy, alpha=given.alpha, beta_bias=given.beta_bias).memory(2)
    assert (config.alpha, config.beta_bias_init) == (given.alpha, given.beta_bias)
    monkeypatch.setattr(sys, "argv", ["train.py", "folder", "--strategy", strategy, "--beta-bias", "-2"])
    assert train.arguments().beta_bias == -2


def test_the_defaults_are_those_of_tsw():
    settings = Settings()
    assert {name: getattr(settings, name) for name in BY_STRATEGY["tsw"]} == BY_STRATEGY[settings.strategy]


def test_seeds_are_averaged_in_one_row():
    """The interval of the row covers the intervals of all seeds."""

    def of(low: float, high: float) -> dict:
        return {"mean": (low + high) / 2, "low": low, "high": high}

    def memory(name: str, seed: int, state: tuple[float, float], rank: int = 8) -> dict:
        answers = {"memory, state only": of(*state), "memory, another passage's state": of(0.1, 0.2)}
        ways = {way: {"accuracy": x, "log_likelihood": x} for way, x in answers.items()}
        price = {"frozen": {}, "read only": {"change_percent": of(-1, -seed / 10)}}
        settings = {"seed": seed, "rank": rank}
        return {"name": name, "settings": settings, "answers": {"facts": ways, "a dialogue": ways}, "price": price}

    frozen = {way: {"accuracy": of(0.0, 0.3), "log_likelihood": of(-2, -1)} for way in FROZEN}
    memories = [memory("a", 0, (0.4, 0.5)), memory("b", 1, (0.6, 0.7)), memory("c", 1, (0.29, 0.5), rank=4)]
    text = markdown({"frozen": {"facts": frozen, "a dialogue": frozen}, "memories": memories})
    right, likelihood, price = text.split("\n\n**")
    assert "| a (2 seeds): state only | **55.0 % [40, 70]** |" in right
    assert "| c: state only | 39.5 % [29, 50] |" in right
    assert "| a (2 seeds): state only | **0.55 [0.40, 0.70]** | **0.55 [0.40, 0.70]** |" in likelihood
    assert "| read only | -0.53 % [-1.00, +0.00] | -0.55 % [-1.00, -0.10] |" in price


@pytest.mark.slow
def test_the_commands_train_and_evaluate_in_new_processes(folder, tmp_path):
    """The table of the new process is the one that this process computes from the same files."""
    run, results = tmp_path / "run", tmp_path / "results.json"
    train = ["train.py", run, "--model", folder, "--steps", "3", "--batch", "2", "--dtype", "float32"]
    small = ["--passages", "5", "--facts", "1", "--recall", "2", "--dialogues", "0", "--windows", "2", "--window", "24"]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    last = ["session.py", run, "--passages", "2", "--window", "8", "--longest", "16", "--json", tmp_path / "last.json"]
    for command in (train, [*last, "--plot", tmp_path / "last.png"], ["evaluate.py", run, *small, "--json", results]):
        command = [sys.executable, str(EXAMPLES / command[0]), *map(str, command[1:])]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
    assert {"checkpoint.pt", LOSSES, "loss.png"} <= {path.name for path in run.iterdir()}
    rows = json.loads((tmp_path / "last.json").read_text())["rows"]
    assert [(x["memory"], x["state"], x["tokens"]) for x in rows] == [
        ("run", state, tokens) for state in ("float32", "bfloat16") for tokens in (0, 8, 16)
    ]
    assert (tmp_path / "last.png").read_bytes().startswith(b"\x89PNG")
    table = json.loads(results.read_text())
    (memory,) = table["memories"]
    model, tokenizer = load_backbone(str(folder))
    name, (task, part, count) = "passwords, 2 in a passage", ("recall", "held-out", 2)
    some = episodes(world_of(tokenizer, 8), task, part, count, 5)
    assert flat(table["frozen"][name]) == near(answers(model, tokenizer, some, FROZEN, "cpu"))
    load_adapter(model, run)
    assert flat(memory["answers"][name]) == near(answers(model, tokenizer, some, MEMORY, "cpu"))
    assert len(memory_layers(model)) == 2
    assert memory["answers"][name]["memory, state only"] != memory["answers"][name]["memory, another passage's state"]
    assert set(memory["price"]) == {
        "frozen",
        "empty, written and read",
        "a passage's state, read only",
        "a passage's state, written and read",
    }
    assert "| run: state only |" in ran.stdout
    AutoModelForCausalLM.from_pretrained(folder)  # untouched by all that


def near(table: dict) -> object:
    """Allow for the rounding of a sum, which depends on the number of threads."""
    return pytest.approx(flat(table), rel=1e-5)


def flat(table: dict) -> dict[tuple[str, ...], float]:
    return {
        (row, measure, what): x
        for row, measures in table.items()
        for measure, interval in measures.items()
        for what, x in interval.items()
    }
