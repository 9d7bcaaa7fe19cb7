"""A batched sampler on a plain transformers model: the engine for machines without vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from posttrain.batch import Finish
from posttrain.engines.base import Request, Row, Sampling, Shaper
from posttrain.engines.cache import growing_cache
from posttrain.engines.ends import end_of_sequence_ids
from posttrain.engines.requests import stop_ids
from posttrain.engines.sampling import draw, filters, uniforms
from posttrain.engines.sampling_check import check_sampling
from posttrain.engines.stepping import SteppingEngine
from posttrain.engines.weights import load_verified
from posttrain.models.attention import kernel_for
from posttrain.models.load_checks import check_weights

KEEP_WIDTH = 7 / 8  # ended rows are removed when at most this share of the rows is still running


class TransformersEngine(SteppingEngine):
    """Samples ``max_concurrent`` completions at a time with a key-value cache; finished ones leave the batch.

    A prompt is read once for all its samples. At temperature 0 the log-probs are those of the model's own softmax.

    Args:
        model: hub name or local folder.
        dtype: dtype of weights and activations; log-probs are always float32.
        max_model_len: most tokens of a prompt and its completion together.
        max_concurrent: number of completions generated at the same time.
        seed: seed of the random seeds for calls of ``generate`` without seeds.
        revision: branch, tag or commit of a model on the hub.
        trust_remote_code: run modelling code that comes with the model.
        ends: tokens that end a completion. Default: those of the model's configuration.
        device: device of the model. Default: the current CUDA device, or else the CPU.

    Raises:
        RecipeError: if the model's family cannot be sampled from in this way.
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
        ends: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(max_model_len=max_model_len, seed=seed)
        self._max_concurrent = max_concurrent
        source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        self._eos = end_of_sequence_ids(model, **source) if ends is None else tuple(ends)
        self._waiting: dict[int, Request] = {}
        self._rounds: list[Round] = []  # unfinished rounds, the newest last
        self._repeated: Exception | None = None  # error of the last round that was repeated request by request
        self._alone: set[int] = set()  # waiting requests whose first round failed: each gets a round of its own
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        with torch.random.fork_rng(devices=[]):  # weights that the checkpoint lacks are random
            kernel = kernel_for(AutoConfig.from_pretrained(model, **source), "sdpa")
            with_report: Any = AutoModelForCausalLM.from_pretrained(
                model, dtype=getattr(torch, dtype), attn_implementation=kernel, output_loading_info=True, **source
            )
        loaded, report = with_report
        check_weights(loaded, report, f"policy.model: {str(model)!r}")
        self._model: PreTrainedModel | None = loaded.to(device).eval().requires_grad_(False)  # type: ignore[arg-type]
        self.vocab_size = len(loaded.get_input_embeddings().weight)  # type: ignore[arg-type]
        check_sampling(self, self._model, max_model_len, lambda: self._repeated)

    def load(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See :meth:`posttrain.engines.base.Engine.load`."""
        model = self._opened()
        places = {name: parameter.data for name, parameter in model.named_parameters(remove_duplicate=False)}

        def copy(stream: Iterable[tuple[str, Tensor]]) -> None:
            for name, tensor in stream:
                places[name].copy_(tensor)

        load_verified(tensors, places, copy)
        self.version = version

    def forget_prefixes(self) -> None:
        """See :meth:`posttrain.engines.stepping.SteppingEngine.forget_prefixes`: this engine keeps none."""

    def close(self) -> None:
        """See :meth:`posttrain.engines.base.Engine.close`."""
        self._model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def model(self) -> PreTrainedModel:
        """The model that samples, for decoders that edit its hidden states."""
        return self._opened()

    def _opened(self) -> PreTrainedModel:
        if self._model is None:
            raise RuntimeError("the engine has been closed")
        return self._model

    def _add(self, number: int, request: Request) -> None:
        self._opened()
        self._waiting[number] = request

    def _drop(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._waiting.pop(number, None)
            self._alone.discard(number)
        self._rounds = [batch for batch in self._rounds if self._in_flight.keys() & batch.requests.keys()]

    def _advance(self) -> None:
        """Samples one token of each request of the newest round. Rounds nest only if a shaper generates."""
        current = self._rounds.pop() if self._rounds else self._next_round()
        try:
            ended = next(current.tokens, None) is None
        except Exception as error:  # reported to the requests of the round
            self._split_or_fail(current, error)
            return
        if not ended:
            self._rounds.append(current)

    def _split_or_fail(self, failed: Round, error: Exception) -> None:
        """Gives each request of a failed round a round of its own, so that only those at fault get the error.

        A round that has drawn tokens, or whose distribution is shaped, is not repeated: its requests get the error.
        """
        running = [number for number in failed.requests if number in self._in_flight]
        begun = any(self._in_flight[number].tokens for number in running)
        shaped = any(
            request.shaper is not None for request in failed.requests.values()
        )  # the error may be the shaper's
        if begun or shaped or len(failed.requests) == 1:
            for number in running:
                self._fail(number, error)
            return
        self._waiting = {number: failed.requests[number] for number in running} | self._waiting
        self._alone.update(running)
        self._repeated = error

    def _next_round(self) -> Round:
        """Takes waiting requests with equal settings, the shortest first, so that neighbours need little padding."""
        earliest, first = next(iter(self._waiting.items()))
        if earliest in self._alone:
            self._alone.remove(earliest)
            requests = {earliest: self._waiting.pop(earliest)}
            return Round(requests, self._sample(requests))
        similar = {
            number: request
            for number, request in self._waiting.items()
            if request.sampling == first.sampling and request.shaper is first.shaper and number not in self._alone
        }
        chosen = sorted(similar, key=lambda number: len(similar[number].prompt))[: self._max_concurrent]
        requests = {number: self._waiting.pop(number) for number in chosen}
        return Round(requests, self._sample(requests))

    def _sample(self, requests: Mapping[int, Request]) -> Iterator[int]:
        """Samples requests with equal settings together; yields the number of tokens so far after each token."""
        model, numbers, batched = self._opened(), [*requests], [*requests.values()]
        sampling, shaper = batched[0].sampling, batched[0].shaper
        stops = torch.tensor(stop_ids(sampling, self._eos), dtype=torch.long, device=model.device)
        uniform = uniforms([request.seed for request in batched], sampling.max_tokens).to(model.device)
        processors = filters(sampling)
        tokens = torch.zeros(len(batched), sampling.max_tokens, dtype=torch.long, device=model.device)
        logps = torch.zeros(len(batched), sampling.max_tokens, device=model.device)
        streams = any(request.stream for request in batched)
        batch = Running.start(model, batched, sampling.max_tokens)
        for column in range(sampling.max_tokens):
            logits = batch.logits if shaper is None else batch.shaped(shaper, batched, tokens[:, :column], sampling)
            drawn, logp = draw(logits, uniform[batch.rows, column], sampling.temperature, processors)
            tokens[batch.rows, column], logps[batch.rows, column] = drawn, logp
            stopped = torch.isin(drawn, stops)
            ended = batch.running & (stopped | (column + 1 == sampling.max_tokens))
            if streams:
                ended |= self._aborted(batch, numbers)
            reported = batch.running if streams else ended
            if reported.any():
                places = (numbers, batch.rows[reported].tolist(), column)
                self._report(*places, tokens, logps, stopped[reported].tolist(), ended[reported].tolist())
            if ended.any():
                batch.running &= ~ended
                if not batch.running.any():
                    return
                drawn = batch.compact(drawn)
            batch.advance(model, drawn)
            yield column + 1

    def _aborted(self, batch: Running, numbers: Sequence[int]) -> Bool[Tensor, " B"]:
        """Marks running rows whose request was aborted."""
        aborted = [numbers[row] not in self._in_flight for row in batch.rows.tolist()]
        return batch.running & torch.tensor(aborted, device=batch.running.device)

    def _report(
        self,
        numbers: Sequence[int],
        rows: Sequence[int],
        column: int,
        tokens: Int[Tensor, "N columns"],
        logps: Float[Tensor, "N columns"],
        stopped: Sequence[bool],
        ended: Sequence[bool],
    ) -> None:
        """Reports tokens of rows: the newest to requests that stream, all of them to requests that have ended."""
        for row, stop, end in zip(rows, stopped, ended, strict=True):
            flight = self._in_flight.get(numbers[row])
            if flight is None or not (end or flight.request.stream):
                continue
            new = slice(column if flight.request.stream else 0, column + 1)
            finish = (Finish.STOPPED if stop else Finish.LENGTH) if end else None
            self._grow(numbers[row], tokens[row, new].tolist(), logps[row, new].tolist(), finish)


@dataclass(frozen=True, slots=True)
class Round:
    """Requests that are sampled together."""

    requests: Mapping[int, Request]  # requests by number
    tokens: Iterator[int]  # draws a token of each request at every step


@dataclass(slots=True)
class Running:
    """The rows of a batch that is being sampled: ``B`` of the ``N`` requests that it started with."""

    rows: Int[Tensor, " B"]  # index of the request of each row
    running: Bool[Tensor, " B"]  # False: has ended, and will be removed
    logits: Float[Tensor, "B V"]  # logits of the next token
    position: Int[Tensor, " B"]  # position of the next token
    visible: Bool[Tensor, "B columns"]  # False at the padding on the left; has all columns that may be used
    padded: bool  # True: some row has padding
    cache: DynamicCache

    @staticmethod
    def start(model: PreTrainedModel, requests: Sequence[Request], max_tokens: int) -> Running:
        """Reads each prompt once and gives every request its copy of the keys and values."""
        distinct = list(dict.fromkeys(tuple(request.prompt) for request in requests))
        length = torch.tensor([len(prompt) for prompt in distinct])
        padding = length.max() - length
        cache = growing_cache(model.config)
        logits = _read(model, distinct, cache)
        row = {prompt: row for row, prompt in enumerate(distinct)}
        source = torch.tensor([row[tuple(request.prompt)] for request in requests])
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
        """Logits whose softmax at the temperature is the shaper's distribution; those of ended rows stay unchanged."""
        temperature = sampling.temperature or 1.0
        running_rows = self.rows[self.running]
        live = [requests[row] for row in running_rows.tolist()]
        rows = [
            Row(*request.place, start=len(request.prompt), tokens=[*request.prompt, *ids])
            for request, ids in zip(live, sampled[running_rows].tolist(), strict=True)
        ]
        logits = self.logits.float().clone()  # outputs of a forward pass must not be changed in place
        logps = shaper((logits[self.running] / temperature).log_softmax(-1), rows)
        logits[self.running] = temperature * logps.to(logits)
        return logits

    def compact(self, drawn: Int[Tensor, " B"]) -> Int[Tensor, " kept"]:
        """Removes ended rows if there are many; returns the tokens of the rows that stay."""
        if self.running.sum() > KEEP_WIDTH * len(self.running):
            return drawn
        rows = self.running.nonzero()[:, 0]
        self.cache.batch_select_indices(rows)
        self.rows, self.running = self.rows[rows], self.running[rows]
        self.position, self.visible = self.position[rows], self.visible[rows]
        return drawn[rows]

    @torch.inference_mode()
    def advance(self, model: PreTrainedModel, drawn: Int[Tensor, " B"]) -> None:
        """Appends the drawn tokens and computes the logits of the next tokens."""
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
    """Fills the cache with the prompts, padded on the left, and returns the logits of the next tokens."""
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
