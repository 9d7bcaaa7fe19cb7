"""The plain settings of a recipe, section by section: what is not a part. Every field has its default here, once."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

CONFIG = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class LoraSection:
    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: str | tuple[str, ...] = "all-linear"


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class PolicySection:
    model: str
    """Hub name or local folder of a causal language model in the Hugging Face format."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the forward pass. Weights and optimiser states of trained parameters are kept in float32."""
    lora: LoraSection | None = None
    """Train low-rank adapters instead of all weights; the reference policy is then the model without them."""
    gradient_checkpointing: bool = False
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class ReferenceSection:
    model: str | None = None
    """Where the reference policy differs from the initial policy. Loaded only if some part reads its log-probs."""
    every: int | None = Field(default=None, ge=1)
    """Steps after which it moves towards the policy. Default: it stays what it is."""
    rate: float = Field(default=1.0, gt=0, le=1)
    """Share of the policy's weights in it after a move; 1: it becomes the policy."""
    cache: bool | str = True
    """Of given completions its log-probs are computed once, before the first step, and kept on disk; then it need not
    be in memory. A folder; or true for the user's cache folder, ``$POSTTRAIN_CACHE/reference`` or else
    ``~/.cache/posttrain/reference``; or false: the reference scores every batch."""


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class OpponentSection:
    share: float = Field(default=1.0, gt=0, le=1)
    """The opponent samples each token from π^(1 - share) π_other^share, normalised: 1 is the other policy itself."""
    average: float | None = Field(default=None, gt=0, le=1)
    """The other policy is a running average of the policy's weights, to which each step adds this share of them.
    Default: the other policy is the reference."""


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class OptimizerSection:
    learning_rate: float = Field(default=1e-6, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = Field(default=0.0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class HeadSection:
    type: Literal["scalar", "categorical", "quantile", "bernoulli", "per_token", "implicit"] = "scalar"
    """What the value model puts out: a number; logits over ``bins`` between ``low`` and ``high``; ``bins`` quantiles;
    the logit of a probability; a number for each possible next token (a Q or twist head); or, implicit, log-probs: the
    value is ``beta`` times the log-ratio of a language model to its frozen beginning, the log-odds of being right."""
    bins: int = Field(default=101, ge=2)
    low: float = -0.5
    """Centre of the lowest bin: the support should reach a few bin widths beyond the rewards on both sides. In rewards,
    or with ``value.normalise`` in standard deviations of the targets from their mean, such as -5."""
    high: float = 1.5
    """Centre of the highest bin, in the same unit."""
    beta: float = Field(default=0.05, gt=0)
    """Of an implicit value. Yuan et al. 2024, arXiv:2412.01981."""


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class BranchesSection:
    completions: int = Field(default=9, ge=1)
    """Completions of each prefix."""
    separator: str = Field(default="\n", min_length=1)
    """What a reasoning step ends with."""


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class ValueSection:
    branches: BranchesSection | None = None
    """No model: the value of each reasoning step's beginning is the mean score of completions sampled from there."""
    model: str | None = None
    """A value model saved by another run, a reward or process model, or any language model, which gets a new head.
    Default: the policy's model."""
    head: HeadSection | None = None
    """Default: the head of the saved value model, or else a scalar."""
    share: bool = False
    """Adapters of its own on the policy's weights instead of a model of its own; ``policy.lora`` must be set."""
    lora: LoraSection | None = None
    """Train adapters instead of all weights. With ``share``: their rank; default the policy's."""
    frozen: bool = False
    """Use it as it is."""
    head_only: bool = False
    """Train the head alone: the value is of the model's own hidden states, as the decoder ``edited`` needs."""
    members: int = Field(default=1, ge=1)
    """Heads on one backbone that are trained side by side from different initial weights."""
    reduce: Literal["mean", "min", "max", "mean_minus_std"] = "mean"
    """How the members' values become one."""
    deviations: float = Field(default=1.0, ge=0)
    """Standard deviations that ``mean_minus_std`` subtracts."""
    normalise: bool = False
    """The head learns targets standardised by their running mean and deviation (Yu et al. 2021, arXiv:2103.01955), so
    ``head.low`` and ``head.high`` of a categorical head are in standard deviations."""
    target_rate: float | None = Field(default=None, gt=0, le=1)
    """Targets come from a slow copy that moves by this share of the difference each step (Polyak averaging)."""
    ready_at: float | None = Field(default=None, lt=1)
    """The policy waits until the explained variance of a step's values has reached this."""
    optimizer: OptimizerSection = Field(default_factory=lambda: OptimizerSection(learning_rate=1e-5))


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class DataSection:
    path: str
    """Hub name, local folder, JSONL / JSON / Parquet / CSV file, or ``my_file.py:function`` that yields rows."""
    name: str | None = None
    """Configuration of a hub data set, such as ``main`` of ``openai/gsm8k``."""
    split: str = "train"
    columns: dict[str, str] = Field(default_factory=dict)
    """New name -> column it is copied from, such as ``{prompt: question}``."""
    system: str | None = None
    """System message put before every prompt that has none; makes a plain prompt conversational."""
    chat: bool | None = None
    """Wrap plain prompts as a user's message. Default: yes if the tokenizer has a chat template."""
    template: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the chat template, such as ``{enable_thinking: false}``."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Longer prompts are left out and counted. Default: an error names the row."""
    limit: int | None = Field(default=None, ge=1)
    """Only the first rows."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of a generator function."""


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class SamplingSection:
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0, lt=1)
    max_tokens: int = Field(default=256, ge=1)
    """Longest completion, in tokens."""


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class EngineSection:
    use: Literal["auto", "vllm", "transformers"] = "auto"
    """auto: vllm where it is installed, transformers otherwise."""
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    """auto: the policy's."""
    max_model_len: int | None = Field(default=None, ge=1)
    """Prompt plus completion. Default: what the data and ``sampling.max_tokens`` need."""
    gpu_memory: float = Field(default=0.4, gt=0, le=1)
    """Share of a GPU's memory that vLLM may take; the trainer lives in the rest."""
    cache_mb: int = Field(default=512, ge=1)
    """Memory of vLLM's key-value cache on CPU."""
    max_concurrent: int = Field(default=256, ge=1)
    """Completions generated at the same time."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of ``vllm.LLM``."""


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class EvaluationSection:
    data: DataSection | None = None
    """Prompts to complete and verify."""
    examples: DataSection | None = None
    """Held-out completions, read by the recipe's ``examples`` part: how the policy judges them."""
    every: int = Field(default=50, ge=1)
    """Steps between evaluations; one more is made before the first step and one after the last."""
    completions: int = Field(default=1, ge=1)
    """Completions a prompt; the score is their mean."""
    guided: bool = False
    """The recipe's ``decoder`` completes the prompts. By default the policy alone does."""
    sampling: SamplingSection = Field(default_factory=lambda: SamplingSection(temperature=0.0))


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class RunSection:
    folder: str | None = None
    """Default: ``runs/<recipe's name>``."""
    save_every: int = Field(default=50, ge=1)
    """Steps between checkpoints; one more is made at the end."""
    keep: int = Field(default=2, ge=1)
    """Checkpoints kept."""
    rollouts_every: int = Field(default=1, ge=0)
    """Steps between stored rollouts (Parquet); 0 stores none."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    project: str = "posttrain"
    max_bad_steps: int = Field(default=5, ge=0)
    """Consecutive steps with a non-finite loss or gradient that are skipped before the run stops with a dump."""
