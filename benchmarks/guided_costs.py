"""Costs of guidance: token by token beside plain sampling, in blocks beside best-of-n, and both beside plain loops.

The plain loops work like published implementations: they decode one prompt at a time, and score every candidate by a
separate forward pass over the whole prefix (token by token: ARGS, Khanov et al. 2024, arXiv:2402.01694, and TQ*,
Chakraborty et al. 2024, arXiv:2405.20495; in blocks: one continuation after another). The policy does use a cache of
keys and values in them.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from guided_models import draw
from transformers import AutoModelForCausalLM

from posttrain.decoding.candidate_cache import value_score
from posttrain.decoding.population import Population
from posttrain.decoding.shaping import Shaped
from posttrain.engines import make_engine
from posttrain.engines.base import Completion, Engine, Sampling
from posttrain.models.value_files import load_value
from posttrain.quickstart.model import make_tokenizer
from posttrain.quickstart.start import prompt_ids
from posttrain.recipe import sections

LIMITS = {"token_wise_over_plain": 2.9, "blockwise_over_best_of_n": 1.5, "over_plain_loop": 10.0}
"""Upper bounds of the ratios; a lower bound for ``over_plain_loop``."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the measurement."""

    concurrent: tuple[int, ...] = (16, 64, 256)
    tokens: int = 64
    candidates: int = 4  # token by token
    branch: int = 8  # candidates for each block, and n of best-of-n
    block: int = 16
    prompts: int = 64  # prompts of the measurement in blocks
    rounds: int = 3  # measured calls of each side, in turns
    loop_prompts: int = 2
    loop_tokens: int = 32


@dataclass(frozen=True)
class Call:
    """The result of one call: tokens generated, seconds, processor seconds."""

    tokens: float
    seconds: float
    processor: float

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


Side = Callable[[], float]
"""One side of a comparison: generates and returns the number of tokens."""


def measure_costs(policy: Path, value: Path, sizes: Sizes) -> dict[str, Any]:
    """Measures and prints all ratios, with the numbers that they are computed from."""
    tokenizer = make_tokenizer()
    chains = draw(max(*sizes.concurrent, sizes.prompts), random.Random(1))
    prompts = [prompt_ids(tokenizer, chain.prompt) for chain in chains]
    value_model = load_value(value).eval().requires_grad_(False)
    section = sections.EngineSection(use="vllm", cache_mb=512, max_concurrent=512)
    longest = max(map(len, prompts)) + sizes.tokens
    with closing(make_engine(policy, section, dtype="float32", max_model_len=longest)) as engine:
        result: dict[str, Any] = {"token_wise": {}}
        for count in sizes.concurrent:
            sides = token_sides(engine, value_model, prompts[:count], sizes)
            result["token_wise"][str(count)] = _ratio(sides, "shaped", "plain", sizes.rounds)
        sides = block_sides(engine, value_model, prompts[: sizes.prompts], sizes)
        result["blockwise"] = _ratio(sides, "blockwise", "best_of_n", sizes.rounds)
    result["plain_loop"] = loops(policy, value_model, prompts[: sizes.loop_prompts], sizes)
    result["limits"] = LIMITS
    _compare_with_loops(result, sizes)
    _print(result)
    return result


def token_sides(engine: Engine, model: Any, prompts: Sequence[list[int]], sizes: Sizes) -> dict[str, Side]:
    """Plain sampling, and sampling shaped by the values of the most probable tokens."""
    sampling = Sampling(max_tokens=sizes.tokens, ignore_eos=True)
    shaped = Shaped(engine, value_score(model), k=sizes.candidates)  # type: ignore[arg-type]
    return {
        "plain": lambda: _completion_tokens(engine.generate(prompts, sampling, seeds=range(len(prompts)))),
        "shaped": lambda: _completion_tokens(shaped.generate(prompts, sampling, seeds=range(len(prompts)))),
    }


def block_sides(engine: Engine, model: Any, prompts: Sequence[list[int]], sizes: Sizes) -> dict[str, Side]:
    """Best-of-n and blockwise decoding, each of which generates n times the tokens of a completion."""
    sampling, score = Sampling(max_tokens=sizes.tokens, ignore_eos=True), value_score(model)
    best = Population(engine, score, branch=sizes.branch)
    blocks = Population(engine, score, branch=sizes.branch, block=sizes.block)
    return {
        "best_of_n": lambda: _generated_tokens(best.generate(prompts, sampling, seeds=range(len(prompts)))),
        "blockwise": lambda: _generated_tokens(blocks.generate(prompts, sampling, seeds=range(len(prompts)))),
    }


def _completion_tokens(groups: Sequence[Sequence[Completion]]) -> float:
    """Tokens of all completions."""
    return float(sum(len(completion.tokens) for group in groups for completion in group))


def _generated_tokens(groups: Sequence[Sequence[Completion]]) -> float:
    """Tokens that were generated for all completions, discarded ones included."""
    return sum(completion.measured["generated"] for group in groups for completion in group)


def timed(side: Side) -> Call:
    """Calls one side and measures the call."""
    seconds, processor = time.perf_counter(), time.process_time()
    tokens = side()
    return Call(tokens, time.perf_counter() - seconds, time.process_time() - processor)


def _ratio(sides: dict[str, Side], this: str, that: str, rounds: int) -> dict[str, float]:
    """Median ratios of the times of two sides that take turns, for equal tokens. The first round is a warm-up."""
    calls: dict[str, list[Call]] = {this: [], that: []}
    for _ in range(rounds + 1):
        for name in (that, this):
            calls[name].append(timed(sides[name]))
    pairs = list(zip(calls[this], calls[that], strict=True))[1:]
    assert all(a.tokens == b.tokens for a, b in pairs), "the sides generate different numbers of tokens"
    return {
        "ratio": statistics.median(a.seconds / b.seconds for a, b in pairs),
        "ratio_processor": statistics.median(a.processor / b.processor for a, b in pairs),
        f"{that}_tokens_per_second": statistics.median(b.rate for _, b in pairs),
        f"{this}_tokens_per_second": statistics.median(a.rate for a, _ in pairs),
    }


# --------------------------------------------------------------------------------------------------------- plain loops


def loops(policy: Path, value_model: Any, prompts: Sequence[list[int]], sizes: Sizes) -> dict[str, float]:
    """Generated tokens a second of the plain loops."""
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
    tokens = timed(lambda: sum(loop_token_wise(model, value_model, prompt, sizes) for prompt in prompts))
    blocks = timed(lambda: sum(loop_blockwise(model, value_model, prompt, sizes) for prompt in prompts))
    return {"token_wise_tokens_per_second": tokens.rate, "blockwise_tokens_per_second": blocks.rate}


def last_value(value_model: Any, tokens: Sequence[int]) -> float:
    """The value of one prefix, from a forward pass over the whole prefix."""
    ids = torch.tensor([list(tokens)])
    states = torch.zeros_like(ids, dtype=torch.bool)
    states[0, -1] = True
    return float(value_model(ids, states)[0][0, -1])


@torch.inference_mode()
def loop_token_wise(model: Any, value_model: Any, prompt: Sequence[int], sizes: Sizes) -> int:
    """Samples one completion: for each token, scores the k most probable candidates one after another."""
    tokens, cache, fresh = list(prompt), None, torch.tensor([list(prompt)])
    for _ in range(sizes.loop_tokens):
        output = model(input_ids=fresh, past_key_values=cache, use_cache=True)
        cache, logp = output.past_key_values, output.logits[0, -1].log_softmax(-1)
        top, candidates = logp.topk(sizes.candidates)
        values = torch.tensor([last_value(value_model, [*tokens, token]) for token in candidates.tolist()])
        drawn = int(candidates[torch.multinomial((top + values).softmax(-1), 1)])
        tokens.append(drawn)
        fresh = torch.tensor([[drawn]])
    return sizes.loop_tokens


@torch.inference_mode()
def loop_blockwise(model: Any, value_model: Any, prompt: Sequence[int], sizes: Sizes) -> int:
    """Samples one completion: for each block, samples and scores n candidates one after another.

    Returns:
        The number of generated tokens, discarded ones included.
    """
    tokens, generated = list(prompt), 0
    for _ in range(sizes.loop_tokens // sizes.block):
        drawn = []
        for _ in range(sizes.branch):
            ids = torch.tensor([tokens])
            # exactly one block, even if it contains an end-of-sequence token
            block = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                min_new_tokens=sizes.block,
                max_new_tokens=sizes.block,
            )[0].tolist()
            generated += sizes.block
            drawn.append((last_value(value_model, block), block))
        tokens = max(drawn)[1]
    return generated


def _compare_with_loops(result: dict[str, Any], sizes: Sizes) -> None:
    """Adds to the result how many times as fast as the plain loops the decoders are."""
    loop, largest = result["plain_loop"], str(sizes.prompts)
    rates = {"token_wise": result["token_wise"][largest]["shaped_tokens_per_second"]}
    rates["blockwise"] = result["blockwise"]["blockwise_tokens_per_second"]
    for name, rate in rates.items():
        loop[f"{name}_times_faster"] = rate / loop[f"{name}_tokens_per_second"]


def _print(result: dict[str, Any]) -> None:
    """Prints the table of ratios and their limits."""
    print(f"\n{'costs':58}{'ratio':>8}{'cpu':>8}   limit")
    for count, row in result["token_wise"].items():
        name = f"token by token, {count} completions, beside plain sampling"
        print(f"{name:58}{row['ratio']:8.2f}{row['ratio_processor']:8.2f}   {LIMITS['token_wise_over_plain']}")
    row = result["blockwise"]
    name = "in blocks beside best-of-n, equal tokens"
    print(f"{name:58}{row['ratio']:8.2f}{row['ratio_processor']:8.2f}   {LIMITS['blockwise_over_best_of_n']}")
    for name in ("token_wise", "blockwise"):
        faster = result["plain_loop"][f"{name}_times_faster"]
        label = f"{name}: times faster than a plain loop"
        print(f"{label:58}{faster:8.0f}{'':8}   {LIMITS['over_plain_loop']:.0f} at least")
