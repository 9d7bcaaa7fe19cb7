"""Sections of a recipe: all plain settings, everything that is not a part. Every default is here, once."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from posttrain.option_types import BelowOne, Breadth, Count, OutputPath, PlaceName, Positive, PositiveCount, Temperature

CONFIG = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class LoraSection:
    """Low-rank adapters, trained in place of all weights."""

    rank: Breadth = 16
    """Rank of the two factors of an adapter."""
    alpha: PositiveCount = 32
    """Scale of an adapter's output, which is multiplied by ``alpha / rank``."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of an adapter's inputs that are dropped in training."""
    targets: str | tuple[str, ...] = "all-linear"
    """Layers that get adapters, by name: several, one regular expression, or ``all-linear`` for every linear layer but
    the output layer."""


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class PolicySection:
    """The language model that is trained, or that a decoder samples from."""

    model: PlaceName
    """Hub name or local folder of a causal language model in the Hugging Face format."""
    end: str | int | tuple[str | int, ...] | None = None
    """Token that ends a completion, or several, as text or ids: sampling stops at each, and the first is taught after
    plain texts. Default: those that the chat template, the tokenizer and the model name."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the forward pass. Weights and optimiser states of trained parameters are kept in float32."""
    lora: LoraSection | None = None
    """Low-rank adapters to train instead of all weights; the reference policy is then the model without them."""
    gradient_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: far less memory, about a third more time."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Kernel of the attention. Models with a feature that sdpa lacks, such as Gemma 2, get eager in place of sdpa."""
    dropout: bool = False
    """Keep the dropout of the model's configuration in passes with gradients. Then they differ from the passes without
    gradients that they are compared with: ratios and KL terms of equal policies are not exactly 1 and 0."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub. Default: the main branch."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class ReferenceSection:
    """The reference policy. It is loaded only if some part reads its log-probs."""

    model: PlaceName | None = None
    """Hub name or local folder of the reference. Default: the policy at the start of the run."""
    every: PositiveCount | None = None
    """Number of steps after which the reference moves towards the policy. Default: it never moves."""
    rate: float = Field(default=1.0, gt=0, le=1)
    """Share of the policy's weights in the reference after a move; 1: it becomes the policy."""
    cache: bool | OutputPath = True
    """Cache folder for the log-probs of dataset completions, which are computed once, before the first step; then the
    reference need not stay in memory. True: the user's cache folder, ``$POSTTRAIN_CACHE/reference`` or else
    ``~/.cache/posttrain/reference``. False: no cache, the reference scores every batch."""


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class OpponentSection:
    """The opponent that the rollout ``against`` samples from: a mix of the policy π and another policy π_other."""

    share: float = Field(default=1.0, gt=0, le=1)
    """Share of the other policy: the opponent samples each token from π^(1 - share) π_other^share, normalised; 1 is the
    other policy itself."""
    average: float | None = Field(default=None, gt=0, le=1)
    """Rate of a running average of the policy's weights, to which each step adds this share of them; the average is the
    other policy. Default: the other policy is the reference."""


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class OptimizerSection:
    """AdamW and its learning-rate schedule."""

    learning_rate: float = Field(default=1e-6, gt=0, le=1000)
    """Learning rate after the warm-up."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """Decay of AdamW's running averages of the gradient and of its square."""
    eps: Positive = 1e-8
    """Number that AdamW adds to the root of the squared average, against division by zero."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Share of the weights, times the learning rate, that each step takes away."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up: unchanged, or down to 0 at the last step."""
    warmup_steps: Count = 0
    """Number of steps in which the learning rate rises from 0."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Largest norm of all gradients together; longer ones are scaled down to it."""


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class HeadSection:
    """The head of a value model: what it puts out."""

    type: Literal["scalar", "categorical", "quantile", "bernoulli", "per_token", "implicit"] = "scalar"
    """Kind of output: a number; logits over ``bins`` between ``low`` and ``high``; ``bins`` quantiles; the logit of a
    probability; a number for each possible next token (a Q or twist head); or, implicit, log-probs: the value is
    ``beta`` times the log-ratio of a language model to its frozen beginning, the log-odds of being right."""
    bins: int = Field(default=101, ge=2, le=2**16)
    """Number of bins of a categorical head, or of quantiles."""
    low: float = -0.5
    """Centre of the lowest bin: the support should reach a few bin widths beyond the rewards on both sides. In rewards,
    or with ``value.normalise`` in standard deviations of the targets from their mean, such as -5."""
    high: float = 1.5
    """Centre of the highest bin, in the same unit."""
    beta: float = Field(default=0.05, gt=0)
    """Scale of an implicit value. Yuan et al. 2024, arXiv:2412.01981."""


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class BranchesSection:
    """Monte-Carlo values: completions that are sampled from the prefixes of others."""

    completions: Breadth = 9
    """Number of completions of each prefix."""
    separator: str = Field(default="\n", min_length=1)
    """Text at the end of a reasoning step."""


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class ValueSection:
    """The value model (critic), or branches in its place."""

    branches: BranchesSection | None = None
    """Branches in place of a model: the value of the beginning of each reasoning step is the mean score of completions
    sampled from there."""
    model: PlaceName | None = None
    """Hub name or local folder of a value model saved by another run, a reward or process model, or any language model,
    which gets a new head. Default: the policy's model."""
    head: HeadSection | None = None
    """Head of the value model. Default: the head of the saved value model, or else a scalar."""
    share: bool = False
    """Put the value model's adapters on the policy's weights instead of making a model of its own; ``policy.lora`` must
    be set."""
    lora: LoraSection | None = None
    """Adapters to train instead of all weights. With ``share``: their rank; default the policy's."""
    frozen: bool = False
    """Do not train the value model."""
    head_only: bool = False
    """Train the head alone: the value is of the model's own hidden states, as the decoder ``edited`` needs."""
    members: Breadth = 1
    """Number of heads on one backbone that are trained side by side from different initial weights."""
    reduce: Literal["mean", "min", "max", "mean_minus_std"] = "mean"
    """Function that makes one value of the members' values."""
    deviations: float = Field(default=1.0, ge=0)
    """Number of standard deviations that ``mean_minus_std`` subtracts."""
    normalise: bool = False
    """Standardise the head's targets by their running mean and deviation (Yu et al. 2021, arXiv:2103.01955);
    ``head.low`` and ``head.high`` of a categorical head are then in standard deviations."""
    target_rate: float | None = Field(default=None, gt=0, le=1)
    """Rate of a slow copy that targets come from: it moves by this share of the difference each step (Polyak
    averaging). Default: there is no copy."""
    ready_at: float | None = Field(default=None, lt=1)
    """Explained variance of a step's values at which the policy's training starts. Default: it starts at once."""
    optimizer: OptimizerSection = Field(default_factory=lambda: OptimizerSection(learning_rate=1e-5))


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class DataSection:
    """A dataset, and how its rows become prompts."""

    path: PlaceName
    """Hub name, local folder, JSONL / JSON / Parquet / CSV file, or ``my_file.py:function`` that yields rows."""
    name: str | None = None
    """Configuration of a hub dataset, such as ``main`` of ``openai/gsm8k``."""
    split: str = "train"
    """Split of a hub dataset or folder; ``train[:1000]`` takes a part of it."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Copies of columns: new name -> column it is copied from, such as ``{prompt: question}``."""
    ignore: tuple[str, ...] = ()
    """Columns that are left unread, such as ``[images]`` where the prompts are whole without them."""
    system: str | None = None
    """System message put before every prompt that has none; makes a plain prompt conversational."""
    chat: bool | None = None
    """Wrap plain prompts as a user's message. Default: yes if the tokenizer has a chat template."""
    template: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the chat template, such as ``{enable_thinking: false}``."""
    max_prompt_tokens: PositiveCount | None = None
    """Most tokens of a prompt; longer ones are left out and counted. Default: an error names the row."""
    limit: PositiveCount | None = None
    """Use only the first ``limit`` rows."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of a generator function."""


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class SamplingSection:
    """Sampling of tokens: temperature, truncation of the distribution, length."""

    temperature: Temperature = 1.0
    """Divisor of the logits, from 0.01; 0 takes the most probable token. Training uses it for log-probs too."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample among the most probable tokens whose probabilities sum to this."""
    top_k: Count = 0
    """Sample among this number of the most probable tokens; 0 is all of them."""
    min_p: float = Field(default=0.0, ge=0, lt=1)
    """Sample among tokens whose probability is at least this share of the largest one."""
    max_tokens: PositiveCount = 256
    """Length of the longest completion, in tokens."""


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class EngineSection:
    """The engine that generates completions, and its memory."""

    use: Literal["auto", "vllm", "transformers"] = "auto"
    """Name of the engine. auto: vllm if it is installed, transformers otherwise."""
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    """Data type of weights and forward pass. auto: the policy's."""
    max_model_len: PositiveCount | None = None
    """Most tokens of prompt and completion together. Default: as many as the data and ``sampling.max_tokens`` need."""
    gpu_memory: float = Field(default=0.4, gt=0, le=1)
    """Share of a GPU's memory that vLLM may take; the trainer uses the rest."""
    cache_mb: PositiveCount = 512
    """Memory of vLLM's key-value cache on CPU."""
    max_concurrent: Breadth = 256
    """Most completions that are generated at the same time."""
    max_difference: float | None = Field(default=None, gt=0)
    """Largest mean difference of the engine's log-probs from the trainer's, in nats, on a short batch before the first
    step and on the completions of the first step; more is an error. Default: 0.01, or 0.2 where policy or engine
    computes in bfloat16."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of ``vllm.LLM``."""


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class EvaluationSection:
    """Evaluation during training, on held-out data."""

    data: DataSection | None = None
    """Held-out prompts to complete and verify."""
    examples: DataSection | None = None
    """Held-out completions, read by the recipe's ``examples`` part; evaluation measures how the policy ranks them."""
    every: PositiveCount = 50
    """Number of steps between evaluations; one more is made before the first step and one after the last."""
    completions: Breadth = 1
    """Number of completions of a prompt; the score is their mean."""
    guided: bool = False
    """Complete the prompts with the recipe's ``decoder``. By default the policy alone completes them."""
    sampling: SamplingSection = Field(default_factory=lambda: SamplingSection(temperature=0.0))


@dataclass(config=CONFIG, kw_only=True, frozen=True)
class RunSection:
    """The run folder: checkpoints, rollouts, trackers."""

    folder: OutputPath | None = None
    """Path of the run folder. Default: ``runs/<recipe's name>``."""
    save_every: PositiveCount = 50
    """Number of steps between checkpoints; one more is made at the end."""
    keep: PositiveCount = 2
    """Number of checkpoints that are kept."""
    keep_finished: Count = 0
    """Number of checkpoints that are kept once the trained models are saved. One is needed to add steps later."""
    stop_after: str | None = Field(default=None, pattern=r"^(\d+h(\d+m)?(\d+s)?|\d+m(\d+s)?|\d+s)$")
    """Time after which the run saves a checkpoint and ends with exit code 75, such as ``3h30m``: for queues with a time
    limit. It counts from the start of the command, and anew after ``--resume``."""
    grace: Positive = 30.0
    """Seconds between SIGTERM and the SIGKILL that follows it. The run gives up its step after two thirds of them."""
    rollouts_every: Count = 1
    """Number of steps between stored rollouts (Parquet); 0 stores none."""
    rollouts_of: tuple[Literal["training", "dropped", "evaluation"], ...] = ("training", "dropped", "evaluation")
    """Completions that are stored: those of the updates, those that ``select`` dropped, those of evaluations."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Trackers that get the metrics, besides ``metrics.jsonl``."""
    project: str = "posttrain"
    """Name of the project in W&B and trackio."""
    max_bad_steps: Count = 5
    """Most steps in a row with a non-finite loss or gradient. They are skipped; one more stops the run with a dump."""
