"""`python -m benchmarks.upstream_parity --upstream .peers/delta-Mem`: compare our logits with the δ-mem authors' code.

The authors' code attaches a memory with random weights to a small random Qwen3 or SmolLM3 and saves its adapter.
`load_adapter` loads it into the same backbone. The comparison covers the float32 logits of all tokens except padding:
two sequences in one call, then eight more tokens one by one with the cache. The logits of the authors' code after
`patch` are compared too. The exit status is 1 if any difference exceeds 1e-5.

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
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

LIMIT = 1e-5
BATCH, PROMPT, STEPS, PADS = 2, 24, 8, 5
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
    "scale, RMSNorm": {
        "delta_heads": ("q", "k", "v", "o"), "trainable_delta_scale": True, "delta_scale_granularity": "head",
        "delta_o_rmsnorm": True, "delta_o_rmsnorm_eps": 1e-2,
    },
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


def pair(kind: str, fields: dict) -> tuple[nn.Module, nn.Module]:
    """Return a model with the authors' memory, and one with ours that loaded the authors' saved adapter."""
    from deltamem.core.delta import HFDeltaMemConfig, attach_delta_mem, freeze_non_delta_mem_params
    from deltamem.core.delta_impl import save_delta_mem_adapter

    from deltamem_kernels.integrations.transformers import load_adapter

    ours = backbone(kind)
    theirs, config = copy.deepcopy(ours), HFDeltaMemConfig(output_init="random", online_gain=0.3, **fields)
    attach_delta_mem(theirs, config)
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
        load_adapter(ours, folder)
    return theirs, ours


class Request:
    """Two sequences, the second with optional padding.

    For a memory that writes messages or sentences, the first call writes and the later calls, which have no ids, only
    read.
    """

    def __init__(self, granularity: str, padding: str) -> None:
        self.granularity = granularity
        self.ids = torch.randint(2, VOCABULARY, (BATCH, PROMPT + STEPS))
        self.mask = torch.ones(BATCH, PROMPT + STEPS, dtype=torch.int64)
        if padding != "none":
            self.mask[1, slice(0, PADS) if padding == "left" else slice(PROMPT - PADS, PROMPT)] = 0
        self.sentences = torch.arange(PROMPT).div(4, rounding_mode="floor").expand(BATCH, -1).clone()
        self.sentences[:, ::7] = -1
        self.messages = self.sentences.div(2, rounding_mode="floor")

    @torch.no_grad()
    def logits(self, model: nn.Module, prompt: Callable, step: Callable) -> Tensor:
        """Return the logits of all tokens except padding, `[tokens, vocabulary]`.

        The first call runs in the context manager `prompt()` and each later one in `step()`.
        """
        from transformers import DynamicCache

        from deltamem_kernels.integrations.transformers.cache_keyword import cache_keyword

        cache, found = DynamicCache(config=model.config), []
        for start, end in [(0, PROMPT), *((t, t + 1) for t in range(PROMPT, PROMPT + STEPS))]:
            chunk, mask = self.ids[:, start:end], self.mask[:, :end]
            with step() if start else prompt():
                options = {"attention_mask": mask, "use_cache": True, cache_keyword(model): cache}
                found.append(model(input_ids=chunk, **options).logits)
        return torch.cat(found, 1)[self.mask.bool()]

    def their_logits(self, model: nn.Module) -> Tensor:
        from deltamem.core import delta

        delta.reset_delta_mem_states(model)
        delta.set_delta_mem_write_enabled(model, True)
        if self.granularity != "token":
            delta.set_delta_mem_write_message_ids(model, self.messages)
            delta.set_delta_mem_write_sentence_ids(model, self.sentences)
        writes = self.granularity == "token"
        return self.logits(model, nullcontext, lambda: nullcontext(delta.set_delta_mem_write_enabled(model, writes)))

    def our_logits(self, model: nn.Module) -> Tensor:
        from deltamem_kernels.integrations.transformers import MemoryCall

        if self.granularity == "token":
            return self.plain_logits(model)
        ids = {"message_ids": self.messages}
        if self.granularity == "sentence_mean":
            ids["sentence_ids"] = self.sentences
        return self.logits(model, lambda: MemoryCall(model, **ids), lambda: MemoryCall(model, write=False))

    def plain_logits(self, model: nn.Module) -> Tensor:
        return self.logits(model, nullcontext, nullcontext)


def compare(kind: str, fields: dict, padding: str) -> tuple[float, float, float]:
    """Return the largest differences from the authors' logits: of ours, of theirs after patch(), and of the frozen
    model."""
    from deltamem_kernels.integrations.transformers import detach_memory
    from deltamem_kernels.integrations.upstream import patch, unpatch

    theirs, ours = pair(kind, fields)
    request = Request(fields.get("memory_write_granularity", "token"), padding)
    expected, got = request.their_logits(theirs), request.our_logits(ours)
    patch()
    patched = request.their_logits(theirs)
    unpatch()
    detach_memory(ours)
    frozen = request.plain_logits(ours)
    our_difference, patched_difference, frozen_difference = (
        (other - expected).abs().max().item() for other in (got, patched, frozen)
    )
    return our_difference, patched_difference, frozen_difference


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.upstream_parity", description=__doc__)
    parser.add_argument(
        "--upstream", type=Path, help="a clone of declare-lab/delta-Mem, unless `deltamem` is installed"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.upstream:
        sys.path.insert(0, str(options.upstream))
    torch.manual_seed(options.seed)
    print(f"{'model':8} {'memory':20} {'mode':15} {'padding':8} {'ours':>8} {'patched':>8} {'frozen':>7}")
    cases, differences = list(itertools.product(KINDS, MEMORIES, MODES, PADDINGS)), []
    for kind, name, mode, padding in cases:
        ours, patched, frozen = compare(kind, {**MEMORIES[name], "state_update_mode": mode}, padding)
        print(f"{kind:8} {name:20} {mode:15} {padding:8} {ours:8.1e} {patched:8.1e} {frozen:7.2g}")
        differences += [ours, patched]
    over = sum(not difference <= LIMIT for difference in differences)  # counts NaN as well
    print(f"{len(cases)} cases, largest difference {max(differences):.1e}; over {LIMIT:.0e}: {over}")
    return int(over > 0)


if __name__ == "__main__":
    sys.exit(main())
