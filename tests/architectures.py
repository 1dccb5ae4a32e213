"""Small random models of every text decoder of transformers, and what holds of them with a memory.

python tests/architectures.py > docs/architectures.md
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from deltamem_kernels.integrations.transformers import MemoryCall, attach_memory, memory_layers
from deltamem_kernels.integrations.transformers.cache_keyword import cache_keyword
from deltamem_kernels.nn import DeltaMemConfig
from deltamem_kernels.testing import relative_error

CLOSE = 2e-5  # of ‖logits‖: two orders of the same float32 sums
VOCABULARY = 99
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "n_embd": 64, "d_model": 64, "dim": 64, "num_hidden_layers": 2,
    "n_layer": 2, "num_layers": 2, "n_layers": 2, "num_attention_heads": 4, "n_head": 4, "num_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 96, "ffn_dim": 96, "n_inner": 96, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "max_position_embeddings": 128, "n_positions": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None, "sliding_window": 64, "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "num_kv_shared_layers": 0, "index_n_heads": 4, "index_head_dim": 16,
    "q_lora_rank": 32, "kv_lora_rank": 32,
}  # fmt: skip
SPECIAL: dict[str, dict] = {
    "bailing_hybrid": {"num_key_value_heads": 4},
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "kimi_linear": {"num_key_value_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "zaya": {"num_experts_per_tok": 1},
}
LARGEST = 5_000_000


def kinds() -> list[str]:
    """Return the model types of all text decoders."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def build(kind: str) -> nn.Module:
    """Return a small random model of a type, in evaluation mode."""
    default = CONFIG_MAPPING[kind]()
    fields = {name: size for name, size in SIZES.items() if name in vars(default)} | SPECIAL.get(kind, {})
    kinds_of_layers = sorted(set(vars(default).get("layer_types") or []), reverse=True)
    if len(kinds_of_layers) > 1 and "layer_types" not in fields:
        fields["layer_types"] = kinds_of_layers
        fields["num_hidden_layers"] = len(kinds_of_layers)
    config = CONFIG_MAPPING[kind](**fields)
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    cls = getattr(transformers, name if isinstance(name, str) else name[0])
    with torch.device("meta"):
        parameters = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
    if parameters > LARGEST:
        raise ValueError(f"{parameters:,} parameters with the sizes that are set here")
    model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.isfinite().all():
                parameter.normal_(std=0.02)
    return model.eval().requires_grad_(False)


def with_memory(model: nn.Module) -> nn.Module:
    """Return a copy of a model with a random memory."""
    model = copy.deepcopy(model)
    attach_memory(model, DeltaMemConfig())
    with torch.no_grad():
        for _, layer in memory_layers(model):
            for name, weight in layer.delta_memory.named_parameters():
                weight.add_(torch.randn_like(weight) * (0.1 if name.endswith("proj") else 0.5))
    return model


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (batch, length))


@torch.no_grad()
def logits(model, ids, **given) -> torch.Tensor:
    return model(input_ids=ids, **given).logits


def by_cache(model) -> float:
    """Prefill and single tokens against one call."""
    ids, keyword = tokens(2, 10), cache_keyword(model)
    whole, parts, cache = logits(model, ids, use_cache=False), [], DynamicCache(config=model.config)
    for part in ids.split([5, *[1] * 5], dim=1):
        parts.append(logits(model, part, use_cache=True, **{keyword: cache}))
    return relative_error(torch.cat(parts, 1), whole)


def by_padding(model) -> float:
    """A row with leading padding against the row alone."""
    row, mask = tokens(1, 6), torch.ones(2, 9, dtype=torch.long)
    ids = tokens(2, 9)
    ids[1, :3], ids[1, 3:], mask[1, :3] = 0, row[0], 0
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    return relative_error(logits(model, ids, use_cache=False, **given)[1, 3:], logits(model, row, use_cache=False)[0])


def by_packing(model) -> float:
    """Packed sequences against the sequences alone."""
    parts = [tokens(1, n) for n in (4, 7)]
    positions = torch.cat([torch.arange(x.shape[1]) for x in parts])[None]
    packed = logits(model, torch.cat(parts, 1), position_ids=positions, use_cache=False)
    return relative_error(packed, torch.cat([logits(model, x, use_cache=False) for x in parts], 1))


def by_checkpointing(model) -> float:
    """Gradients of the memory's weights with checkpointed layers, after the MemoryCall, against those without."""
    ids, found = tokens(2, 8), []
    states = {layer.layer_idx: torch.randn(2, 1, 8, 8) for _, layer in memory_layers(model)}
    weights = [p for _, layer in memory_layers(model) for p in layer.delta_memory.parameters()]
    for checkpointed in (False, True):
        each = copy.deepcopy(model).train()
        weights = [p for _, layer in memory_layers(each) for p in layer.delta_memory.parameters() if p.requires_grad]
        for module in each.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointed:
            each.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        with MemoryCall(each, states):
            out = each(input_ids=ids, use_cache=False).logits
        out.square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in weights if p.grad is not None]))
    assert found[0].any()
    return relative_error(found[1], found[0])


def by_generation(model) -> float:
    """Generated tokens with a cache against those without: 0 if they are the same."""
    ids = tokens(1, 6)
    usual = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    with torch.no_grad():
        return float(not torch.equal(model.generate(ids, **usual), model.generate(ids, **usual, use_cache=False)))


PROPERTIES = {
    "cache": by_cache, "padding": by_padding, "packed": by_packing, "checkpointing": by_checkpointing,
    "generation": by_generation,
}  # fmt: skip


def attempt(check: Callable[[], Any]) -> Any:
    """Return what a check returns, or its error in words."""
    try:
        return check()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def examine(kind: str) -> dict[str, str]:
    """Return the cells of an architecture's row: whether a memory fits, and a cell for each property.

    A property is "yes" if it holds with the memory, "frozen: no" if it does not hold of the model without one, and
    otherwise says what is wrong.
    """
    ids = tokens(1, 7)
    try:
        model = build(kind)
    except Exception:
        return {"memory": "not built"}
    try:
        other = with_memory(model)
    except ValueError as error:
        return {"memory": f"no: {error}"}
    before = attempt(lambda: logits(model, ids, use_cache=False))
    if isinstance(before, str):
        return {"memory": "not built"}
    row = {"memory": "yes"}
    changed = attempt(lambda: relative_error(logits(other, ids, use_cache=False), before))
    if isinstance(changed, str) or changed < 1e-4:
        row["memory"] = f"wrong: {changed}"
        return row
    for name, check in PROPERTIES.items():
        frozen = 0.0 if name == "checkpointing" else attempt(lambda check=check: check(model))
        if isinstance(frozen, str) or frozen > CLOSE or (name == "generation" and row["cache"] != "yes"):
            row[name] = "frozen: no"
            continue
        ours = attempt(lambda check=check: check(other))
        row[name] = "yes" if not isinstance(ours, str) and ours <= CLOSE else f"wrong: {ours}"
    return row


def page(rows: dict[str, dict[str, str]]) -> str:
    """Return docs/architectures.md."""
    fitting = [kind for kind, row in rows.items() if row["memory"] == "yes"]
    refused = [kind for kind, row in rows.items() if row["memory"].startswith("no: ")]
    unbuilt = [kind for kind, row in rows.items() if row["memory"] == "not built"]
    table = [f"| {kind} | {' | '.join(rows[kind][name] for name in PROPERTIES)} |" for kind in fitting]
    return f"""# Architectures

The text decoders of transformers {transformers.__version__}, each as a small random model with a memory that changes
the logits. The tests make this page and check it. They compare

- cache: prefill and decoding, token by token, through the model's cache with one call;
- padding: a row with leading padding with the row alone;
- packed: packed sequences with the sequences alone;
- checkpointing: gradients with checkpointed layers with gradients without, after the `MemoryCall`;
- generation: generation with a cache with generation without.

"frozen: no" means that the model without a memory does not have the property either.

| architecture | {" | ".join(PROPERTIES)} |
|---|{"---|" * len(PROPERTIES)}
{chr(10).join(table)}

## Without a memory

`attach_memory` raises for these, and says why. Most have no separate q_proj, k_proj, v_proj and o_proj:

{", ".join(refused)}.

## Not tested

No small model of these was built with the sizes that the tests set. Some of them contain a text decoder of the table:

{", ".join(unbuilt)}.
"""


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    print(page({kind: examine(kind) for kind in kinds()}), end="")
