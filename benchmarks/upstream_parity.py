"""`python -m benchmarks.upstream_parity --upstream .peers/delta-Mem`: compare results with the δ-mem authors' code.

The authors' code attaches a memory with random weights to a small random Qwen3 or SmolLM3 and saves its adapter.
`load_adapter` loads it into the same backbone. Three checks run for each memory, mode and padding, on two sequences:

- one prompt: the float32 logits of a prompt in one call, and of eight more tokens one by one with the cache.
- random cuts: the float32 logits of a prompt in four calls of random lengths, and of six more tokens.
- gradients: the float64 gradients of all trained weights and of the inputs, through two calls that share a cache.

Padding is left out. Each check covers `load_adapter` ("ours") and the authors' code after `patch` ("patched"). The exit
status is 1 if a logit differs by more than 1e-5, or a gradient by more than 1e-7 of its norm: the RMSNorms of
transformers round to float32 also in a float64 model.

The random weights avoid ill-conditioned memories. Keys that are not normalised are short, because the rule is unstable
with keys longer than 1. RMSNorm weights are small, because the norm amplifies corrections near zero.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .models import rename_cache_keyword
from .progress import Progress

LIMITS = {"one prompt": 1e-5, "random cuts": 1e-5, "gradients": 1e-7}
BATCH, PROMPT, PADS = 2, 24, 5
VOCABULARY = 99
KINDS = ("Qwen3", "SmolLM3")
MODES = ("standard", "lambda_outside", "no_lambda")
PADDINGS = ("none", "left", "right")

MEMORIES: dict[str, dict] = {
    "q": {"delta_heads": ("q",)},
    "o": {"delta_heads": ("o",)},
    "qkvo": {"delta_heads": ("q", "k", "v", "o")},
    "MSW, 4 heads": {"delta_heads": ("q", "o"), "num_state_heads": 4},
    "gates per head": {"delta_heads": ("q", "o"), "num_state_heads": 2, "rankwise_gates": False},
    "separate λ": {"delta_heads": ("q", "o"), "couple_lambda": False},
    "q, k not normalised": {"delta_heads": ("q", "o"), "normalize_qk": False},
    "scale per layer": {"trainable_delta_scale": True, "delta_scale_granularity": "layer"},
    "scale per head": {"trainable_delta_scale": True, "delta_scale_granularity": "head"},
    "RMSNorm": {"delta_heads": ("q", "o"), "delta_o_rmsnorm": True, "delta_o_rmsnorm_eps": 1e-2},
    "scale, RMSNorm": {
        "delta_heads": ("q", "k", "v", "o"), "trainable_delta_scale": True, "delta_scale_granularity": "head",
        "delta_o_rmsnorm": True, "delta_o_rmsnorm_eps": 1e-2,
    },
    "layers 0 and 2": {"target_layers": (0, 2)},
    "SSW, messages": {"delta_heads": ("q", "o"), "memory_write_granularity": "message_mean"},
    "SSW, sentences": {"delta_heads": ("q", "o"), "memory_write_granularity": "sentence_mean", "num_state_heads": 2},
}  # fmt: skip


def backbone(kind: str) -> nn.Module:
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": VOCABULARY}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1}
    special = {"Qwen3": {"head_dim": 16}, "SmolLM3": {"no_rope_layers": [1, 0, 1]}}[kind]
    config = getattr(transformers, f"{kind}Config")(**sizes, eos_token_id=None, **special)
    config._attn_implementation = "eager"  # sdpa uses boolean masks, which the authors' code reads inverted
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)


def pair(kind: str, fields: dict, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Return a model with the authors' memory, and one with ours that loaded the authors' saved adapter."""
    from deltamem.core.delta import HFDeltaMemConfig, attach_delta_mem, freeze_non_delta_mem_params
    from deltamem.core.delta_impl import save_delta_mem_adapter

    from deltamem_kernels.integrations.transformers import load_adapter

    ours = backbone(kind).to(dtype)
    theirs, config = copy.deepcopy(ours), HFDeltaMemConfig(output_init="random", online_gain=0.3, **fields)
    attach_delta_mem(theirs, config)
    rename_cache_keyword(theirs)
    freeze_non_delta_mem_params(theirs)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if weight.requires_grad and not name.endswith(("q_proj", "k_proj", "v_proj", "o_proj")):
                weight.add_(0.3 * torch.randn_like(weight))  # their code starts these at zero or a constant
            if not config.normalize_qk and name.endswith("memory_k_proj"):
                weight.mul_(0.5)
            if name.endswith("delta_o_rmsnorm_weight"):
                weight.mul_(0.3)
    with tempfile.TemporaryDirectory() as folder:
        save_delta_mem_adapter(theirs, folder, config)
        load_adapter(ours, folder, dtype=dtype)
    return theirs, ours


class KeepFloat64(TorchFunctionMode):
    """Let `x.float()` return x if it is float64 and requires a gradient.

    The authors' RMSNorm of corrections otherwise rounds to float32: errors of their gradients up to 1e-5 were measured.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.float and args[0].dtype == torch.float64 and args[0].requires_grad:
            return args[0]
        return func(*args, **(kwargs or {}))


BeforeCall = Callable[[nn.Module, int, int], AbstractContextManager]
"""Prepares a model for a call with the tokens from start to end. The call runs in the returned context manager."""


class Request:
    """Two sequences, the second with optional padding: a prompt, cut into calls, and steps of one token.

    For a memory that writes messages or sentences, the calls of the prompt write, and the steps, which have no ids,
    only read.
    """

    def __init__(self, granularity: str, padding: str, *, cuts: list[int], steps: int) -> None:
        self.granularity = granularity
        self.calls = list(itertools.pairwise([0, *cuts, *range(PROMPT, PROMPT + steps + 1)]))
        self.ids = torch.randint(2, VOCABULARY, (BATCH, PROMPT + steps))
        self.mask = torch.ones(BATCH, PROMPT + steps, dtype=torch.int64)
        if padding != "none":
            self.mask[1, slice(0, PADS) if padding == "left" else slice(PROMPT - PADS, PROMPT)] = 0
        self.sentences = torch.arange(PROMPT).div(4, rounding_mode="floor").expand(BATCH, -1).clone()
        self.sentences[:, ::7] = -1
        self.messages = self.sentences.div(2, rounding_mode="floor")
        self.cotangents = torch.randn(int(self.mask.sum()), VOCABULARY, dtype=torch.float64)

    @torch.no_grad()
    def logits(self, model: nn.Module, before_call: BeforeCall) -> Tensor:
        """Return the logits of all tokens except padding, `[tokens, vocabulary]`."""
        return self._run(model, before_call, lambda start, end: self.mask[:, :end], input_ids=self.ids)

    def gradients(self, model: nn.Module, before_call: BeforeCall) -> dict[str, Tensor]:
        """Return the gradients of the trained weights, under the authors' names, and of the embedded "inputs"."""
        inputs = model.get_input_embeddings()(self.ids).detach().requires_grad_()
        weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        loss = (self._run(model, before_call, self._additive_mask, inputs_embeds=inputs) * self.cotangents).sum()
        found = torch.autograd.grad(loss, [inputs, *weights.values()], allow_unused=True, materialize_grads=True)
        return dict(zip(["inputs", *(name.replace("delta_memory.", "") for name in weights)], found, strict=True))

    def _additive_mask(self, start: int, end: int) -> Tensor:
        """Return the mask that transformers makes for float32.

        That for float64 holds float64's minimum, which is -inf in the float32 softmax of eager attention: NaN for left
        padding.
        """
        attended = self.mask[:, None, None, :end].bool() & torch.ones(end, end, dtype=torch.bool).tril()[start:]
        return torch.zeros(attended.shape, dtype=torch.float64).masked_fill(~attended, torch.finfo(torch.float32).min)

    def _run(self, model: nn.Module, before_call: BeforeCall, mask: Callable[[int, int], Tensor], **inputs: Tensor):
        """Return the logits of all tokens except padding. `mask(start, end)` is the attention mask of a call."""
        from transformers import DynamicCache

        from deltamem_kernels.integrations.transformers.cache_keyword import cache_keyword

        cache, found = DynamicCache(config=model.config), []
        for start, end in self.calls:
            options = {"attention_mask": mask(start, end), "use_cache": True, cache_keyword(model): cache}
            with before_call(model, start, end):
                found.append(model(**{name: x[:, start:end] for name, x in inputs.items()}, **options).logits)
        return torch.cat(found, 1)[self.mask.bool()]

    def before_their_call(self, model: nn.Module, start: int, end: int) -> AbstractContextManager:
        from deltamem.core import delta

        if start == 0:
            delta.reset_delta_mem_states(model)
        delta.set_delta_mem_write_enabled(model, start < PROMPT or self.granularity == "token")
        if start < PROMPT and self.granularity != "token":
            delta.set_delta_mem_write_message_ids(model, self.messages[:, start:end])
            delta.set_delta_mem_write_sentence_ids(model, self.sentences[:, start:end])
        return KeepFloat64() if torch.is_grad_enabled() else nullcontext()

    def before_our_call(self, model: nn.Module, start: int, end: int) -> AbstractContextManager:
        from deltamem_kernels.integrations.transformers import MemoryCall

        if self.granularity == "token":
            return nullcontext()
        if start >= PROMPT:
            return MemoryCall(model, write=False)
        ids = {"message_ids": self.messages[:, start:end]}
        if self.granularity == "sentence_mean":
            ids["sentence_ids"] = self.sentences[:, start:end]
        return MemoryCall(model, **ids)


def random_cuts(count: int) -> list[int]:
    """Return increasing places in the prompt. Calls have at least two tokens, so that one of them has message ids.

    The authors' code writes every token of a call without ids.
    """
    places = torch.randperm(PROMPT - 2 - count)[:count].sort().values
    return (places + torch.arange(2, 2 + count)).tolist()


class Compared(NamedTuple):
    differences: dict[tuple[str, str], float]
    """The difference from the authors' results by check and by "ours" or "patched"."""
    frozen: float
    """The difference of the frozen model's logits from those of the authors' memory."""


def compare(kind: str, fields: dict, padding: str) -> Compared:
    from deltamem_kernels.integrations.transformers import detach_memory
    from deltamem_kernels.integrations.upstream import patch, unpatch

    granularity, differences = fields.get("memory_write_granularity", "token"), {}

    def run(check: str, models: tuple[nn.Module, nn.Module], request: Request, results: Callable, difference: Callable):
        theirs, ours = models
        expected = results(theirs, request.before_their_call)
        differences[check, "ours"] = difference(results(ours, request.before_our_call), expected)
        patch()
        differences[check, "patched"] = difference(results(theirs, request.before_their_call), expected)
        unpatch()
        return expected

    models = pair(kind, fields, torch.float32)
    cut = Request(granularity, padding, cuts=random_cuts(3), steps=6)
    run("random cuts", models, cut, cut.logits, largest_difference)
    whole = Request(granularity, padding, cuts=[], steps=8)
    expected = run("one prompt", models, whole, whole.logits, largest_difference)
    detach_memory(models[1])
    frozen = largest_difference(whole.logits(models[1], lambda *call: nullcontext()), expected)

    models = pair(kind, fields, torch.float64)
    trained = Request(granularity, padding, cuts=random_cuts(1), steps=0)
    run("gradients", models, trained, trained.gradients, largest_relative_error)
    return Compared(differences, frozen)


def largest_difference(got: Tensor, expected: Tensor) -> float:
    return (got - expected).abs().max().item()


def largest_relative_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    from deltamem_kernels.testing import relative_error

    assert got.keys() == expected.keys(), f"gradients of different weights: {got.keys() ^ expected.keys()}"
    zero = [name for name, x in expected.items() if not x.any() and "lambda" not in name]  # no_lambda does not use λ
    assert not zero, f"gradients that are zero: {zero}"
    return largest([relative_error(got[name], expected[name]) for name in expected])


def table(found: dict[str, list[Compared]]) -> str:
    """Return the largest differences of each memory, and the least difference of the frozen model's logits."""
    lines = [
        f"{'':20}" + "".join(f" | {check:^17}" for check in LIMITS) + " | frozen",
        f"{'memory':20}" + f" | {'ours':>8} {'patched':>8}" * len(LIMITS) + " | least",
    ]
    for name, cases in {**found, "all": list(itertools.chain(*found.values()))}.items():
        cells = ""
        for check in LIMITS:
            ours, patched = (largest([case.differences[check, who] for case in cases]) for who in ("ours", "patched"))
            cells += f" | {ours:8.1e} {patched:8.1e}"
        lines.append(f"{name:20}{cells} | {min(case.frozen for case in cases):.2g}")
    return "\n".join(lines)


def largest(values: list[float]) -> float:
    """Return the largest value, NaN if one is NaN."""
    return torch.tensor(values, dtype=torch.float64).max().item()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.upstream_parity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--upstream", type=Path, help="a clone of declare-lab/delta-Mem, unless `deltamem` is installed"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memories", nargs="+", choices=MEMORIES, default=list(MEMORIES), metavar="NAME")
    options = parser.parse_args()
    if options.upstream:
        sys.path.insert(0, str(options.upstream))
    every = enumerate(itertools.product(MEMORIES, KINDS, MODES, PADDINGS), options.seed)
    cases = [(seed, case) for seed, case in every if case[0] in options.memories]
    found: dict[str, list[Compared]] = {name: [] for name in options.memories}
    over = 0
    with Progress(len(cases)) as progress:
        for seed, (name, kind, mode, padding) in cases:
            progress.describe(f"{kind}, {name}, {mode}, padding {padding}")
            torch.manual_seed(seed)
            compared = compare(kind, {**MEMORIES[name], "state_update_mode": mode}, padding)
            found[name].append(compared)
            for (check, who), difference in compared.differences.items():
                if not difference <= LIMITS[check]:  # NaN as well
                    over += 1
                    print(f"over {LIMITS[check]:.0e}: {kind}, {name}, {mode}, {padding}, {check}, {who}: {difference}")
            progress.advance(1)
    print(table(found))
    print(f"{len(cases)} cases, {2 * len(LIMITS) * len(cases)} comparisons; over the limit: {over}")
    return int(over > 0)


if __name__ == "__main__":
    sys.exit(main())
