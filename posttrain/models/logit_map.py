"""The arithmetic of a model between its output layer and its logits: a scale, a cap, or both.

Families name them in many ways (``logits_scaling`` divides in Granite and multiplies in another family;
``logit_scale``, ``final_logit_softcapping``, ``logits_soft_cap``, ``lm_head_multiplier``, ...), so no name is trusted:
the model's own forward pass is run on made-up products, and what it makes of them is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from posttrain.errors import UserError

MAGNITUDES = tuple(10.0**exponent for exponent in range(-3, 8))
"""Sizes of the largest made-up product of each row. At the largest even a wide cap is reached to the last bit."""

TOLERANCE = 1e-5
"""Largest relative error of a map that counts as the model's."""


class LogitMap(NamedTuple):
    """The map from products u = h Wᵀ + b to logits: z = softcap tanh(scale u / softcap), or scale u without a cap."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, products: Float[Tensor, "*B V"]) -> Float[Tensor, "*B V"]:
        """Logits of products, in the products' dtype."""
        scaled = products if self.scale == 1.0 else self.scale * products
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


_MAP_OF: WeakKeyDictionary[nn.Module, LogitMap] = WeakKeyDictionary()


def logit_map(model: Any) -> LogitMap:
    """The map of a causal language model, measured once for each model.

    Raises:
        UserError: if its forward pass does something else between hidden states and logits; names the model's class.
    """
    if model not in _MAP_OF:
        _MAP_OF[model] = _measure(model)
    return _MAP_OF[model]


def _measure(model: Any) -> LogitMap:
    family, head = type(model).__name__, model.get_output_embeddings()
    if head is None:
        raise _unknown(family, "it has no output layer that Transformers knows of")
    if model.get_decoder() is model:
        raise _unknown(family, "Transformers does not say which of its modules gives the last hidden state")
    products = made_up_products(_vocabulary(head, model), head_device(model))
    before, logits = _own_forward(model, head, products)
    if logits.shape != products.shape:
        raise _unknown(family, f"from {products.shape[-1]} products it makes logits of shape {list(logits.shape)}")
    if before is None or (before != 1.0 and getattr(head, "bias", None) is not None):
        raise _unknown(family, "its output layer does not read the last hidden state, or a multiple of it")
    fitted = _fitted(products, logits, _numbers(model))
    if fitted is None:
        raise _unknown(family, "its logits are not the products of its output layer, scaled or capped")
    return fitted if before == 1.0 else fitted._replace(scale=before * fitted.scale)


def made_up_products(vocabulary: int, device: torch.device) -> Float[Tensor, "rows V"]:
    """Products of all sizes and both signs, in another order in every second row."""
    line = torch.linspace(-1, 1, vocabulary, dtype=torch.float32, device=device)
    return torch.stack([(line if row % 2 else line.flip(0)) * size for row, size in enumerate(MAGNITUDES)])


def head_device(model: Any) -> torch.device:
    """The device of a model's weights."""
    return next(model.parameters()).device


def _vocabulary(head: nn.Module, model: Any) -> int:
    """Number of the output layer's products. An adapter's layer passes its own weight on."""
    weight = getattr(head, "weight", None)
    return len(weight) if isinstance(weight, Tensor) else model.config.get_text_config().vocab_size


def _own_forward(model: Any, head: nn.Module, products: Float[Tensor, "rows V"]) -> tuple[float | None, Tensor]:
    """Runs the model's own code from made-up hidden states and made-up products on.

    Returns:
        The factor by which the output layer's input differs from the hidden states (None: in other ways), and logits.

    Raises:
        UserError: if the code needs more from its layers than hidden states.
    """
    size, device = model.config.get_text_config().hidden_size, products.device
    hidden = torch.linspace(-1, 1, size, device=device).expand(1, len(products), size).clone()
    tokens = torch.zeros(1, len(products), dtype=torch.long, device=device)
    seen: list[Tensor] = []

    def of_head(given: Tensor, *_: Any, **__: Any) -> Tensor:
        seen.append(given)
        return products[None].clone()

    def of_decoder(*_: Any, **__: Any) -> Any:
        return _LayersOutput(last_hidden_state=hidden.clone())

    with torch.no_grad(), _replaced(model.get_decoder(), of_decoder), _replaced(head, of_head), _in_eval_mode(model):
        try:
            logits = model(input_ids=tokens, use_cache=False).logits
        except Exception as error:
            reason = f"its code could not be run on made-up hidden states ({type(error).__name__}: {error})"
            raise _unknown(type(model).__name__, reason) from error
    return _factor(hidden, seen), logits.float().squeeze(0)


def _factor(hidden: Float[Tensor, "1 rows H"], seen: list[Tensor]) -> float | None:
    """The factor between hidden states and the one input that the output layer was given; None if there is none."""
    if len(seen) != 1 or seen[0].shape != hidden.shape:
        return None
    if torch.equal(seen[0], hidden.to(seen[0].dtype)):
        return 1.0
    h, given = hidden.double(), seen[0].double()
    factor = float((h * given).sum() / h.square().sum())
    return factor if bool(((factor * h - given).abs() <= TOLERANCE * abs(factor)).all()) else None


@dataclass
class _LayersOutput(ModelOutput):
    """An output of a model's layers that has hidden states and nothing else."""

    last_hidden_state: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, a module's forward pass is another function."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.forward = before


@contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Inside, the module itself (not those within it) is in evaluation mode."""
    before, module.training = module.training, False
    try:
        yield
    finally:
        module.training = before


def _fitted(products: Float[Tensor, "rows V"], logits: Float[Tensor, "rows V"], numbers: set[float]) -> LogitMap | None:
    """The scale and cap that make these logits of these products; None if no such numbers do.

    The cap is the bound that the largest products reach. The scale is the slope at the smallest. Both are replaced by
    a number of the model's configuration (or its inverse) if that is as close as rounding allows.
    """
    u, z = products.double(), logits.double()
    if not bool(z.isfinite().all()):
        return None
    highest = z[-2:].abs().amax(-1)
    capped = bool(highest[0] == highest[1])
    cap = _named(float(highest[1]), numbers) if capped else None
    scale = _named(float((u[0] * z[0]).sum() / u[0].square().sum()), numbers)
    if scale == 0.0 or cap == 0.0:
        return None
    expected = LogitMap(scale, cap)(u)
    bound = TOLERANCE * torch.maximum(expected.abs(), expected.new_tensor(float(u[0].abs().max()) * abs(scale)))
    return LogitMap(scale, cap) if bool(((expected - z).abs() <= bound).all()) else None


def _named(measured: float, numbers: set[float]) -> float:
    """The number of the configuration, or its inverse, that a measured one stands for; else the measured one."""
    candidates = {1.0, *numbers, *(1 / number for number in numbers)}
    nearest = min(candidates, key=lambda number: abs(number - measured))
    return nearest if math.isclose(nearest, measured, rel_tol=TOLERANCE) else measured


def _numbers(model: Any) -> set[float]:
    """Numbers other than 0 in the configuration and on the model itself."""
    holders = (vars(model.config.get_text_config()), vars(model))
    values = [value for holder in holders for value in holder.values()]
    return {
        float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool) and v and math.isfinite(v)
    }


def _unknown(family: str, reason: str) -> UserError:
    return UserError(
        f"{family}: log-probs of this family are not known to posttrain: {reason}. Take a model of another "
        "family, whose logits are linear in its last hidden state up to a scale and a cap (docs/families.md)"
    )
