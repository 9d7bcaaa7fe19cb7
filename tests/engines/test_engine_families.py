"""The transformers engine on many families: log-probs are the model's own, or the family is refused by name."""

from __future__ import annotations

import pytest
import torch
from tiny_families import FAMILIES, save_tiny

from posttrain.engines.base import Sampling
from posttrain.engines.transformers import TransformersEngine
from posttrain.errors import RecipeError

RECURRENT = ("bamba", "falcon_h1", "jamba", "mamba", "minimax", "qwen3_next", "recurrent_gemma", "rwkv")
CACHELESS = ("openai-gpt", "bert", "roberta")
PROMPTS = [[5, 60, 71, 82, 93, 104, 115, 126, 137], [7, 61, 75]]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in (*RECURRENT, *CACHELESS)])
def test_log_probs_of_sampled_tokens_are_those_of_a_whole_forward_pass(family, tmp_path):
    engine = TransformersEngine(save_tiny(family, tmp_path), max_model_len=32)
    sampled = engine.generate(PROMPTS, Sampling(max_tokens=12, ignore_eos=True), n=2, seeds=[1, 2])
    for prompt, samples in zip(PROMPTS, sampled, strict=True):
        ids = torch.tensor([[*prompt, *completion.tokens] for completion in samples])
        with torch.no_grad():
            table = engine.model(input_ids=ids, use_cache=False).logits[:, len(prompt) - 1 : -1].log_softmax(-1)
        own = table.gather(-1, ids[:, len(prompt) :, None])[..., 0]
        torch.testing.assert_close(torch.tensor([c.logps for c in samples]), own, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", [*RECURRENT, "openai-gpt"])
def test_families_without_keys_and_values_of_every_token_are_refused(family, tmp_path):
    with pytest.raises(
        RecipeError, match=r"engine.use: transformers: \w+: (sampling fails|log-probs).*engine.use: vllm"
    ):
        TransformersEngine(save_tiny(family, tmp_path), max_model_len=32)
