"""The protocols of engines: tokens in, tokens out, with log-probs under the distribution that was sampled from.

Nothing is re-tokenised: the ids that an engine returns are the ids that the trainer learns from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from posttrain.batch import Finish
from posttrain.errors import UserError
from posttrain.recipe.sections import SamplingSection


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Settings of sampling. ``temperature`` 0 is greedy decoding.

    ``top_p`` < 1, ``top_k`` > 0 or ``min_p`` > 0 change the distribution: the log-probs an engine returns are those of
    the changed one, which a trainer's full softmax does not match. Training refuses them; evaluation does not.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    min_p: float = 0.0
    max_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()  # further stop tokens beside the model's own end-of-sequence tokens
    ignore_eos: bool = False  # True: goes on after end-of-sequence tokens, for benchmarks

    @classmethod
    def of(cls, section: SamplingSection) -> Sampling:
        """Makes the settings of a recipe's ``sampling`` section."""
        return cls(
            temperature=section.temperature,
            top_p=section.top_p,
            top_k=section.top_k,
            min_p=section.min_p,
            max_tokens=section.max_tokens,
        )

    @property
    def is_full_softmax(self) -> bool:
        """True if tokens are drawn from the model's own softmax at ``temperature``."""
        return self.temperature > 0 and self.top_p >= 1 and self.top_k <= 0 and self.min_p <= 0


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled continuation. The stop token, if one was sampled, is the last of ``tokens``."""

    tokens: list[int]
    logps: list[float]  # log-prob of each token under the distribution it was drawn from (at the temperature)
    finish: Finish
    version: int  # version of the weights that sampled it
    measured: Mapping[str, float] = field(default_factory=dict)  # measurements of a decoder: see posttrain.decoding


OnCompletion = Callable[[int, int, Completion], None]
"""Callback for each completion as soon as it ends, with the indices of prompt and sample."""


class RefusedRequest(UserError, ValueError):
    """The error for a request that an engine cannot take: a setting or a prompt is wrong. Other requests go on.

    Args:
        prompt: index of the prompt that is wrong, in the call; None if no prompt is.
    """

    def __init__(self, problem: str, prompt: int | None = None) -> None:
        super().__init__(problem)
        self.prompt = prompt


class WeightMismatch(RuntimeError):
    """The error for an engine whose weights after a load are not the weights that were sent."""


@runtime_checkable
class Engine(Protocol):
    """A sampler whose weights can be replaced. Decoders have this interface too, so recipes can train on them."""

    @property
    def version(self) -> int:
        """Version of the weights that the engine holds; set by ``load``."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        n: int = 1,
        *,
        seeds: Sequence[int] | None = None,
        on_completion: OnCompletion | None = None,
    ) -> list[list[Completion]]:
        """Samples ``n`` completions of each prompt.

        Args:
            prompts: token ids, one list for each prompt.
            sampling: settings of sampling.
            n: number of completions of each prompt.
            seeds: one integer for each prompt. Sample ``j`` of prompt ``i`` depends only on ``seeds[i]`` and ``j``,
                not on the rest of the batch, so that a run repeats exactly. ``None`` draws fresh seeds.
            on_completion: callback for each completion, in the thread that called ``generate``.

        Raises:
            ValueError: if a prompt leaves no room for ``max_tokens``; the message has its index and length.
        """
        ...

    def load(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replaces every weight by the tensors of a Hugging Face state dict, and forgets cached prefixes.

        Raises:
            WeightMismatch: if a tensor is missing, unknown, or does not read back as it was sent.
        """
        ...

    def close(self) -> None:
        """Frees memory and processes. Closing twice is harmless."""
        ...


class Row(NamedTuple):
    """One completion that is being sampled, as a shaper sees it before its next token is drawn."""

    prompt: int  # index of the prompt
    sample: int  # index of the sample
    start: int  # length of the prompt
    tokens: Sequence[int]  # prompt and the tokens sampled so far


Shaper = Callable[[Float[Tensor, "B V"], Sequence[Row]], Float[Tensor, "B V"]]
"""Replaces the next-token distribution of each row. Takes and returns normalised log-probs at the sampling temperature
(at temperature 0, those of the model's own softmax). It may be called more than once for the same row and position."""


@runtime_checkable
class ShapingEngine(Engine, Protocol):
    """An engine whose token distributions a shaper can change; log-probs are those of the changed distribution."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        n: int = 1,
        *,
        seeds: Sequence[int] | None = None,
        on_completion: OnCompletion | None = None,
        shaper: Shaper | None = None,
    ) -> list[list[Completion]]:
        """Samples completions; see :meth:`Engine.generate`.

        Raises:
            ValueError: if ``top_p``, ``top_k`` or ``min_p`` come with a shaper; engines differ in the order of them.
        """
        ...


class Aborted(Exception):
    """The error of a request that was aborted before it ended."""


@dataclass(frozen=True, slots=True)
class RequestUpdate:
    """Progress of a request since the last update. The last update has a completion or an error."""

    tokens: list[int] = field(default_factory=list)  # new tokens
    logps: list[float] = field(default_factory=list)  # log-probs of the new tokens
    completion: Completion | None = None  # the whole completion, in the last update
    error: Exception | None = None  # the reason why there is no completion

    @property
    def ended(self) -> bool:
        """True if this is the last update."""
        return self.completion is not None or self.error is not None


@dataclass(frozen=True, slots=True, kw_only=True, weakref_slot=True)
class Request:
    """A request for one completion with its own settings. Requests with other settings may share its batch."""

    prompt: Sequence[int]
    sampling: Sampling
    seed: int  # seed of this sample: see sample_seed
    on_update: Callable[[RequestUpdate], None]  # callback of ``step`` and ``abort``; must not raise
    stream: bool = False  # True: one update for every token, not only for the end
    shaper: Shaper | None = None
    place: tuple[int, int] = (0, 0)  # indices of prompt and sample, for the shaper
