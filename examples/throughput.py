"""Compare training throughput with the δ-mem authors' code: same task, weights and machine, alternating in one run.

    python examples/throughput.py --upstream .peers/delta-Mem --json throughput.json

The authors' code supports SmolLM3 and Qwen3, so SmolLM2's weights are loaded into the SmolLM3 class, with rotary
embeddings in every layer. A step writes a passage, answers a question from the states, and runs backward and AdamW, all
in float32. There is no padding, because the authors' code reads boolean masks inverted. CPU time is reported next to
wall-clock time: on a busy machine only CPU times are comparable.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from remembering.backbone import SMOLLM2, load_backbone
from remembering.checkpoint import write_whole
from remembering.machine import header
from torch import Tensor
from torch.nn import functional as F
from transformers import SmolLM3Config, SmolLM3ForCausalLM

from deltamem_kernels.integrations.transformers import MemoryCall, attach_memory
from deltamem_kernels.nn import DeltaMemConfig

MEMORY = {"rank": 8, "delta_heads": ("q", "o")}


def load_smollm3(name: str) -> SmolLM3ForCausalLM:
    """Load a SmolLM2 model into the SmolLM3 class."""
    model, _ = load_backbone(name)
    shared = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"}
    shared |= {"vocab_size", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "rope_parameters"}
    fields = {key: value for key, value in model.config.to_dict().items() if key in shared}
    layers = fields["num_hidden_layers"]
    special = {"no_rope_layers": [1] * layers, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    config = SmolLM3Config(**fields, **special)
    config._attn_implementation = "sdpa"
    built = SmolLM3ForCausalLM(config)
    built.load_state_dict(model.state_dict())
    return built.eval().requires_grad_(False)


def ours(name: str) -> tuple[torch.nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    model = load_smollm3(name)
    attach_memory(model, DeltaMemConfig(**MEMORY))

    def loss(passage: Tensor, question: Tensor) -> Tensor:
        with MemoryCall(model) as call:
            model.get_decoder()(passage, use_cache=False)
        with MemoryCall(model, call.states, write=False):
            return _loss(model, question)

    return model, loss


def upstream(name: str) -> tuple[torch.nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    from deltamem.core import delta  # type: ignore[import-not-found]

    model = load_smollm3(name)
    delta.attach_delta_mem(model, delta.HFDeltaMemConfig(**MEMORY))
    delta.freeze_non_delta_mem_params(model)

    def loss(passage: Tensor, question: Tensor) -> Tensor:
        delta.reset_delta_mem_states(model)
        delta.set_delta_mem_write_enabled(model, True)
        model.get_decoder()(passage, use_cache=False)
        delta.set_delta_mem_write_enabled(model, False)
        return _loss(model, question)

    return model, loss


def _loss(model, question: Tensor) -> Tensor:
    logits = model(question, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), question[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", type=Path, required=True, help="a checkout of declare-lab/delta-Mem")
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--passage", type=int, nargs="+", default=[32, 256], help="tokens")
    parser.add_argument("--question", type=int, default=16, help="tokens")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    sys.path.insert(0, str(given.upstream))
    makers = {"ours": ours, "upstream": upstream}
    trained = {name: make(given.model) for name, make in makers.items()}
    optimizers = {
        name: torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=1e-3)
        for name, (model, _) in trained.items()
    }
    rows = []
    generator = torch.Generator().manual_seed(0)
    for tokens in given.passage:
        passage, question = (
            torch.randint(1000, 9000, (given.batch, length), generator=generator) for length in (tokens, given.question)
        )
        clock: dict[str, list[float]] = {name: [] for name in trained}
        processor: dict[str, list[float]] = {name: [] for name in trained}
        first = {}
        for turn in range(given.steps + 1):  # the first step is a warm-up
            for name, (_, loss) in trained.items():
                begin, begin_cpu = time.perf_counter(), time.process_time()
                value = loss(passage, question)
                value.backward()
                optimizers[name].step()
                optimizers[name].zero_grad()
                if turn:
                    clock[name].append(time.perf_counter() - begin)
                    processor[name].append(time.process_time() - begin_cpu)
                first.setdefault(name, value.item())
        for name in trained:
            row = {"implementation": name, "batch": given.batch, "passage": tokens, "question": given.question}
            row |= {"seconds": statistics.median(clock[name]), "cpu_seconds": statistics.median(processor[name])}
            row["tokens_per_cpu_second"] = given.batch * (tokens + given.question) / row["cpu_seconds"]
            row["first_loss"] = first[name]
            rows.append(row)
            print(row, flush=True)
    if given.json:
        write_whole(given.json, (json.dumps({**header(), "rows": rows}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
