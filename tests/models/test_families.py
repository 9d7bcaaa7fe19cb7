"""Log-probs of many families of models: those of their own forward pass, or a refusal that says why."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_families import FAMILIES, save_tiny, tiny_language_model
from transformers import AutoModelForCausalLM

from posttrain.errors import RecipeError
from posttrain.models.attention import kernel_for
from posttrain.models.logit_map import LogitMap, logit_map
from posttrain.models.policy import Policy, build_policy
from posttrain.models.self_check import check_policy
from posttrain.recipe.sections import PolicySection

REFUSED = {
    "bert": "does not read the last hidden state",
    "roberta": "does not read the last hidden state",
    "llama4_text": "does not say which of its modules",
}
MAPS = {
    **{"llama": LogitMap(), "gemma2": LogitMap(1.0, 30.0), "vaultgemma": LogitMap(1.0, 30.0)},
    **{"nanochat": LogitMap(1.0, 15.0), "recurrent_gemma": LogitMap(1.0, 30.0)},
    **{"granite": LogitMap(1 / 8), "cohere": LogitMap(0.25), "cohere2": LogitMap(0.25), "minicpm3": LogitMap(4.0)},
}


def tokens_and_mask() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(5, 261, (2, 14), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, :3] = False
    return tokens, mask


def own_logps(model, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Log-probs of the chosen tokens by the model's own forward pass."""
    with torch.no_grad():
        table = model(input_ids=tokens, use_cache=False).logits.float().log_softmax(-1)
    logps = table[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    return torch.nn.functional.pad(logps, (1, 0)).where(mask, 0.0)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in REFUSED])
def test_log_probs_are_those_of_the_models_own_forward_pass(family):
    model = tiny_language_model(family)
    model.set_attn_implementation(kernel_for(model.config, model.config._attn_implementation))
    check_policy(Policy(model), trained=False)
    tokens, mask = tokens_and_mask()
    with torch.no_grad():
        logp, entropy = Policy(model)(tokens, mask, entropy=True)
    torch.testing.assert_close(logp, own_logps(model, tokens, mask), atol=1e-5, rtol=0)
    assert entropy is not None and bool((entropy[mask] > 0).all())
    if family in MAPS:
        assert logit_map(model) == MAPS[family]


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_whose_head_is_not_known_is_refused_by_name(family, tmp_path):
    folder = save_tiny(family, tmp_path / family)
    with pytest.raises(RecipeError, match=f"policy.model: .*{REFUSED[family]}"):
        build_policy(PolicySection(model=str(folder)))


@pytest.mark.parametrize("name", ["scaled", "scaled_and_capped", "capped_and_scaled", "biased", "cut", "masked"])
def test_arithmetic_that_no_family_has_yet_is_measured_or_refused(name):
    """The class of the model is changed: the map is measured, not looked up by names."""
    changes = {
        "scaled": lambda z: 0.37 * z,
        "scaled_and_capped": lambda z: 20 * torch.tanh(0.5 * z / 20),
        "capped_and_scaled": lambda z: 3 * (7 * torch.tanh(z / 7)),
        "biased": lambda z: z + torch.linspace(0, 1, z.shape[-1]),
        "cut": lambda z: z[..., :-1],
        "masked": lambda z: z.index_fill(-1, torch.tensor([3]), torch.finfo(z.dtype).min),
    }
    model = tiny_language_model("llama")
    plain = type(model).forward

    def forward(self, *args, **kwargs):
        output = plain(self, *args, **kwargs)
        output.logits = changes[name](output.logits)
        return output

    model.__class__ = type("Planted", (type(model),), {"forward": forward})
    tokens, mask = tokens_and_mask()
    if name in ("biased", "cut", "masked"):
        with pytest.raises(Exception, match="Planted: log-probs of this family are not known"):
            Policy(model)(tokens, mask)
        return
    with torch.no_grad():
        logp, _ = Policy(model)(tokens, mask)
    torch.testing.assert_close(logp, own_logps(model, tokens, mask), atol=1e-5, rtol=0)


def test_the_gradient_goes_through_scale_and_cap():
    """By finite differences along the gradient of the hidden states' last norm."""
    model = tiny_language_model("llama").double()
    plain = type(model).forward

    def forward(self, *args, **kwargs):
        output = plain(self, *args, **kwargs)
        output.logits = 4 * torch.tanh(1.5 * output.logits / 4)
        return output

    model.__class__ = type("Planted", (type(model),), {"forward": forward})
    tokens, mask = tokens_and_mask()
    gradients = []
    for logps in (lambda: Policy(model)(tokens, mask)[0], lambda: _with_gradient(model, tokens, mask)):
        model.zero_grad()
        logps().sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)


def _with_gradient(model, tokens, mask):
    table = model(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
    return table[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0].where(mask[:, 1:], 0.0)


def test_gemma_2_keeps_the_cap_of_its_attention(tmp_path, capsys):
    """sdpa would drop it. Weights of queries and keys are large, so that the cap matters."""
    folder = save_tiny("gemma2", tmp_path / "gemma2", std=0.6)
    tokens, mask = tokens_and_mask()
    default = build_policy(PolicySection(model=str(folder)))
    assert default.base.config._attn_implementation == "eager"
    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    sdpa = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    with torch.no_grad():
        logp, _ = default.eval()(tokens, mask)
    torch.testing.assert_close(logp, own_logps(eager, tokens, mask), atol=1e-5, rtol=0)
    assert (own_logps(sdpa, tokens, mask) - logp).abs().max() > 0.1


def test_the_document_says_what_was_measured():
    """The engines that work in docs/families.md, as in the results of the benchmark."""
    root = Path(__file__).parents[2]
    command = [sys.executable, root / "benchmarks" / "families.py", "--summary"]
    results = root / "benchmarks" / "results" / "families.json"
    printed = subprocess.run([*command, results], capture_output=True, text=True, check=True).stdout
    document = " ".join((root / "docs" / "families.md").read_text(encoding="utf-8").split())
    for line in filter(None, printed.splitlines()):
        assert line in document
