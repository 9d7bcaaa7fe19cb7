"""Comparisons of a model with itself on one short batch, before anything is learned from its numbers.

posttrain calls the layers and the output layer of a model on its own: without a mask, padded on the right, with the
attention kernel that the recipe names, with adapters on and off, in training and in evaluation mode. The model's own
forward pass must give the same. A difference is an error that names the family, its size, and what to set.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from posttrain.errors import RecipeError
from posttrain.models.adapters import active_adapter
from posttrain.models.implicit_value import ImplicitValue
from posttrain.models.policy import Policy
from posttrain.models.value import ValueModel

COLUMNS = 16
"""Length of the longest row of the batch, in tokens, if the model has so many positions."""

BUDGET = {"cpu": 4e10, "cuda": 1e14}
"""Most operations for a row that is longer than a model's attention window, by kind of device: about a second."""

LARGEST = 1e-3
"""Largest difference in float32: of a log-prob in nats, of a token's hidden state as a share of its length."""

LARGEST_MEAN = 0.05
"""Largest mean difference in bfloat16, whose rounding moves single log-probs by more than some faults do."""


class Rows:
    """The batch of the check: two rows that share their first half, and a shorter one with padding behind it."""

    def __init__(self, config: Any, device: torch.device) -> None:
        text = config.get_text_config()
        columns = min(COLUMNS, getattr(text, "max_position_embeddings", None) or COLUMNS)
        self.half, vocabulary = columns // 2, text.vocab_size
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(vocabulary // 10, vocabulary // 2, (3, columns), generator=generator)
        drawn[1, : self.half] = drawn[0, : self.half]
        drawn[2, self.half :] = 0
        self.tokens: Int[Tensor, "3 L"] = drawn.to(device)
        self.mask: Bool[Tensor, "3 L"] = torch.ones_like(self.tokens, dtype=torch.bool)
        self.mask[:, 0] = False
        self.mask[2, self.half :] = False


@torch.no_grad()
def check_policy(
    policy: Policy,
    *,
    trained: bool,
    random_modes: bool = False,
    always_adapted: bool = False,
    place: str = "policy.model",
) -> None:
    """Compares the log-probs of a policy with those of its own forward pass, adapters on and off.

    Adapters are given random weights meanwhile, because a new adapter changes nothing. Weights, modes and random states
    are afterwards as they were.

    Args:
        trained: compare training mode with evaluation mode too.
        random_modes: the recipe wants dropout, so that the modes differ.
        always_adapted: the policy's adapter is never switched off.
        place: key of the recipe that names the model, for messages.

    Raises:
        RecipeError: if they differ; names the family, the difference and what to set.
    """
    rows = Rows(policy.base.config, next(policy.parameters()).device)
    compare = Comparison(policy.base, place)
    with kept(policy), stirred(policy), random_states_kept(), compare.precision():
        policy.eval()
        logp = policy(rows.tokens, rows.mask)[0]
        with active_adapter(policy.model, policy.adapter) if policy.has_adapters else nullcontext():
            own = own_logps(policy.model, rows)
            compare.layers(rows, lambda tokens: policy.hidden_states(tokens))
        compare.same(logp, own, rows.mask, "log-probs through posttrain's output layer", UNKNOWN_HEAD)
        if policy.has_adapters and not always_adapted:
            with peft_disabled(policy.model):
                own = own_logps(policy.model, rows)
            logp_ref = policy(rows.tokens, rows.mask, reference=True)[0]
            compare.same(logp_ref, own, rows.mask, "log-probs without adapters", ADAPTERS)
        if trained and not random_modes:
            logp_trained = policy.train()(rows.tokens, rows.mask)[0]
            compare.same(logp_trained, logp, rows.mask, "log-probs in training mode", MODES)


@torch.no_grad()
def check_value(value: ValueModel, *, trained: bool, random_modes: bool = False) -> None:
    """Compares the layers of a value model with each other in the ways of :func:`check_policy`.

    Raises:
        RecipeError: if they differ.
    """
    if isinstance(value, ImplicitValue):
        check_policy(value.language_model, trained=trained, random_modes=random_modes, place="value.model")
        if value.base is not None:
            check_policy(value.base, trained=False, place="value.model")
        return
    rows = Rows(value.decoder.config, next(value.parameters()).device)
    compare = Comparison(value.decoder, "value.model")
    with kept(value), random_states_kept(), compare.precision():
        hidden = value.eval().hidden_states(rows.tokens)
        compare.layers(rows, value.hidden_states)
        if trained and not random_modes:
            compare.relative(value.train().hidden_states(rows.tokens), hidden, "hidden states in training mode", MODES)


UNKNOWN_HEAD = (
    "posttrain computes log-probs of this family in another way than its own code: take a model of another family "
    "(docs/families.md)"
)
ADAPTERS = "an adapter is on a layer that cannot be switched off for the reference: leave it out of policy.lora.targets"
MODES = (
    "its training pass draws random numbers, or computes otherwise, so that a policy would differ from itself: set "
    "policy.dropout: true to train so all the same"
)
KERNEL = "this attention kernel lacks a feature of the model: set policy.attention: eager"
PADDING = "padding on the right changes what comes before it: set micro_batch_tokens to the length of one completion"
CAUSAL = "it is no causal language model: its hidden states depend on later tokens. Take a causal language model"


class Comparison:
    """Compares numbers of one model in the precision of its weights.

    Args:
        model: the Hugging Face model.
        place: key of the recipe that names it.
    """

    def __init__(self, model: Any, place: str) -> None:
        self.model, self.place = model, place
        self.exact = all(parameter.dtype == torch.float32 for parameter in model.parameters())
        self.exact &= not model.config._attn_implementation.startswith("flash")

    def precision(self) -> AbstractContextManager[Any]:
        """Autocast to bfloat16 for models that are not wholly in float32, or whose kernel cannot compute in it."""
        if self.exact:
            device = next(self.model.parameters()).device.type
            return torch.autocast(device, enabled=False)
        return torch.autocast(next(self.model.parameters()).device.type, torch.bfloat16)

    def layers(self, rows: Rows, hidden_of: Callable[[Int[Tensor, "N L"]], Float[Tensor, "N L H"]]) -> None:
        """Compares hidden states: of rows that differ later, with and without padding, with the kernel and eager."""
        hidden = hidden_of(rows.tokens)
        half = slice(0, rows.half)
        self.relative(hidden[0, half], hidden[1, half], "hidden states before another continuation", CAUSAL)
        alone = hidden_of(rows.tokens[2:, half])[0]
        self.relative(hidden[2, half], alone, "hidden states with padding behind them", PADDING)
        kernel = self.model.config._attn_implementation
        if kernel != "eager":
            with eager(self.model):
                try:
                    expected = hidden_of(rows.tokens)
                except Exception as error:
                    raise RecipeError(
                        f"{self.place}: {type(self.model).__name__}: {kernel} cannot be compared with Transformers' "
                        f"eager attention, which failed: {type(error).__name__}: {error}"
                    ) from error
            self.relative(hidden, expected, f"hidden states with attention: {kernel} and with eager", KERNEL)
            self.beyond_window(rows, hidden_of)

    def beyond_window(self, rows: Rows, hidden_of: Callable[[Int[Tensor, "N L"]], Float[Tensor, "N L H"]]) -> None:
        """Compares the kernel with eager on a row that is longer than the attention window, if there is one.

        A row that would take more than about a second is left out, and this is said.
        """
        window, have = window_of(self.model.config), rows.tokens.shape[1]
        if window is None or window < have:
            return
        kernel, columns = self.model.config._attn_implementation, window + have // 2
        operations = 4 * columns * sum(parameter.numel() for parameter in self.model.parameters())
        if operations > BUDGET.get(rows.tokens.device.type, BUDGET["cuda"]):
            print(
                f"self-check: {self.place}: rows beyond its attention window of {window} tokens are not tried with "
                f"{kernel}: they would take more than about a second",
                file=sys.stderr,
            )
            return
        tokens = rows.tokens[:2].reshape(1, -1).repeat(1, -(-columns // (2 * have)))[:, :columns]
        hidden = hidden_of(tokens)
        with eager(self.model):
            expected = hidden_of(tokens)
        what = f"hidden states beyond the attention window of {window} tokens with attention: {kernel} and with eager"
        self.relative(hidden, expected, what, KERNEL)

    def same(self, ours: Tensor, own: Tensor, mask: Tensor, what: str, remedy: str) -> None:
        """Raises ``RecipeError`` if log-probs differ, in nats."""
        self._judge((ours - own)[mask].abs(), "nats", what, remedy)

    def relative(self, ours: Tensor, own: Tensor, what: str, remedy: str) -> None:
        """Raises ``RecipeError`` if hidden states ``[..., H]`` differ, as a share of the length of each.

        Single numbers are no measure: trained models have some that are fifty times as large as the others, and whose
        rounding is too.
        """
        length = own.float().norm(dim=-1).clamp(min=1e-12)
        self._judge((ours.float() - own.float()).norm(dim=-1) / length, "of their length", what, remedy)

    def _judge(self, difference: Tensor, unit: str, what: str, remedy: str) -> None:
        measured = float((difference.max() if self.exact else difference.mean()).detach())
        if not measured <= (LARGEST if self.exact else LARGEST_MEAN):  # NaN too
            kind = "up to" if self.exact else "on average"
            raise RecipeError(
                f"{self.place}: {type(self.model).__name__}: {what} differ from the model's own by {kind} "
                f"{measured:.2g} {unit} on a short batch: {remedy}"
            )


def window_of(config: Any) -> int | None:
    """Number of tokens before each token that some layers see: the smallest window or chunk; None if they see all."""
    text = config.get_text_config()
    sizes = [getattr(text, "attention_chunk_size", None)]
    kinds = getattr(text, "layer_types", None)
    if getattr(text, "use_sliding_window", True) and (kinds is None or "sliding_attention" in kinds):
        sizes += [getattr(text, "sliding_window", None), getattr(text, "window_size", None)]
    return min((size for size in sizes if isinstance(size, int) and size > 0), default=None)


def own_logps(model: Any, rows: Rows) -> Float[Tensor, "3 L"]:
    """Log-probs of the chosen tokens by the model's own forward pass, 0 elsewhere."""
    table = model(input_ids=rows.tokens, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    logps = table.gather(-1, rows.tokens[:, 1:, None])[..., 0]
    return nn.functional.pad(logps, (1, 0)).where(rows.mask, 0.0)


@contextmanager
def eager(model: Any) -> Iterator[None]:
    """Inside, the model's attention is computed by Transformers' own plain code."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Restores the mode of every module, and which parameters require a gradient."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, required in gradients:
            parameter.requires_grad_(required)


def random_states_kept() -> AbstractContextManager[None]:
    """Restores PyTorch's random states, of the CPU and of the current GPU."""
    return torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else [])


@contextmanager
def stirred(policy: Policy, std: float = 0.05) -> Iterator[None]:
    """Inside, the policy's adapter has random weights, so that it changes the policy; afterwards its own, bit by bit.

    Without an adapter nothing changes.
    """
    generator = torch.Generator().manual_seed(1)
    own = [
        (parameter, parameter.detach().clone())
        for name, parameter in policy.model.named_parameters()
        if "lora_" in name and policy.adapter in name.split(".")
    ]
    try:
        with torch.no_grad():
            for parameter, before in own:
                noise = torch.randn(before.shape, generator=generator) * std
                parameter.add_(noise.to(parameter))
        yield
    finally:
        with torch.no_grad():
            for parameter, before in own:
                parameter.copy_(before)


@contextmanager
def peft_disabled(model: Any) -> Iterator[None]:
    """Inside, no adapter of the model works, switched off by PEFT's own code."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled
