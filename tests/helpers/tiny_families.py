"""Tiny random language models of many families: two layers, hidden states of 64 numbers, the tests' tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_model import make_tokenizer
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

VOCABULARY = 261

SIZES: dict[str, Any] = {
    **{"hidden_size": 64, "n_embd": 64, "d_model": 64, "word_embed_proj_dim": 64},
    **{"num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2, "encoder_layers": 2},
    **{"num_attention_heads": 2, "n_head": 2, "n_heads": 2, "num_heads": 2, "decoder_attention_heads": 2},
    **{"num_key_value_heads": 1, "head_dim": 32, "v_head_dim": 32, "rotary_dim": 16},
    **{"intermediate_size": 128, "ffn_dim": 128, "dff": 128, "decoder_ffn_dim": 128, "moe_intermediate_size": 32},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"shared_expert_intermediate_size": 32, "n_group": 1, "topk_group": 1, "state_size": 16},
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16},
    **{"max_position_embeddings": 256, "n_positions": 256, "max_seq_len": 256},
}
"""Values of the entries that configurations have for sizes; a family takes those that it knows."""

LATENT = {"head_dim": 16, "num_key_value_heads": 2}  # the size of the rotary part
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}

FAMILIES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "gemma", "phi", "phi3"], {}),
    **dict.fromkeys(["gpt2", "gpt_neox", "gptj", "opt", "bloom", "mpt", "stablelm", "olmo", "olmo2", "olmo3"], {}),
    **dict.fromkeys(["starcoder2", "smollm3", "mixtral", "glm", "glm4", "glm4_moe", "persimmon", "gpt_bigcode"], {}),
    **dict.fromkeys(["helium", "ernie4_5", "ernie4_5_moe", "exaone4", "minimax", "minimax_m2", "arcee", "apertus"], {}),
    **dict.fromkeys(["seed_oss", "hy_v3", "olmoe", "flex_olmo", "granitemoe", "granitemoeshared"], {}),
    **dict.fromkeys(["ministral3", "nanochat", "doge", "afmoe", "bitnet", "jais2", "mellum"], {}),
    **dict.fromkeys(["gpt_oss", "hyperclovax", "recurrent_gemma", "mamba", "lfm2", "vaultgemma"], {}),
    **dict.fromkeys(["openai-gpt", "ctrl", "xglm", "biogpt", "bert", "roberta", "llama4_text", "rwkv"], {}),
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 32},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 32},
    "granite": {"logits_scaling": 8.0, "residual_multiplier": 0.5, "embedding_multiplier": 6.0},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 8},
    "falcon": {"head_dim": None, "ffn_hidden_size": 128},
    "codegen": {"n_head": 4, "num_attention_heads": 4, "rotary_dim": 8},
    "minicpm3": {"num_key_value_heads": 2},
    "deepseek_v2": {"n_routed_experts": 4, "num_experts_per_tok": 2, **LATENT},
    "deepseek_v3": LATENT,
    "glm4_moe_lite": LATENT,
    "nemotron": {"num_key_value_heads": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "qwen3_next": HYBRID,
}
"""Families by their ``model_type``, with entries of the configuration that they need beside :data:`SIZES`."""


def tiny_config(family: str, **changes: Any) -> Any:
    """The configuration of a tiny model."""
    kind = CONFIG_MAPPING[family]
    default, special = kind(), FAMILIES.get(family, {})
    entries = {name: size for name, size in SIZES.items() if getattr(default, name, None) is not None}
    entries |= {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    entries |= special | changes
    return kind(**{name: value for name, value in entries.items() if value is not None or name not in special})


def tiny_language_model(
    family: str, std: float = 0.1, *, of_queries_and_keys: float | None = None, **changes: Any
) -> PreTrainedModel:
    """A tiny model with random weights, in evaluation mode; distributions are far from uniform.

    Args:
        std: standard deviation of the weights.
        of_queries_and_keys: another one for the projections to queries and keys; large ones make attention sharp.
    """
    config = tiny_config(family, **changes)
    torch.manual_seed(0)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            sharp = of_queries_and_keys is not None and ("q_proj" in name or "k_proj" in name)
            torch.nn.init.normal_(parameter, std=of_queries_and_keys if sharp else std)
    return model.eval()


def save_tiny(family: str, folder: Path, **options: Any) -> Path:
    """Saves a tiny model of the family with the tests' tokenizer, and returns its folder."""
    tiny_language_model(family, **options).save_pretrained(folder)
    make_tokenizer(folder)
    return folder
