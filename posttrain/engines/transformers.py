"""A batched sampler on a plain transformers model: the engine where vLLM is not installed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from posttrain.batch import Finish
from posttrain.engines.base import Completion, OnCompletion, Row, Sampling, Shaper, sample_seed
from posttrain.engines.cache import growing_cache
from posttrain.engines.requests import check_prompts, check_shaper, end_of_sequence_ids
from posttrain.engines.sampling import draw, filters, uniforms
from posttrain.engines.weights import load_verified

KEEP_WIDTH = 7 / 8  # finished rows leave the batch when at most this share of it is still running


class TransformersEngine:
    """Samples ``max_concurrent`` completions at a time with a key-value cache; finished ones leave the batch.

    A prompt is read once for all its samples. At temperature 0 the log-probs are those of the model's own softmax.

    Args:
        model: hub name or local folder.
        dtype: of weights and activations; log-probs are float32 in any case.
        max_model_len: most tokens of a prompt and its completion together.
        max_concurrent: completions generated at the same time.
        seed: of the seeds drawn where ``generate`` is given none.
        revision: of a model on the hub: branch, tag or commit.
        trust_remote_code: run modelling code that comes with the model.
        device: default: the current CUDA device, or else the CPU.
    """

    library = "transformers"  # for model cards

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "float32",
        max_model_len: int,
        max_concurrent: int = 256,
        seed: int = 0,
        revision: str | None = None,
        trust_remote_code: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        self.version = 0
        self._max_model_len = max_model_len
        self._max_concurrent = max_concurrent
        source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        self._eos = end_of_sequence_ids(model, **source)
        self._fresh_seeds = random.Random(seed)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        with torch.random.fork_rng(devices=[]):  # weights that the checkpoint lacks are drawn
            loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), **source)
        self._model: PreTrainedModel | None = loaded.to(device).eval().requires_grad_(False)  # type: ignore[arg-type]

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
        """See :meth:`posttrain.engines.base.ShapingEngine.generate`."""
        self._opened()
        check_prompts(prompts, sampling.max_tokens, self._max_model_len)
        check_shaper(shaper, sampling)
        if seeds is None:
            seeds = [self._fresh_seeds.getrandbits(63) for _ in prompts]
        done: list[list[Completion]] = [[None] * n for _ in prompts]  # type: ignore[list-item]

        def finish(request: Request, completion: Completion) -> None:
            done[request.prompt][request.sample] = completion
            if on_completion is not None:
                on_completion(request.prompt, request.sample, completion)

        requests = [Request(i, j, prompts[i], sample_seed(seeds[i], j)) for i in range(len(prompts)) for j in range(n)]
        requests.sort(key=lambda request: len(request.tokens))  # neighbours need little padding
        for start in range(0, len(requests), self._max_concurrent):
            self._sample(requests[start : start + self._max_concurrent], sampling, finish, shaper)
        return done

    def load(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See :meth:`posttrain.engines.base.Engine.load`."""
        model = self._opened()
        places = {name: parameter.data for name, parameter in model.named_parameters(remove_duplicate=False)}

        def copy(stream: Iterable[tuple[str, Tensor]]) -> None:
            for name, tensor in stream:
                places[name].copy_(tensor)

        load_verified(tensors, places, copy)
        self.version = version

    def close(self) -> None:
        """See :meth:`posttrain.engines.base.Engine.close`."""
        self._model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def model(self) -> PreTrainedModel:
        """The model that samples, for decoders that reach into it."""
        return self._opened()

    def _opened(self) -> PreTrainedModel:
        if self._model is None:
            raise RuntimeError("the engine has been closed")
        return self._model

    def _sample(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        finish: Callable[[Request, Completion], None],
        shaper: Shaper | None,
    ) -> None:
        """Samples all ``requests`` at once, calling ``finish`` as each one ends."""
        model = self._opened()
        stop_ids = sampling.stop_token_ids if sampling.ignore_eos else (*sampling.stop_token_ids, *self._eos)
        stops = torch.tensor(stop_ids, dtype=torch.long, device=model.device)
        uniform = uniforms([request.seed for request in requests], sampling.max_tokens).to(model.device)
        processors = filters(sampling)
        tokens = torch.zeros(len(requests), sampling.max_tokens, dtype=torch.long, device=model.device)
        logps = torch.zeros(len(requests), sampling.max_tokens, device=model.device)
        batch = Running.start(model, requests, sampling.max_tokens)
        for column in range(sampling.max_tokens):
            logits = batch.logits if shaper is None else batch.shaped(shaper, requests, tokens[:, :column], sampling)
            drawn, logp = draw(logits, uniform[batch.rows, column], sampling.temperature, processors)
            tokens[batch.rows, column], logps[batch.rows, column] = drawn, logp
            stopped = torch.isin(drawn, stops)
            ended = batch.running & (stopped | (column + 1 == sampling.max_tokens))
            if ended.any():
                which = batch.rows[ended]
                found = zip(tokens[which, : column + 1].tolist(), logps[which, : column + 1].tolist(), strict=True)
                for row, stop, (ids, values) in zip(which.tolist(), stopped[ended].tolist(), found, strict=True):
                    reason = Finish.STOPPED if stop else Finish.LENGTH
                    finish(requests[row], Completion(ids, values, reason, self.version))
                batch.running &= ~ended
                if not batch.running.any():
                    return
                drawn = batch.compact(drawn)
            batch.advance(model, drawn)


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to be sampled."""

    prompt: int
    sample: int
    tokens: Sequence[int]
    seed: int


@dataclass(slots=True)
class Running:
    """The rows of a batch that is being sampled: ``B`` of the ``N`` requests that it started with."""

    rows: Int[Tensor, " B"]  # which request each row is
    running: Bool[Tensor, " B"]  # False: has ended, and waits to be taken out
    logits: Float[Tensor, "B V"]  # for the next token
    position: Int[Tensor, " B"]  # of the next token
    visible: Bool[Tensor, "B columns"]  # False at the padding on the left; columns up to the last that may be used
    padded: bool
    cache: DynamicCache

    @staticmethod
    def start(model: PreTrainedModel, requests: Sequence[Request], max_tokens: int) -> Running:
        """Reads the prompts, each once, and gives every request its copy of the keys and values."""
        distinct = {request.prompt: request.tokens for request in requests}
        length = torch.tensor([len(prompt) for prompt in distinct.values()])
        padding = length.max() - length
        cache = growing_cache(model.config)
        logits = _read(model, list(distinct.values()), cache)
        row = {prompt: row for row, prompt in enumerate(distinct)}
        source = torch.tensor([row[request.prompt] for request in requests])
        if len(distinct) < len(requests):
            cache.batch_select_indices(source.to(model.device))
        columns = torch.arange(int(length.max()) + max_tokens)
        return Running(
            rows=torch.arange(len(requests), device=model.device),
            running=torch.ones(len(requests), dtype=torch.bool, device=model.device),
            logits=logits[source.to(model.device)],
            position=length[source].to(model.device),
            visible=(columns >= padding[source, None]).to(model.device),
            padded=bool(padding.any()),
            cache=cache,
        )

    def shaped(
        self, shaper: Shaper, requests: Sequence[Request], sampled: Int[Tensor, "N columns"], sampling: Sampling
    ) -> Float[Tensor, "B V"]:
        """Logits whose softmax at the temperature is the shaper's law; those of ended rows are as they were."""
        temperature = sampling.temperature or 1.0
        which = self.rows[self.running]
        rows = []
        for row, ids in zip(which.tolist(), sampled[which].tolist(), strict=True):
            request = requests[row]
            rows.append(Row(request.prompt, request.sample, len(request.tokens), [*request.tokens, *ids]))
        logits = self.logits.float().clone()  # what a forward pass returned may not be written to
        logps = shaper((logits[self.running] / temperature).log_softmax(-1), rows)
        logits[self.running] = temperature * logps.to(logits)
        return logits

    def compact(self, drawn: Int[Tensor, " B"]) -> Int[Tensor, " kept"]:
        """Takes ended rows out if they are many; returns the tokens of the rows that stay."""
        if self.running.sum() > KEEP_WIDTH * len(self.running):
            return drawn
        kept = self.running.nonzero()[:, 0]
        self.cache.batch_select_indices(kept)
        self.rows, self.running = self.rows[kept], self.running[kept]
        self.position, self.visible = self.position[kept], self.visible[kept]
        return drawn[kept]

    @torch.inference_mode()
    def advance(self, model: PreTrainedModel, drawn: Int[Tensor, " B"]) -> None:
        """Appends the tokens drawn and computes the logits of the next ones."""
        columns = self.cache.get_seq_length() + 1
        output = model(
            input_ids=drawn[:, None],
            attention_mask=self.visible[:, :columns] if self.padded else None,
            position_ids=self.position[:, None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.logits = output.logits[:, -1]
        self.position = self.position + 1


@torch.inference_mode()
def _read(model: PreTrainedModel, prompts: Sequence[Sequence[int]], cache: DynamicCache) -> Float[Tensor, "P V"]:
    """Fills the cache with the prompts, padded on the left; the logits of what follows them."""
    width = max(len(prompt) for prompt in prompts)
    padding = torch.tensor([width - len(prompt) for prompt in prompts])[:, None]
    tokens = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    output = model(
        input_ids=tokens.to(model.device),
        attention_mask=(torch.arange(width) >= padding).to(model.device) if padding.any() else None,
        position_ids=(torch.arange(width) - padding).clamp(min=0).to(model.device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1]
