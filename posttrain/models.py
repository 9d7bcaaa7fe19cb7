"""Policies: loading, the forward pass from tokens to log-probs, and the weights as an engine wants them.

The shift between logits and tokens happens here and nowhere else: the hidden state at column ``t - 1`` gives the
log-prob at column ``t``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from posttrain.errors import RecipeError
from posttrain.output_layer import Shape, log_probs
from posttrain.recipe.sections import Lora
from posttrain.recipe.sections import Policy as PolicyOptions

CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}
"""Logits held at once, in float32 elements: rows of a chunk = this / vocabulary."""

POLICY_ADAPTER = "default"
"""Name of the policy's own adapter; a value model on the same weights has another."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

UNLOADABLE = (OSError, ImportError, ValueError, RuntimeError, SafetensorError)
"""What Transformers raises where a model is absent, of an unknown kind, damaged, or of other shapes than it says."""


def load_tokenizer(options: PolicyOptions) -> PreTrainedTokenizerBase:
    """The policy's tokenizer.

    Raises:
        RecipeError: where the model cannot be found, or has no end-of-sequence token to stop at.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            options.model, revision=options.revision, trust_remote_code=options.trust_remote_code
        )
    except UNLOADABLE as error:
        raise RecipeError(not_found("policy.model", options.model, error)) from error
    if tokenizer.eos_token_id is None:
        raise RecipeError(f"policy.model: the tokenizer of {options.model} has no end-of-sequence token to stop at")
    return tokenizer


def not_found(place: str, model: str, error: Exception) -> str:
    """What to tell a person whose model could not be loaded; ``place``: where in the recipe it is named."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1
    if looks_local and not Path(model).expanduser().exists():
        return f"{place}: there is no folder {model!r}"
    return f"{place}: cannot load {model!r}: {first}"


def context_length(options: PolicyOptions) -> int | None:
    """Longest prompt + completion that the model's positions allow; None where its configuration does not say."""
    config = AutoConfig.from_pretrained(
        options.model, revision=options.revision, trust_remote_code=options.trust_remote_code
    )
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_model(
    options: PolicyOptions, *, dtype: torch.dtype, model: str | None = None, place: str = "policy.model"
) -> PreTrainedModel:
    """A causal language model in the Hugging Face format, on the CPU, without dropout being touched.

    Args:
        options: the policy section of a recipe.
        dtype: of the weights in memory.
        model: another model of the same settings, such as the reference.
        place: where in the recipe the model is named.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(
            model or options.model,
            dtype=dtype,
            attn_implementation=options.attention,
            revision=options.revision if model is None else None,
            trust_remote_code=options.trust_remote_code,
        )
    except UNLOADABLE as error:
        raise RecipeError(not_found(place, model or options.model, error)) from error


def build_policy(options: PolicyOptions) -> Policy:
    """The policy to train: all weights in float32, or frozen weights in ``options.dtype`` with float32 adapters."""
    if options.lora is None:
        model = load_model(options, dtype=torch.float32)
    else:
        model = with_adapter(load_model(options, dtype=DTYPES[options.dtype]), options.lora, POLICY_ADAPTER)
    if options.gradient_checkpointing:
        enable_checkpointing(model)
    model.config.use_cache = False
    return Policy(model)


def with_adapter(model: Any, lora: Lora, name: str) -> Any:
    """The model with one more adapter, in float32, to be trained; a model without any is wrapped for PEFT first."""
    from peft import LoraConfig, get_peft_model

    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM" if model.can_generate() else "FEATURE_EXTRACTION",
    )
    if hasattr(model, "peft_config"):
        add_adapter(model, config, name)
    else:
        model = get_peft_model(model, config, adapter_name=name)
    for parameter in adapter_parameters(model, name).values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return model


def add_adapter(model: Any, config: Any, name: str) -> None:
    """One more adapter on a PEFT model; what required a gradient still does (PEFT would stop the others)."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.add_adapter(name, config)
    _LAYERS_OF.pop(model, None)
    for parameter in trained:
        parameter.requires_grad_(True)


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The weights of one adapter, under names that do not hold the adapter's."""
    mark = f".{name}."
    return {key.replace(mark, "."): p for key, p in model.named_parameters() if ".lora_" in key and mark in key}


def enable_checkpointing(model: Any) -> None:
    """Trades time for memory: each layer's activations are computed again in the backward pass.

    They are computed again with the adapter of the forward pass. Without that, a backward pass through two forward
    passes with two adapters on the same weights would silently give wrong gradients.
    """
    kwargs: dict[str, Any] = {"use_reentrant": False}
    if hasattr(model, "peft_config"):
        kwargs["context_fn"] = lambda: (nullcontext(), active_adapter(model, selected_adapter(model)))
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def selected_adapter(model: nn.Module) -> str | None:
    """Name of the adapter that a forward pass would run with; None: without."""
    layer = _adapted_layers(model)[0]
    return None if layer.disable_adapters else layer.active_adapters[0]


@contextmanager
def active_adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """Runs with one adapter, or with none, and leaves alone what requires a gradient."""
    before = selected_adapter(model)
    _select(model, name, before)
    try:
        yield
    finally:
        _select(model, before, name)


def _select(model: nn.Module, name: str | None, now: str | None) -> None:
    if name == now:
        return
    for layer in _adapted_layers(model):
        # What PEFT's set_adapter and enable_adapters do, but for the adapter that they then stop from being trained.
        # Setting that right again takes 50 times as long, and checkpointing switches at every layer.
        layer._disable_adapters = name is None
        if name is not None:
            layer._active_adapter = [name]


_LAYERS_OF: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()  # a walk over all modules takes milliseconds


def _adapted_layers(model: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    if model not in _LAYERS_OF:
        _LAYERS_OF[model] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return _LAYERS_OF[model]


def merged(model: nn.Module, adapter: str) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a model under its Hugging Face name, with one adapter merged in, one at a time."""
    modules: dict[str, Any] = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        if ".base_layer." not in name:
            yield name, parameter.detach()
            continue
        owner = name.rsplit(".", 2)[0]
        delta = modules[owner].get_delta_weight(adapter) if name.endswith(".weight") else None
        weight = parameter if delta is None else parameter.float() + delta.float()
        yield name.replace(".base_layer.", "."), weight.detach().to(parameter.dtype)


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
