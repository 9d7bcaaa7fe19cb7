"""Policies: loading, the forward pass from tokens to :class:`Outputs`, and the weights as an engine wants them.

The shift between logits and tokens happens here and nowhere else: the hidden state at column ``t - 1`` gives the
log-prob at column ``t``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from posttrain.batch import Batch, Outputs
from posttrain.errors import RecipeError
from posttrain.options import Lora
from posttrain.options import Policy as PolicyOptions

CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}
"""Logits held at once, in float32 elements: rows of a chunk = this / vocabulary."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_tokenizer(options: PolicyOptions) -> PreTrainedTokenizerBase:
    """The policy's tokenizer.

    Raises:
        RecipeError: where the model cannot be found, or has no end-of-sequence token to stop at.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            options.model, revision=options.revision, trust_remote_code=options.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise RecipeError(_not_found(options.model, error)) from error
    if tokenizer.eos_token_id is None:
        raise RecipeError(f"policy.model: the tokenizer of {options.model} has no end-of-sequence token to stop at")
    return tokenizer


def _not_found(model: str, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1
    if looks_local and not Path(model).expanduser().exists():
        return f"policy.model: there is no folder {model!r}"
    return f"policy.model: cannot load {model!r}: {first}"


def context_length(options: PolicyOptions) -> int | None:
    """Longest prompt + completion that the model's positions allow; None where its configuration does not say."""
    config = AutoConfig.from_pretrained(
        options.model, revision=options.revision, trust_remote_code=options.trust_remote_code
    )
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_model(options: PolicyOptions, *, dtype: torch.dtype, model: str | None = None) -> PreTrainedModel:
    """A causal language model in the Hugging Face format, on the CPU, without dropout being touched.

    Args:
        options: the policy section of a recipe.
        dtype: of the weights in memory.
        model: another model of the same settings, such as the reference.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(
            model or options.model,
            dtype=dtype,
            attn_implementation=options.attention,
            revision=options.revision if model is None else None,
            trust_remote_code=options.trust_remote_code,
        )
    except (OSError, ImportError) as error:
        raise RecipeError(_not_found(model or options.model, error)) from error


def build_policy(options: PolicyOptions) -> Policy:
    """The policy to train: all weights in float32, or frozen weights in ``options.dtype`` with float32 adapters."""
    if options.lora is None:
        model = load_model(options, dtype=torch.float32)
    else:
        model = _with_adapters(load_model(options, dtype=DTYPES[options.dtype]), options.lora)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if options.lora is not None:
            model.enable_input_require_grads()
    model.config.use_cache = False
    return Policy(model)


def _with_adapters(model: PreTrainedModel, lora: Lora) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


class Policy(nn.Module):
    """A causal language model whose forward pass gives the log-probs of a batch's chosen tokens.

    It is a module of its own so that Accelerate and DeepSpeed wrap all of the pass: hidden states, then the output
    layer and log-softmax in chunks over the chosen positions only. ``[N, L, V]`` logits never exist.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

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
        model: Any = self.model
        if reference:
            with model.disable_adapter():
                return self(tokens, mask, temperature=temperature, entropy=entropy)
        hidden = self.base.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
        chosen = mask[:, 1:]
        logp, entropies = self._chunked(hidden[:, :-1][chosen], tokens[:, 1:][chosen], temperature, entropy)
        return _scatter(logp, mask), _scatter(entropies, mask) if entropies is not None else None

    def _chunked(
        self, hidden: Float[Tensor, "M H"], target: Int[Tensor, " M"], temperature: float, entropy: bool
    ) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"] | None]:
        vocabulary = self.base.config.get_text_config().vocab_size
        rows = max(1, CHUNK_ELEMENTS.get(hidden.device.type, 2**26) // vocabulary)
        if len(hidden) <= rows:
            return self._head(hidden, target, temperature, entropy)
        parts = []
        for start in range(0, len(hidden), rows):
            arguments = (hidden[start : start + rows], target[start : start + rows], temperature, entropy)
            if torch.is_grad_enabled():
                parts.append(checkpoint(self._head, *arguments, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(self._head(*arguments))
        logp = torch.cat([part[0] for part in parts])
        return logp, torch.cat([part[1] for part in parts]) if entropy else None

    def _head(
        self, hidden: Float[Tensor, "m H"], target: Int[Tensor, " m"], temperature: float, entropy: bool
    ) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"] | None]:
        head: Any = self.base.get_output_embeddings()
        logits = head(hidden).float()
        softcap = getattr(self.base.config.get_text_config(), "final_logit_softcapping", None)
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        if temperature != 1.0:
            logits = logits / temperature
        logp = -nn.functional.cross_entropy(logits, target, reduction="none")
        if not entropy:
            return logp, None
        return logp, torch.distributions.Categorical(logits=logits, validate_args=False).entropy()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight under its Hugging Face name, adapters merged in, one at a time: what an engine loads."""
        if not self.has_adapters:
            tied = set(getattr(self.base, "all_tied_weights_keys", None) or ())
            yield from ((name, p.detach()) for name, p in self.base.named_parameters() if name not in tied)
            return
        modules: dict[str, Any] = dict(self.base.named_modules())
        for name, parameter in self.base.named_parameters():
            if ".lora_" in name:
                continue
            owner = name.rsplit(".", 2)[0]
            if ".base_layer." in name:
                delta = modules[owner].get_delta_weight("default") if name.endswith(".weight") else None
                merged = parameter if delta is None else parameter.float() + delta.float()
                yield name.replace(".base_layer.", "."), merged.detach().to(parameter.dtype)
            else:
                yield name, parameter.detach()


def _scatter(values: Float[Tensor, " M"], mask: Bool[Tensor, "N L"]) -> Float[Tensor, "N L"]:
    padded = values.new_zeros(mask.shape)
    padded[:, 1:] = padded[:, 1:].masked_scatter(mask[:, 1:], values)
    return padded


def forward(policy: nn.Module, batch: Batch, *, temperature: float, entropy: bool = False) -> Outputs:
    """One pass of a (wrapped) :class:`Policy` over a batch."""
    logp, entropies = policy(batch.tokens, batch.mask, temperature=temperature, entropy=entropy)
    return Outputs(logp=logp, entropy=entropies)


def save_model(policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype) -> None:
    """The policy in the Hugging Face format, adapters merged; adapters alone also in ``folder/adapter``."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in policy.weights()}
    model = AutoModelForCausalLM.from_config(policy.base.config, dtype=dtype)
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    if unexpected or set(missing) - tied:
        raise RuntimeError(f"the saved model would differ: missing {missing}, unexpected {unexpected}")
    model.config.use_cache = True
    if policy.base.generation_config is not None:
        model.generation_config = policy.base.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if policy.has_adapters:
        adapted: Any = policy.model
        adapted.save_pretrained(folder / "adapter")


def describe(policy: Policy) -> str:
    """Such as ``Qwen2ForCausalLM, 1.5B parameters, 18.5M trained``."""
    everything = sum(p.numel() for p in policy.parameters())
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    name = type(policy.base).__name__
    return f"{name}, {_short(everything)} parameters" + (
        "" if trained == everything else f", {_short(trained)} trained"
    )


def _short(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
