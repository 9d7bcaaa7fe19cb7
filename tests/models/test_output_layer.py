"""Log-probs and entropies from blocks of the vocabulary against log-softmax of all logits at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from posttrain.models.output_layer import Shape, log_probs

M, H, V = 7, 5, 200


def case(seed: int, *, scale: float = 1.0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    inputs = {"hidden": torch.randn(M, H, generator=g), "weight": scale * torch.randn(V, H, generator=g)}
    inputs["bias"] = torch.randn(V, generator=g)
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    return inputs | {"target": torch.randint(0, V, (M,), generator=g)}


def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    z = shape.scale * (hidden @ weight.T + (0 if bias is None else bias))
    if shape.softcap:
        z = shape.softcap * torch.tanh(z / shape.softcap)
    logp = (z / shape.temperature).log_softmax(-1)
    return logp.gather(-1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("elements", [1, 7 * 90, 10**9])  # blocks of 64 columns (the smallest), of 90, or one block
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_are_those_of_log_softmax(elements, temperature, scale, softcap, with_bias):
    inputs = case(0)
    if not with_bias:
        inputs["bias"] = None  # type: ignore[assignment]
    learned = [tensor for tensor in inputs.values() if tensor is not None and tensor.requires_grad]
    shape = Shape(temperature, scale, softcap, elements)
    up = torch.linspace(-1, 2, M)
    results = log_probs(**inputs, shape=shape, entropy=True)
    expected_results = plain(**inputs, shape=shape)
    for result, expected in zip(results, expected_results, strict=True):
        torch.testing.assert_close(result, expected, atol=2e-6, rtol=1e-6)
    for select in (lambda pair: pair[0], lambda pair: pair[1], lambda pair: pair[0] + pair[1].flip(0)):
        gradient = torch.autograd.grad((select(results) * up).sum(), learned, retain_graph=True)
        expected = torch.autograd.grad((select(expected_results) * up).sum(), learned, retain_graph=True)
        torch.testing.assert_close(gradient, expected, atol=5e-6, rtol=1e-5)


def test_large_logits_do_not_overflow_and_certain_tokens_have_log_prob_0():
    inputs = case(1, scale=100.0)
    for elements in (1, 10**9):
        logp, entropy = log_probs(**inputs, shape=Shape(elements=elements), entropy=True)
        expected, expected_entropy = plain(
            **{k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}, shape=Shape()
        )
        torch.testing.assert_close(logp.double(), expected, atol=1e-3, rtol=1e-6)
        torch.testing.assert_close(entropy.double(), expected_entropy, atol=1e-3, rtol=1e-5)
        best = (inputs["hidden"] @ inputs["weight"].T + inputs["bias"]).argmax(-1)
        assert log_probs(**{**inputs, "target": best}, shape=Shape(elements=elements))[0].max() == 0


def test_frozen_weights_get_no_gradient_and_zero_positions_are_allowed():
    inputs = case(2)
    frozen = {"weight": inputs["weight"].detach(), "bias": None}
    logp, entropy = log_probs(**{**inputs, **frozen}, shape=Shape())
    assert entropy is None
    (gradient,) = torch.autograd.grad(logp.sum(), [inputs["hidden"]])
    expected = torch.autograd.grad(plain(**{**inputs, **frozen}, shape=Shape())[0].sum(), [inputs["hidden"]])[0]
    torch.testing.assert_close(gradient, expected, atol=5e-6, rtol=1e-5)
    no_positions = {**inputs, "hidden": inputs["hidden"][:0], "target": inputs["target"][:0]}
    logp, _ = log_probs(**no_positions, shape=Shape())
    (weight_gradient,) = torch.autograd.grad(logp.sum(), [inputs["weight"]])
    assert logp.shape == (0,) and not weight_gradient.any()


def test_autocast_multiplies_in_its_dtype_and_sums_in_float32():
    inputs = case(3)
    with torch.autocast("cpu", torch.bfloat16):
        logp, entropy = log_probs(**inputs, shape=Shape(elements=7 * 90), entropy=True)
        gradient = torch.autograd.grad((logp + entropy).sum(), [inputs["hidden"], inputs["weight"]])
    assert logp.dtype == torch.float32 and [g.dtype for g in gradient] == [torch.float32] * 2
    low = {
        k: v.detach().bfloat16().float() if v is not None and v.is_floating_point() else v for k, v in inputs.items()
    }
    expected, expected_entropy = plain(**low, shape=Shape())
    torch.testing.assert_close(logp, expected, atol=0.05, rtol=0.01)
    torch.testing.assert_close(entropy, expected_entropy, atol=0.05, rtol=0.01)
