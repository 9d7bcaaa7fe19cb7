"""Sessions: the prompts of a decode recipe or suite with the engine that completes them and the verifiers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, NamedTuple

from posttrain.batch import Finish
from posttrain.data import Rows
from posttrain.data.for_policy import load_prompts
from posttrain.decoding.build import decoder_context
from posttrain.decoding.context import DecoderContext
from posttrain.decoding.recipe import DecodeSettings
from posttrain.engines.base import Completion, Engine, Sampling
from posttrain.engines.ends import completion_text
from posttrain.engines.for_policy import LengthBudget, policy_engine
from posttrain.engines.stepping import SteppingEngine
from posttrain.models.load import load_tokenizer
from posttrain.models.text import text_of
from posttrain.recipe.part import Part
from posttrain.rollout.collect import own_share, prompts_of
from posttrain.rollout.rollouts import refusals_placed
from posttrain.rollout.verifying import submitter
from posttrain.system.files import json_number
from posttrain.system.long_work import LongWork
from posttrain.system.processes import Processes
from posttrain.verify import VerifierPool


class Session(NamedTuple):
    """Prompts and everything that completes and scores them."""

    processes: Processes
    context: DecoderContext
    engine: Engine
    verifiers: VerifierPool
    rows: Rows


@contextmanager
def session(recipe: DecodeSettings, begin: Callable[[Processes, Rows], None]) -> Iterator[Session]:
    """Opens a session on this rank: loads tokenizer and data, and starts verifiers and engine.

    The engine has room for the longest prompt and completion.

    Args:
        begin: called once the data are known, before anything expensive starts.

    Raises:
        UserError: if the input is wrong; the message says what to change.
    """
    tokenizer = load_tokenizer(recipe.policy)
    rows = load_prompts(recipe.data, recipe.policy, recipe.verify, tokenizer=tokenizer, base=recipe.base)
    budget = LengthBudget(rows.longest_prompt, recipe.sampling.max_tokens, place=rows.longest_place)
    with Processes(dtype=recipe.policy.dtype) as processes:
        processes.every_nth(len(rows), "data")  # refuses fewer prompts than processes
        begin(processes, rows)
        with (
            VerifierPool(recipe.verify, plain_text=text_of(tokenizer)) as verifiers,
            closing(
                policy_engine(recipe.policy, recipe.engine, [budget], tokenizer=tokenizer, seed=recipe.seed)
            ) as engine,
        ):
            yield Session(processes, decoder_context(tokenizer, processes, recipe.policy), engine, verifiers, rows)


def complete_block(
    recipe: DecodeSettings, decoder: Part | None, block: Sequence[int], on: Session, work: LongWork
) -> list[dict[str, Any]]:
    """Completes a block of prompts on all ranks, and returns a row for each completion, in the order of the prompts.

    The rows do not depend on blocks that came before: decoder and caches start anew.

    Args:
        decoder: draws the completions; None: the policy alone.
        block: numbers of the prompts.
        work: counts the completions.
    """
    share = on.processes.together(partial(_own_rows, recipe, decoder, block, on, work))
    shares = sorted((pair for part in on.processes.gather(share) for pair in part), key=lambda pair: pair[0])
    work.batch_ended()
    return [row for _, rows in shares for row in rows]


def _own_rows(
    recipe: DecodeSettings, decoder: Part | None, block: Sequence[int], on: Session, work: LongWork
) -> list[tuple[int, list[dict[str, Any]]]]:
    """Number and rows of each prompt of this rank's share of a block; verifiers work while others are decoded."""
    index = own_share(block, on.processes)
    if not index:
        return []
    prompts, decode = prompts_of(on.rows, index, recipe.seed), completion_text(recipe.policy, on.context.tokenizer)
    texts: dict[tuple[int, int], str] = {}
    submit = submitter(on.verifiers, decode)

    def ended(prompt: int, sample: int, completion: Completion) -> None:
        texts[prompt, sample] = text = decode(completion.tokens)
        row, place = prompts.rows[prompt], prompts.places[prompt]
        submit((prompt, sample), text, completion, prompts.tokens[prompt], row, place)
        work.count()

    forget_prefixes(on.engine, *on.context.engines.values())
    sampler = on.engine if decoder is None else decoder(on.engine, on.context)
    sampling = Sampling.of(recipe.sampling)
    with refusals_placed(prompts):
        groups = sampler.generate(
            prompts.tokens, sampling, recipe.completions, seeds=prompts.seeds, on_completion=ended
        )
    verdicts = on.verifiers.collect()
    shares = []
    for i, group in enumerate(groups):
        rows = []
        for j, completion in enumerate(group):
            score = {"score": json_number(verdicts[i, j].score)} if recipe.verify else {}
            rows.append({**prompts.rows[i], **to_row(texts[i, j], completion), **score})
        shares.append((index[i], rows))
    return shares


def forget_prefixes(*engines: Engine) -> None:
    """Makes engines forget cached prefixes: their keys and values may differ in the last bits from fresh ones."""
    for engine in engines:
        if isinstance(engine, SteppingEngine):
            engine.forget_prefixes()


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
