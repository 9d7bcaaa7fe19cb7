"""The attention kernel that a model is loaded with.

Transformers hands some features of a model's attention to its kernel as arguments, and a kernel that does not know an
argument ignores it without a word. ``sdpa`` (PyTorch's scaled_dot_product_attention) ignores a cap of the attention
logits. What this file does not know is found by the comparison with the eager kernel before the first step.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

CAPS = re.compile(r"attn_logit_softcap|attn_logit_cap|attention_softcap|attention_logit_cap")
"""Names of caps on attention logits."""


def kernel_for(config: Any, asked: str) -> str:
    """The kernel to load a model with: the one asked for, or ``eager`` where ``sdpa`` lacks a feature of the model.

    The change is said once in a process.

    Args:
        config: the model's configuration.
        asked: ``policy.attention``.
    """
    reason = missing_in_sdpa(config) if asked == "sdpa" else None
    if reason is None:
        return asked
    _say(f"attention: eager in place of sdpa for {config.model_type}, because {reason}")
    return "eager"


def sees_all_before(config: Any) -> bool:
    """True if every layer attends to all tokens before a token, with positions that are told apart by ids alone.

    Caches that put keys of several rows beside each other rely on it. Not so: sliding windows, chunks, recurrent
    layers, and ALiBi, whose distances are columns (Press et al. 2021, arXiv:2108.12409).
    """
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    if kinds is not None and set(kinds) != {"full_attention"}:
        return False
    window = None if kinds is not None else getattr(text, "sliding_window", None)
    holders = (text, getattr(text, "attn_config", None))
    alibi = text.model_type == "bloom" or any(getattr(holder, "alibi", False) for holder in holders)
    return not (window or alibi or getattr(text, "attention_chunk_size", None))


def missing_in_sdpa(config: Any) -> str | None:
    """The feature of a model's attention that ``sdpa`` does not have, as a reason; None if it has them all."""
    text = config.get_text_config()
    capped = next((name for name, value in vars(text).items() if CAPS.search(name) and value), None)
    if capped is not None:
        return f"sdpa ignores the cap of its attention logits ({capped}: {getattr(text, capped)})"
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is not None and not isinstance(model_class, tuple) and not model_class._supports_sdpa:
        return "Transformers has no sdpa attention for it"
    return None


@functools.cache
def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)
