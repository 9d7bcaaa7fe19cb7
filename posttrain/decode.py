"""Completions from a YAML file: ``posttrain decode recipes/decode/best_of_n.yaml`` decodes, verifies, writes, tells."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import datasets
from pydantic import ConfigDict, InstanceOf
from pydantic.dataclasses import dataclass
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from posttrain.batch import Finish
from posttrain.collect import sampling_of, share_of_prompts
from posttrain.data import check_columns, load_rows
from posttrain.decoding.build import build_decoder, check_models
from posttrain.decoding.checks import decoder_conflicts
from posttrain.display import TABLE_WIDTH
from posttrain.engines.base import Completion, Engine
from posttrain.engines.for_policy import Room, policy_engine
from posttrain.errors import UserError
from posttrain.models.load import load_tokenizer
from posttrain.recipe import sections
from posttrain.recipe.loading import load_as, placed
from posttrain.recipe.part import Part
from posttrain.recipe.sampling import SamplingRecipe
from posttrain.recipe.yaml_reader import Location, Overrides
from posttrain.rollout import Prompts
from posttrain.runtime import Runtime
from posttrain.system.files import write_rows
from posttrain.verify import VerifierPool

OUTPUTS = (".jsonl", ".parquet")


@dataclass(config=ConfigDict(extra="forbid"), frozen=True, kw_only=True)
class DecodeSettings(SamplingRecipe):
    """What is completed and verified, whatever decodes it."""

    modules: ClassVar[Mapping[str, str]] = {
        "verify": "posttrain.verify.functions",
        "decoder": "posttrain.decoding.decoders",
    }

    policy: sections.Policy
    data: sections.Data
    verify: tuple[InstanceOf[Part], ...]


@dataclass(config=ConfigDict(extra="forbid"), frozen=True, kw_only=True)
class DecodeRecipe(DecodeSettings):
    """Which prompts are completed, by which decoder, and where the completions go."""

    decoder: InstanceOf[Part] | None = None  # default: plain samples
    verify: tuple[InstanceOf[Part], ...] = ()
    output: str | None = None  # .jsonl or .parquet; default: completions/<name of this file>.jsonl

    name: str = "decode"

    @property
    def file(self) -> Path:
        """Where the completions go."""
        return Path(self.output or Path("completions") / f"{self.name}.jsonl")

    def conflicts(self) -> Iterator[tuple[Location, str]]:
        if self.file.suffix not in OUTPUTS:
            yield ("output",), f"{self.output!r} should end with {' or '.join(OUTPUTS)}"
        if self.decoder is not None:
            yield from decoder_conflicts(self.decoder, self.sampling, self.engine)
        elif self.sampling.temperature == 0 and self.completions > 1:
            yield ("completions",), f"at temperature 0 all {self.completions} completions of a prompt are equal"


def run_decode(path: str | Path, overrides: Overrides = ()) -> Path:
    """Runs the decode recipe in a YAML file, prints what it took, and returns the file of completions.

    Raises:
        UserError: for what a person can mend.
    """
    recipe = load_as(DecodeRecipe, path, overrides)
    try:
        return decode(recipe)
    except UserError as error:
        raise placed(error, Path(path), overrides) from error


def decode(recipe: DecodeRecipe) -> Path:
    """Completes prompts on all ranks; the main one writes a row for each completion.

    A row has the columns of the data set, ``completion``, ``tokens`` (their number), ``finish``, ``logp`` (of the whole
    completion, see :mod:`posttrain.decoding`), ``score`` where there are verifiers, and what the decoder measured.

    Raises:
        UserError: for what a person can mend.
    """
    check_models(recipe.decoder)
    with session(recipe) as on:
        runtime = on.runtime
        decoder = build_decoder(recipe.decoder, on.engine, on.tokenizer, runtime, recipe.policy) or on.engine
        start = time.perf_counter()
        found = runtime.together(lambda: completed(recipe, decoder, on))
        seconds = time.perf_counter() - start
        everything = [row for part in runtime.gather(found) for row in part]
        if runtime.is_main:
            _write(recipe.file, everything)
            print(f"{recipe.name}: {len(everything)} completions in {recipe.file}")
            Console(width=TABLE_WIDTH).print(summary(recipe, everything, seconds))
    return recipe.file


class Session(NamedTuple):
    """What a rank completes its prompts with."""

    runtime: Runtime
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    verifiers: VerifierPool
    prompts: Prompts


@contextmanager
def session(recipe: DecodeSettings) -> Iterator[Session]:
    """A rank's share of the prompts with all that it takes to complete and verify them.

    The engine has room for the longest prompt and completion.

    Raises:
        UserError: for what a person can mend.
    """
    tokenizer = load_tokenizer(recipe.policy)
    rows = load_rows(recipe.data, tokenizer=tokenizer, base=recipe.base)
    check_columns(rows, recipe.verify)
    room = Room(rows.longest_prompt, recipe.sampling.max_tokens)
    with Runtime(dtype=recipe.policy.dtype) as runtime:
        prompts = share_of_prompts(rows, recipe.seed, runtime)
        with (
            VerifierPool(recipe.verify) as verifiers,
            closing(policy_engine(recipe.policy, recipe.engine, [room], seed=recipe.seed)) as engine,
        ):
            yield Session(runtime, tokenizer, engine, verifiers, prompts)


def completed(recipe: DecodeSettings, decoder: Engine, on: Session) -> list[dict[str, Any]]:
    """A row for each completion; verifiers work while others are still decoded."""
    prompts, texts = on.prompts, dict[tuple[int, int], str]()

    def ended(prompt: int, sample: int, completion: Completion) -> None:
        texts[prompt, sample] = text = str(on.tokenizer.decode(completion.tokens, skip_special_tokens=True))
        row, place = prompts.rows[prompt], prompts.places[prompt]
        on.verifiers.submit((prompt, sample), text, completion.tokens, row, place=place)

    sampling = sampling_of(recipe.sampling)
    groups = decoder.generate(prompts.tokens, sampling, recipe.completions, seeds=prompts.seeds, on_completion=ended)
    verdicts = on.verifiers.collect()
    found = []
    for i, group in enumerate(groups):
        for j, completion in enumerate(group):
            score = {"score": _number(verdicts[i, j].score)} if recipe.verify else {}
            found.append({**prompts.rows[i], **to_row(texts[i, j], completion), **score})
    return found


def to_row(text: str, completion: Completion) -> dict[str, Any]:
    """What is written of a completion; what a number does not know (NaN, infinite) is null."""
    length = len(completion.tokens)
    return {
        "completion": text,
        "tokens": length,
        "finish": Finish(completion.finish).name.lower(),
        "logp": _number(sum(completion.logps)),
        "generated": float(length),
        **{name: _number(value) for name, value in completion.measured.items()},
    }


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    if path.suffix == ".parquet":
        path.parent.mkdir(parents=True, exist_ok=True)
        names = list(dict.fromkeys(name for row in rows for name in row))
        columns = {name: [_storable(row.get(name)) for row in rows] for name in names}
        datasets.Dataset.from_dict(columns).to_parquet(str(path))
    else:
        write_rows(path, rows)


def _storable(value: Any) -> Any:
    """Messages and other nested values as JSON: their members may differ from row to row."""
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else value


MEANS = {"tokens": 1, "generated": 1, "scored": 1, "accepted": 2, "kl": 3, "kl_bound": 3, "log_z": 3, "log_z_upper": 3}
"""What is averaged over completions for the table, and its decimals."""


def summary(recipe: DecodeRecipe, rows: Sequence[dict[str, Any]], seconds: float) -> Table:
    """Means over completions: score with its standard error, tokens kept and generated, scorer calls, KL in nats."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    cells: list[str] = []
    if recipe.verify:
        table.add_column("score")
        cells.append(_mean_and_error([row["score"] for row in rows]))
    for name, decimals in MEANS.items():
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            table.add_column(name)
            cells.append(f"{sum(values) / len(values):.{decimals}f}")
    table.add_column("seconds")
    table.add_row(*cells, f"{seconds:.1f}")
    return table


def _mean_and_error(scores: Iterable[float | None]) -> str:
    known = [score for score in scores if score is not None]
    if not known:
        return "none"
    mean = sum(known) / len(known)
    if len(known) == 1:
        return f"{mean:.3f}"
    deviation = math.sqrt(sum((score - mean) ** 2 for score in known) / (len(known) - 1))
    return f"{mean:.3f} ± {deviation / math.sqrt(len(known)):.3f}"
