"""A tiny random model of each text decoder of transformers, from a configuration with small sizes."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
import transformers
from models import VOCABULARY
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MODEL_TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
MOST_WEIGHTS = 4_000_000
"""A model with more weights than this has a size that was not made small."""

LAYERS, WINDOW = 2, 8
NUMBER_OF_LAYERS = "num_hidden_layers|n_layers?|num_layers|(num_)?(decoder|encoder)_layers|num_blocks"
SMALL: dict[str, Any] = {  # regular expressions of the names of fields
    "hidden_size|d_model|n_embd|emb_dim|embedding_size|embedding_dim": 64,
    "word_embed_proj_dim|lru_width|backbone_hidden_size": 64,
    "input_embedding_size|output_embedding_size|pronunciation_embed_dim|shape_embed_dim": 64,
    "num_attention_heads|n_heads?|num_heads|(num_)?(decoder|encoder)_attention_heads|attention_heads": 4,
    "num_key_value_heads|num_kv_heads|num_query_groups": 2,
    "head_dim|attention_head_size|d_head|dim_head|kv_channels": 16,
    "swa_num_attention_heads|linear_num_(value_)?heads|index_n_heads|mamba_n(um)?_heads": 4,
    "swa_num_key_value_heads|linear_num_key_heads": 2,
    "swa_head_dim|linear_(key_|value_)?head_dim|index_head_dim|global_head_dim": 16,
    "(q|kv|o)_lora_rank|qk_nope_head_dim|v_head_dim": 16,
    "qk_rope_head_dim|rotary_dim": 8,
    r"(\w+_)?intermediate_size(_mlp)?|(\w+_)?ffn_dim|ffn_hidden_size|dff|dim_ff|d_inner|feed_forward_size": 48,
    "(moe_)?num_(local_)?experts|n_routed_experts|moe_num_experts": 4,
    "num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts": 2,
    "n_groups|mamba_n_?groups": 2,
    "n_group|topk_group|num_expert_group|o_groups": 1,
    "(max|n)_position(_embedding)?s|(decoder_)?max_(source|target)_positions|max_seq_len|n_ctx": 128,
    "(unpadded_|decoder_)?vocab_size(_per_layer_input)?|pronunciation_vocab_size|shape_vocab_size": VOCABULARY,
    "(local_)?sliding_window(_size)?|attention_window_size|window_size|local_attention|attention_chunk_size": WINDOW,
    r"\w*(dropout|pdrop|layerdrop|dropout_p|dropout_prob)": 0.0,
    "pad_token_id": 0,
    "(bos|decoder_start)_token_id": 1,
    "eos_token_id": None,
    "use_cache": True,
    "per_layer_config": {},
    "is_decoder": True,
}
PER_LAYER = re.compile("layer_types|mlp_layer_types|layers_block_type|no_rope_layers|indexer_types")
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
NGRAMS = {"ple_layer_ids": [1], "ple_embed_dim": 64, "heads_per_ngram": 2, "ngram_vocab_size_base": 64}
NGRAMS |= {"make_ngram_vocab_size_divisible_by": 4, "split_ngram_parts": 4, "eos_token_id": 1, "hc_lowrank": 8}
INDEXER = {"indexer_budget": 8, "indexer_compress_ratio": 2, "indexer_n_heads": 4, "indexer_kv_heads": 1}
ALTERNATING = ["sliding_attention", "full_attention"]
SPECIAL: dict[str, dict[str, Any]] = {  # fields of single types: hybrids get some attention, unusual sizes fit together
    "bailing_hybrid": {"num_key_value_heads": 4},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0}},
    "dory": {"layer_types": ["sliding_attention", "mlp", "full_attention", "mlp"] * 2}
    | {"num_hidden_layers": 8, "n_input_layers": 2, "n_recurrent_layers": 4, "n_output_layers": 2},
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4},
    "gemma3n_text": {"num_hidden_layers": 4, "layer_types": ALTERNATING * 2, "num_kv_shared_layers": 2}
    | {"activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0], "hidden_size_per_layer_input": 16},
    "gemma4_assistant": {
        "text_config": {"num_hidden_layers": 2, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 0}
        | {"hidden_size_per_layer_input": 0}
    },
    "gemma4_text": {"per_layer_config": {1: {"head_dim": 32}}},
    "gpt_neo": {
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "attention_layers": ["global", "local"],
    },
    "granitemoehybrid": {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"num_key_value_heads": 4},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2, "expert_ffn_hidden_size": 48},
    "mamba2": {"hidden_size": 64, "num_heads": 8, "head_dim": 16},
    "mllama": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "qwen4_exp": NGRAMS | INDEXER | {"indexer_head_dim": 16, "head_dim": 16},
    "qwen4_exp_text": NGRAMS | INDEXER | {"indexer_head_dim": 16, "head_dim": 16},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 48]},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}
for mla in ("dots3_note", "dots3_note_text"):  # sliding layers have sizes of their own
    SPECIAL[mla] = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 24, "qk_nope_head_dim": 16}
    SPECIAL[mla] |= {"qk_rope_head_dim": 8, "per_layer_config": {}}


def tiny_config(cls: type[PreTrainedConfig], special: dict[str, Any]) -> PreTrainedConfig:
    """Return a configuration of a class with small sizes."""
    default = cls(**special)
    given, fields = default.to_dict(), {}
    lists = [set(value) for name, value in given.items() if PER_LAYER.fullmatch(name) and isinstance(value, list)]
    layers = max([LAYERS, *map(len, lists)])  # one of each kind
    for name, value in given.items():
        if name in cls.sub_configs:
            sub = getattr(default, name)
            if sub is not None:
                fields[name] = tiny_config(type(sub), special.get(name, {}))
        elif PER_LAYER.fullmatch(name) and isinstance(value, list):
            kinds = sorted(set(value), key=value.index)
            fields[name] = [kinds[i % len(kinds)] for i in range(layers)]
        else:
            fields.update((name, small) for pattern, small in SMALL.items() if re.fullmatch(pattern, name))
            fields.update({name: layers} if re.fullmatch(NUMBER_OF_LAYERS, name) else {})
    return cls(**fields | {name: value for name, value in special.items() if name not in cls.sub_configs})


def build(model_type: str) -> Any:
    """Return the text decoder of a model type, in evaluation mode."""
    cls, model_class = CONFIG_MAPPING[model_type], getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    if model_class.config_class in cls.sub_configs.values():  # the decoder has a configuration of its own
        cls = model_class.config_class
    config = tiny_config(cls, SPECIAL.get(model_type, {}))
    with torch.device("meta"):
        weights = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
    assert weights <= MOST_WEIGHTS, f"{model_type} has {weights} weights: give its large fields a value in SPECIAL"
    return model_class(config).eval()
