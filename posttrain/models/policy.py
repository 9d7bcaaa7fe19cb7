"""Policies: loading, the forward pass from tokens to log-probs, and the weights as an engine wants them.

The shift between logits and tokens happens here and nowhere else: the hidden state at column ``t - 1`` gives the
log-prob at column ``t``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from posttrain.models.adapters import POLICY_ADAPTER, active_adapter, enable_checkpointing, merged, with_adapter
from posttrain.models.load import DTYPES, load_model
from posttrain.models.output_layer import Shape, log_probs
from posttrain.recipe.sections import PolicySection

CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}
"""Logits held at once, in float32 elements: rows of a chunk = this / vocabulary."""


def build_policy(options: PolicySection) -> Policy:
    """The policy to train: all weights in float32, or frozen weights in ``options.dtype`` with float32 adapters."""
    if options.lora is None:
        model = load_model(options, dtype=torch.float32)
    else:
        model = with_adapter(load_model(options, dtype=DTYPES[options.dtype]), options.lora, POLICY_ADAPTER)
    if options.gradient_checkpointing:
        enable_checkpointing(model)
    model.config.use_cache = False
    return Policy(model)


class TokenStatistics(NamedTuple):
    """What a forward pass says of each chosen token; float32, 0 off the mask, None where nothing asked for it."""

    logp: Float[Tensor, "N L"]
    entropy: Float[Tensor, "N L"] | None
    kl_ref: Float[Tensor, "N L"] | None  # KL(π_ref ‖ π) of the next token, over the vocabulary, in nats
    collision: Float[Tensor, "N L"] | None  # log Σ_v π(v)²


class _Head(NamedTuple):
    """What is wanted of hidden states."""

    temperature: float
    logp: bool
    entropy: bool
    collision: bool
    reference: Policy | None  # whose output layer reads the reference's hidden states


class Policy(nn.Module):
    """A causal language model whose forward pass gives the log-probs of a batch's chosen tokens.

    It is a module of its own so that Accelerate and DeepSpeed wrap all of the pass: hidden states, then the output
    layer and log-softmax in chunks over the chosen positions only. ``[N, L, V]`` logits never exist.

    Args:
        model: a Hugging Face causal language model, or PEFT's wrapper of one.
        adapter: the one that is the policy's, where there are adapters.
    """

    def __init__(self, model: nn.Module, adapter: str = POLICY_ADAPTER) -> None:
        super().__init__()
        self.model, self.adapter = model, adapter

    @property
    def base(self) -> PreTrainedModel:
        """The Hugging Face model, adapters inside it if there are any."""
        model: Any = self.model
        return model.get_base_model() if self.has_adapters else model

    @property
    def has_adapters(self) -> bool:
        return hasattr(self.model, "peft_config")

    def forward(
        self,
        tokens: Int[Tensor, "N L"],
        mask: Bool[Tensor, "N L"],
        *,
        temperature: float = 1.0,
        entropy: bool = False,
        reference: bool = False,
    ) -> tuple[Float[Tensor, "N L"], Float[Tensor, "N L"] | None]:
        """Log-probs (and entropies in nats) of the chosen tokens at ``temperature``, float32, 0 off the mask.

        Padding stands on the right of every row, where causal attention cannot see it: no attention mask is needed,
        and the fastest kernels apply. ``reference``: without the adapters.
        """
        found = self.statistics(tokens, mask, temperature=temperature, entropy=entropy, without_adapters=reference)
        return found.logp, found.entropy

    def statistics(
        self,
        tokens: Int[Tensor, "N L"],
        mask: Bool[Tensor, "N L"],
        *,
        temperature: float = 1.0,
        entropy: bool = False,
        collision: bool = False,
        kl_from: Policy | None = None,
        without_adapters: bool = False,
    ) -> TokenStatistics:
        """The same with more of each next token's distribution, from one pass.

        Args:
            kl_from: the reference policy of the divergences, without its adapters; may be this policy itself. It has no
                gradient.
        """
        hidden = self.hidden_states(tokens, reference=without_adapters)
        chosen = mask[:, 1:]
        states = [hidden[:, :-1][chosen]]
        if kl_from is not None:
            with torch.no_grad():
                states.append(kl_from.hidden_states(tokens, reference=True)[:, :-1][chosen])
        found = self._statistics(states, tokens[:, 1:][chosen], _Head(temperature, True, entropy, collision, kl_from))
        logp, *others = (value if value is None else _scatter(value, mask) for value in found)
        assert logp is not None
        return TokenStatistics(logp, *others)

    def hidden_states(self, tokens: Int[Tensor, "N L"], *, reference: bool = False) -> Float[Tensor, "N L H"]:
        """What the output layer reads; ``reference``: without the adapters."""
        adapter: AbstractContextManager[None] = nullcontext()
        if self.has_adapters:
            adapter = active_adapter(self.model, None if reference else self.adapter)
        with adapter:
            return self.base.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state

    def next_logits(self, hidden: Float[Tensor, "m H"], temperature: float = 1.0) -> Float[Tensor, "m V"]:
        """Logits of the token after each hidden state, float32, at ``temperature``."""
        head: Any = self.base.get_output_embeddings()
        logits = head(hidden).float()
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if temperature == 1.0 else logits / temperature

    @property
    def softcap(self) -> float | None:
        """Bound of the logits, c tanh(z / c), in models that have one."""
        return getattr(self.base.config.get_text_config(), "final_logit_softcapping", None)

    def _statistics(self, states: list[Tensor], target: Int[Tensor, " M"], asked: _Head) -> list[Tensor | None]:
        """Log-probs, entropies, divergences and collisions: the first two by one operation where the layer is plain."""
        head: Any = self.base.get_output_embeddings()
        if type(head) is not nn.Linear:
            return self._chunked(states, target, asked)
        shape = Shape(asked.temperature, self.softcap, chunk_elements(target.device))
        found = log_probs(states[0], head.weight, head.bias, target, shape, entropy=asked.entropy)
        others: list[Tensor | None] = [None, None]
        if asked.collision or asked.reference is not None:
            others = self._chunked(states, target, asked._replace(logp=False, entropy=False))[2:]
        return [*found, *others]

    def _chunked(self, states: list[Tensor], target: Int[Tensor, " M"], asked: _Head) -> list[Any]:
        rows = chunk_rows(target.device, self.base.config.get_text_config().vocab_size)
        if len(target) <= rows:
            return self._head(asked, target, *states)
        parts = []
        for start in range(0, len(target), rows):
            arguments = (asked, *(each[start : start + rows] for each in (target, *states)))
            if torch.is_grad_enabled():
                parts.append(checkpoint(self._head, *arguments, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(self._head(*arguments))
        return [None if values[0] is None else torch.cat(values) for values in zip(*parts, strict=True)]

    def _head(
        self, asked: _Head, target: Int[Tensor, " m"], hidden: Float[Tensor, "m H"], *of_reference: Tensor
    ) -> list[Any]:
        """Log-probs, entropies, divergences and collisions of some positions: each ``[m]``, or None."""
        logits = self.next_logits(hidden, asked.temperature)
        logp = entropy = collision = divergence = None
        if asked.logp:
            logp = -nn.functional.cross_entropy(logits, target, reduction="none")
        if asked.entropy:
            entropy = torch.distributions.Categorical(logits=logits, validate_args=False).entropy()
        if asked.collision:
            collision = (2 * logits.log_softmax(-1)).logsumexp(-1)
        if asked.reference is not None:
            with torch.no_grad():
                wanted = asked.reference.next_logits(of_reference[0], asked.temperature).log_softmax(-1)
            divergence = (wanted.exp() * (wanted - logits.log_softmax(-1))).sum(-1)
        return [logp, entropy, divergence, collision]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight under its Hugging Face name, adapters merged in, one at a time: what an engine loads."""
        if not self.has_adapters:
            tied = set(getattr(self.base, "all_tied_weights_keys", None) or ())
            yield from ((name, p.detach()) for name, p in self.base.named_parameters() if name not in tied)
            return
        yield from merged(self.base, self.adapter)


def chunk_elements(device: torch.device) -> int:
    """How many logits are held at once."""
    return CHUNK_ELEMENTS.get(device.type, 2**26)


def chunk_rows(device: torch.device, vocabulary: int) -> int:
    """How many rows of logits are held at once."""
    return max(1, chunk_elements(device) // vocabulary)


def _scatter(values: Float[Tensor, " M"], mask: Bool[Tensor, "N L"]) -> Float[Tensor, "N L"]:
    padded = values.new_zeros(mask.shape)
    padded[:, 1:] = padded[:, 1:].masked_scatter(mask[:, 1:], values)
    return padded


def save_model(policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype) -> None:
    """The policy in the Hugging Face format, adapters merged; adapters alone also in ``folder/adapter``."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in policy.weights()}
    with torch.device("meta"):  # its weights are those of the policy, not a copy
        model = AutoModelForCausalLM.from_config(policy.base.config, dtype=dtype)
    saved = model.state_dict().keys()
    state |= {name: buffer.cpu() for name, buffer in policy.base.named_buffers() if name in saved}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    if unexpected or set(missing) - tied:
        raise RuntimeError(f"the saved model would differ: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.config.use_cache = True
    if policy.base.generation_config is not None:
        model.generation_config = policy.base.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if policy.has_adapters:
        adapted: Any = policy.model
        adapted.save_pretrained(folder / "adapter", selected_adapters=[policy.adapter])


def describe(model: nn.Module) -> str:
    """A policy or value model in a few words, such as ``Qwen2ForCausalLM, 1.5B parameters, 18.5M trained``."""
    everything = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    name = type(model.base if isinstance(model, Policy) else getattr(model, "decoder", model)).__name__
    return f"{name}, {_short(everything)} parameters" + (
        "" if trained == everything else f", {_short(trained)} trained"
    )


def _short(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
