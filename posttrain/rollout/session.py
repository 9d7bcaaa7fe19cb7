"""Sessions: a rank's prompts with the engine that completes them and the verifiers that score them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from posttrain.batch import Finish
from posttrain.data.for_policy import load_prompts
from posttrain.decoding.recipe import DecodeSettings
from posttrain.engines.base import Completion, Engine, Sampling
from posttrain.engines.ends import completion_text
from posttrain.engines.for_policy import LengthBudget, policy_engine
from posttrain.models.load import load_tokenizer
from posttrain.models.text import text_of
from posttrain.rollout.collect import share_of_prompts
from posttrain.rollout.rollouts import Prompts
from posttrain.rollout.verifying import submitter
from posttrain.system.files import json_number
from posttrain.system.long_work import LongWork
from posttrain.system.processes import Processes
from posttrain.verify import VerifierPool


class Session(NamedTuple):
    """A rank's prompts and everything that completes and scores them."""

    processes: Processes
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    verifiers: VerifierPool
    prompts: Prompts


@contextmanager
def session(recipe: DecodeSettings) -> Iterator[Session]:
    """Opens the session of this rank: loads tokenizer and data, and starts verifiers and engine.

    The engine has room for the longest prompt and completion.

    Raises:
        UserError: if the input is wrong; the message says what to change.
    """
    tokenizer = load_tokenizer(recipe.policy)
    rows = load_prompts(recipe.data, recipe.policy, recipe.verify, tokenizer=tokenizer, base=recipe.base)
    budget = LengthBudget(rows.longest_prompt, recipe.sampling.max_tokens, place=rows.longest_place)
    with Processes(dtype=recipe.policy.dtype) as processes:
        prompts = share_of_prompts(rows, recipe.seed, processes)
        with (
            VerifierPool(recipe.verify, plain_text=text_of(tokenizer)) as verifiers,
            closing(
                policy_engine(recipe.policy, recipe.engine, [budget], tokenizer=tokenizer, seed=recipe.seed)
            ) as engine,
        ):
            yield Session(processes, tokenizer, engine, verifiers, prompts)


def completed(recipe: DecodeSettings, decoder: Engine, on: Session) -> list[dict[str, Any]]:
    """Completes the session's prompts with a decoder, and returns a row for each completion.

    Verifiers work while further completions are still decoded.
    """
    prompts, decode = on.prompts, completion_text(recipe.policy, on.tokenizer)
    texts: dict[tuple[int, int], str] = {}
    submit = submitter(on.verifiers, decode)
    work = LongWork("completions", len(prompts) * recipe.completions)

    def ended(prompt: int, sample: int, completion: Completion) -> None:
        texts[prompt, sample] = text = decode(completion.tokens)
        row, place = prompts.rows[prompt], prompts.places[prompt]
        submit((prompt, sample), text, completion, prompts.tokens[prompt], row, place)
        work.count()

    sampling = Sampling.of(recipe.sampling)
    groups = decoder.generate(prompts.tokens, sampling, recipe.completions, seeds=prompts.seeds, on_completion=ended)
    verdicts = on.verifiers.collect()
    rows = []
    for i, group in enumerate(groups):
        for j, completion in enumerate(group):
            score = {"score": json_number(verdicts[i, j].score)} if recipe.verify else {}
            rows.append({**prompts.rows[i], **to_row(texts[i, j], completion), **score})
    return rows


def to_row(text: str, completion: Completion) -> dict[str, Any]:
    """Makes the row of a completion for a JSON file; NaN and infinite numbers become null."""
    length = len(completion.tokens)
    return {
        "completion": text,
        "tokens": length,
        "finish": Finish(completion.finish).name.lower(),
        "logp": json_number(sum(completion.logps)),
        "generated": float(length),
        **{name: json_number(value) for name, value in completion.measured.items()},
    }


MEANS = {"tokens": 1, "generated": 1, "scored": 1, "accepted": 2, "kl": 3, "kl_bound": 3, "log_z": 3, "log_z_upper": 3}
"""Columns that tables average over completions, with the number of decimals."""
