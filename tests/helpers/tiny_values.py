"""Tiny policies and value models of several families, with random weights instead of zeros."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.models.heads import Head
from posttrain.models.policy import Policy, build_policy
from posttrain.models.value import ValueModel, ValueSpec
from posttrain.models.value_files import build_value, save_value
from posttrain.recipe.sections import LoraSection, ValueSection
from posttrain.recipe.sections import PolicySection as PolicyOptions

SMALL = {"vocab_size": 261, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
FAMILIES = {
    "Qwen2": SMALL | {"num_attention_heads": 2, "num_key_value_heads": 1},
    "Qwen3": SMALL | HEADS,
    "Llama": SMALL | HEADS,
    "Gemma2": SMALL | HEADS | {"query_pre_attn_scalar": 16},
    "GPT2": {"vocab_size": 261, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
}


def save_family(family: str, folder: Path, tokenizer_folder: Path) -> Path:
    """A saved tiny language model of the family with random weights and the tokenizer of all tests."""
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family], bos_token_id=None, eos_token_id=1)
    name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    getattr(transformers, name)(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder


def save_random_value(folder: Path, model_folder: Path, spec: ValueSpec, std: float = 0.3) -> Path:
    """A value model on a saved language model's decoder, with random weights in its head."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    backbone = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    head = Head(spec.head, backbone.config.hidden_size, backbone.config.vocab_size)
    torch.manual_seed(2)
    torch.nn.init.normal_(head.linear.weight, std=std)
    save_value(ValueModel(backbone, head, spec), tokenizer, folder, step=1)
    return folder


def stirred(value: ValueModel, seed: int = 0, std: float = 0.3) -> ValueModel:
    """Gives the head (and the adapter) of a value model random weights, in place of the zeros that it starts with."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in value.own_parameters().items():
            if name.startswith("head.") or "lora_B" in name:
                parameter.normal_(std=std, generator=generator)
    return value


def shared_pair(folder, *, checkpointing: bool = False, seed: int = 0) -> tuple[Policy, ValueModel]:
    """A policy and a value model on the same weights, both with adapters that are not zero."""
    torch.manual_seed(seed)
    options = PolicyOptions(model=str(folder), lora=LoraSection(rank=4), gradient_checkpointing=checkpointing)
    policy = build_policy(options)
    value = build_value(ValueSection(share=True), options, policy)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return policy, stirred(value, std=0.1)
