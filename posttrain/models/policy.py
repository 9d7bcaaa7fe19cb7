"""Policies: building, the forward pass from tokens to log-probs, and the weights for an engine.

The shift between logits and tokens happens in this file only: the hidden state at column ``t - 1`` gives the log-prob
at column ``t``.
"""

from __future__ import annotations

import copy
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
from posttrain.models.dropout import restore
from posttrain.models.load import DTYPES, load_model
from posttrain.models.logit_map import LogitMap, logit_map
from posttrain.models.output_layer import Shape, log_probs
from posttrain.recipe.sections import PolicySection

CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}
"""Number of float32 logits held at once, by kind of device. A chunk has this / vocabulary rows."""


def build_policy(options: PolicySection) -> Policy:
    """Builds the policy to train: all weights in float32, or frozen ones in ``options.dtype`` with float32 adapters."""
    if options.lora is None:
        model = load_model(options, dtype=torch.float32)
    else:
        model = with_adapter(load_model(options, dtype=DTYPES[options.dtype]), options.lora, POLICY_ADAPTER)
    if options.gradient_checkpointing:
        enable_checkpointing(model)
    model.config.use_cache = False
    return Policy(model)


class TokenStatistics(NamedTuple):
    """Results of a forward pass for each chosen token: float32, 0 off the mask; None if not asked for."""

    logp: Float[Tensor, "N L"]
    entropy: Float[Tensor, "N L"] | None
    kl_ref: Float[Tensor, "N L"] | None  # KL(π_ref ‖ π) of the next token, over the vocabulary, in nats
    collision: Float[Tensor, "N L"] | None  # log Σ_v π(v)²


class _Request(NamedTuple):
    """The statistics to compute from hidden states."""

    temperature: float
    logp: bool
    entropy: bool
    collision: bool
    reference: Policy | None  # policy whose output layer reads the reference's hidden states; None: no divergence
    without_adapters: bool  # log-probs, entropies and collisions are of the model without its adapters


class Policy(nn.Module):
    """A causal language model whose forward pass gives the log-probs of a batch's chosen tokens.

    It is one module so that Accelerate and DeepSpeed wrap the whole pass: hidden states, then the output layer and
    log-softmax in chunks over the chosen positions only. ``[N, L, V]`` logits never exist.

    Args:
        model: a Hugging Face causal language model, or PEFT's wrapper of one.
        adapter: name of the policy's adapter, if the model has adapters.
    """

    def __init__(self, model: nn.Module, adapter: str = POLICY_ADAPTER) -> None:
        super().__init__()
        self.model, self.adapter = model, adapter

    @property
    def base(self) -> PreTrainedModel:
        """The Hugging Face model, with the adapters inside it if there are any."""
        model: Any = self.model
        return model.get_base_model() if self.has_adapters else model

    @property
    def has_adapters(self) -> bool:
        """True if the model has LoRA adapters."""
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

        Padding is on the right of every row, where causal attention cannot see it. So no attention mask is needed, and
        the fastest kernels apply.

        Args:
            reference: switch the adapters off.
        """
        results = self.statistics(tokens, mask, temperature=temperature, entropy=entropy, without_adapters=reference)
        return results.logp, results.entropy

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
        """Log-probs and further statistics of each next token's distribution, from one forward pass.

        Args:
            kl_from: reference policy of the divergences, whose adapters are switched off; may be this policy itself. It
                gets no gradient.
        """
        chosen = mask[:, 1:]
        hidden = [self.hidden_states(tokens, reference=without_adapters)[:, :-1][chosen]]
        if kl_from is not None:
            with torch.no_grad():
                hidden.append(kl_from.hidden_states(tokens, reference=True)[:, :-1][chosen])
        request = _Request(temperature, True, entropy, collision, kl_from, without_adapters)
        statistics = self._statistics(hidden, tokens[:, 1:][chosen], request)
        logp, *optional = (value if value is None else _scatter(value, mask) for value in statistics)
        assert logp is not None
        return TokenStatistics(logp, *optional)

    def hidden_states(self, tokens: Int[Tensor, "N L"], *, reference: bool = False) -> Float[Tensor, "N L H"]:
        """The last hidden states, which the output layer reads.

        Args:
            reference: switch the adapters off.
        """
        with self.switched(reference=reference):
            return self.base.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state

    def next_logits(
        self, hidden: Float[Tensor, "m H"], temperature: float = 1.0, *, reference: bool = False
    ) -> Float[Tensor, "m V"]:
        """Logits of the token after each hidden state, in float32, at ``temperature``.

        Args:
            reference: switch the adapter of the output layer off, as in the pass that gave the hidden states.
        """
        head: Any = self.base.get_output_embeddings()
        with self.switched(reference=reference):
            logits = self.logit_map(head(hidden).float())
        return logits if temperature == 1.0 else logits / temperature

    def switched(self, *, reference: bool) -> AbstractContextManager[None]:
        """Switches to the policy's adapter for the block, in every layer and the head; or to none, as a reference."""
        if not self.has_adapters:
            return nullcontext()
        return active_adapter(self.model, None if reference else self.adapter)

    @property
    def logit_map(self) -> LogitMap:
        """The scale and the cap of the logits, in models that have them."""
        return logit_map(self.base)

    def _statistics(self, hidden: list[Tensor], target: Int[Tensor, " M"], request: _Request) -> list[Tensor | None]:
        """Log-probs, entropies, divergences and collisions, each ``[M]`` or None.

        If the output layer is a plain linear layer, the first two are computed by :func:`log_probs`.

        Args:
            hidden: hidden states of the policy and, for divergences, of the reference, each ``[M, H]``.
        """
        head: Any = self.base.get_output_embeddings()
        if type(head) is not nn.Linear:
            return self._chunked(hidden, target, request)
        scale, softcap = self.logit_map
        shape = Shape(request.temperature, scale, softcap, chunk_elements(target.device))
        logp, entropy = log_probs(hidden[0], head.weight, head.bias, target, shape, entropy=request.entropy)
        divergence = collision = None
        if request.collision or request.reference is not None:
            rest = request._replace(logp=False, entropy=False)
            divergence, collision = self._chunked(hidden, target, rest)[2:]
        return [logp, entropy, divergence, collision]

    def _chunked(self, hidden: list[Tensor], target: Int[Tensor, " M"], request: _Request) -> list[Any]:
        """The statistics of :meth:`_chunk`, computed in chunks, each of which the backward pass computes again."""
        rows = chunk_rows(target.device, self.base.config.get_text_config().vocab_size)
        if len(target) <= rows:
            return self._chunk(request, target, *hidden)
        chunks = []
        for start in range(0, len(target), rows):
            arguments = (request, *(tensor[start : start + rows] for tensor in (target, *hidden)))
            if torch.is_grad_enabled():
                chunks.append(checkpoint(self._chunk, *arguments, use_reentrant=False, preserve_rng_state=False))
            else:
                chunks.append(self._chunk(*arguments))
        return [None if values[0] is None else torch.cat(values) for values in zip(*chunks, strict=True)]

    def _chunk(
        self, request: _Request, target: Int[Tensor, " m"], hidden: Float[Tensor, "m H"], *reference_hidden: Tensor
    ) -> list[Any]:
        """Log-probs, entropies, divergences and collisions of some positions: each ``[m]``, or None."""
        logits = self.next_logits(hidden, request.temperature, reference=request.without_adapters)
        logp = entropy = collision = divergence = None
        if request.logp:
            logp = -nn.functional.cross_entropy(logits, target, reduction="none")
        if request.entropy:
            entropy = torch.distributions.Categorical(logits=logits, validate_args=False).entropy()
        if request.collision:
            collision = (2 * logits.log_softmax(-1)).logsumexp(-1)
        if request.reference is not None:
            with torch.no_grad():
                of_reference, temperature = request.reference, request.temperature
                logits_ref = of_reference.next_logits(reference_hidden[0], temperature, reference=True)
                logp_ref = logits_ref.log_softmax(-1)
            divergence = (logp_ref.exp() * (logp_ref - logits.log_softmax(-1))).sum(-1)
        return [logp, entropy, divergence, collision]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every weight under its Hugging Face name, with the adapter merged in, for an engine to load."""
        if not self.has_adapters:
            tied = set(getattr(self.base, "all_tied_weights_keys", None) or ())
            yield from ((name, p.detach()) for name, p in self.base.named_parameters() if name not in tied)
            return
        yield from merged(self.base, self.adapter)


def chunk_elements(device: torch.device) -> int:
    """Number of logits held at once on a device."""
    return CHUNK_ELEMENTS.get(device.type, 2**26)


def chunk_rows(device: torch.device, vocabulary: int) -> int:
    """Number of rows of logits held at once on a device."""
    return max(1, chunk_elements(device) // vocabulary)


def _scatter(values: Float[Tensor, " M"], mask: Bool[Tensor, "N L"]) -> Float[Tensor, "N L"]:
    """Writes values of chosen tokens, in order, to their columns; 0 elsewhere."""
    padded = values.new_zeros(mask.shape)
    padded[:, 1:] = padded[:, 1:].masked_scatter(mask[:, 1:], values)
    return padded


def save_model(policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype) -> None:
    """Saves a policy in the Hugging Face format, adapter merged in. The adapter alone goes to ``folder/adapter``."""
    folder.mkdir(parents=True, exist_ok=True)
    model = saved_shell(policy, dtype)
    state = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in policy.weights()}
    saved = model.state_dict().keys()
    state |= {name: buffer.cpu() for name, buffer in policy.base.named_buffers() if name in saved}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    save_text_files(policy, tokenizer, folder)
    if policy.has_adapters:
        adapted: Any = policy.model
        adapted.save_pretrained(folder / "adapter", selected_adapters=[policy.adapter])


def saved_shell(policy: Policy, dtype: torch.dtype) -> Any:
    """The model that is saved for a policy, without memory for its weights.

    Raises:
        RuntimeError: if its weights have other names than those of the policy.
    """
    config = copy.deepcopy(policy.base.config)
    restore(config, policy.base)
    with torch.device("meta"):  # no memory: the policy's own weights are assigned when it is saved
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    names = weight_names(policy)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    missing, unexpected = parameters - names - tied, names - parameters
    if missing or unexpected:
        raise RuntimeError(f"the saved model would differ: missing {sorted(missing)}, unexpected {sorted(unexpected)}")
    model.config.use_cache = True
    return model


def weight_names(policy: Policy) -> set[str]:
    """The names that :meth:`Policy.weights` gives, without merging an adapter for each."""
    if not policy.has_adapters:
        return {name for name, _ in policy.weights()}
    return {name.replace(".base_layer.", ".") for name, _ in policy.base.named_parameters() if ".lora_" not in name}


def save_text_files(policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the generation configuration, as it was loaded, and the tokenizer with its chat template.

    Transformers refuses to save some generation configurations that it loads, such as a temperature without
    ``do_sample``. They are written as they are.
    """
    if policy.base.generation_config is not None:
        policy.base.generation_config.to_json_file(folder / "generation_config.json", use_diff=True)
    tokenizer.save_pretrained(folder)


def describe(model: nn.Module) -> str:
    """Describes a policy or value model, such as ``Qwen2ForCausalLM, 1.5B parameters, 18.5M trained``."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    name = type(model.base if isinstance(model, Policy) else getattr(model, "decoder", model)).__name__
    return f"{name}, {_short(total)} parameters" + ("" if trained == total else f", {_short(trained)} trained")


def _short(count: int) -> str:
    """A large number with a unit, such as ``1.5B``."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
