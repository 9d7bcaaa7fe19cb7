"""Rows of a dataset with their prompts as token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import jinja2
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase
from trl.data_utils import apply_chat_template

from posttrain.data.left_out import LeftOut, left_out
from posttrain.data.problems import Problems
from posttrain.data.prompts import prompt_problem
from posttrain.data.read import RawRows, read
from posttrain.errors import DataError
from posttrain.recipe import sections
from posttrain.recipe.yaml_reader import suggestion

BATCH = 1000  # number of rows that are rendered and tokenised at a time


@dataclass(frozen=True)
class Rows:
    """A checked dataset: ``rows[i]`` is a row's columns, ``rows.prompt_tokens(i)`` its prompt as token ids.

    Columns and tokens stay in Arrow and become Python objects when they are read. ``prompt`` is a list of messages if
    the chat template wraps it, even if it is plain text in the dataset.
    """

    columns: tuple[str, ...]
    dropped: tuple[LeftOut, ...]  # account of the prompts longer than ``max_prompt_tokens``
    longest_prompt: int  # tokens of the longest prompt
    source: RawRows
    _rows: datasets.Dataset
    _tokens: pa.ChunkedArray  # list<int32>
    _numbers: np.ndarray  # number of each row in the source
    _to_prompt: Callable[[Any], Any]

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[int(self._numbers[index])]
        return {**row, "prompt": self._to_prompt(row["prompt"])}

    def prompt_tokens(self, index: int) -> list[int]:
        """Token ids of a row's prompt, the template's generation prompt included."""
        return self._tokens[int(self._numbers[index])].as_py()

    def place(self, index: int) -> str:
        """Place of a row for messages, such as ``problems.jsonl:7``."""
        return self.source.place(int(self._numbers[index]))

    def column(self, name: str) -> pa.ChunkedArray:
        """A column of the dataset as it is stored, in the order of the rows."""
        return _arrow_column(self._rows, name).take(pa.array(self._numbers))


def load_rows(data: sections.DataSection, *, base: Path | None = None, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """Reads, checks, and tokenises a dataset.

    Args:
        data: the recipe's section ``data``.
        base: the recipe's folder, for relative paths.
        tokenizer: the policy's tokenizer; its chat template is applied to conversational prompts.

    Raises:
        DataError: if rows are wrong; the message names the file, row and column of each.
    """
    return tokenise_rows(with_columns(read(data, base), data.columns), data, tokenizer)


def tokenise_rows(source: RawRows, data: sections.DataSection, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """Checks and tokenises the prompts of rows that have been read.

    Raises:
        DataError: if rows are wrong; the message names the file, row and column of each.
    """
    _require_prompt(source)
    _check_prompts(source)
    to_prompt = _prompt_maker(source, data, tokenizer)
    tokens, lengths = _tokenise(source, data, tokenizer, to_prompt)
    numbers = _short_enough(lengths, data.max_prompt_tokens, source)
    return Rows(
        columns=tuple(source.rows.column_names),
        dropped=left_out(
            f"a prompt of more than {data.max_prompt_tokens} tokens (`max_prompt_tokens`)",
            np.setdiff1d(np.arange(len(lengths)), numbers).tolist(),
            source.place,
        ),
        longest_prompt=int(lengths[numbers].max()),
        source=source,
        _rows=source.rows,
        _tokens=tokens,
        _numbers=numbers,
        _to_prompt=to_prompt,
    )


def with_columns(source: RawRows, copies: Mapping[str, str]) -> RawRows:
    """Copies columns under new names.

    Raises:
        DataError: if there is no such column, or the new name is taken.
    """
    problems, names = Problems(), source.rows.column_names
    for new, old in copies.items():
        if old not in names:
            problems.add(source.name, f"no column {old!r} to copy to {new!r} (`columns`); {suggestion(old, names)}")
        elif new in names and new != old:
            problems.add(source.name, f"there is a column {new!r} already; {old!r} cannot be copied to it (`columns`)")
    problems.raise_if_any()
    rows = source.rows
    for new, old in copies.items():
        if new != old:
            rows = rows.add_column(new, _arrow_column(rows, old))  # pyright: ignore[reportCallIssue, reportArgumentType]
    return RawRows(rows, source.place, source.name)


def _require_prompt(source: RawRows) -> None:
    names = source.rows.column_names
    if "prompt" not in names:
        close = next((name for name in ("question", "problem", "instruction", "query", "input") if name in names), None)
        copy = f"`columns: {{prompt: {close or '<column>'}}}` copies one"
        raise DataError(f"{source.name}: no column 'prompt'; {suggestion('prompt', names)}; {copy}")


def _arrow_column(rows: datasets.Dataset, name: str) -> pa.ChunkedArray:
    return rows.select_columns(name).with_format("arrow")[:][name]  # pyright: ignore[reportReturnType]


def _batches(source: RawRows) -> Iterator[list[Any]]:
    for batch in source.rows.select_columns("prompt").iter(BATCH):
        yield batch["prompt"]  # pyright: ignore[reportArgumentType, reportCallIssue]


def _check_prompts(source: RawRows) -> None:
    problems, number = Problems(), 0
    for prompts in _batches(source):
        for prompt in prompts:
            problem = prompt_problem(prompt)
            if problem:
                problems.add(source.place(number), f"column 'prompt' {problem}")
            number += 1
    problems.raise_if_any()


def _prompt_maker(
    source: RawRows, data: sections.DataSection, tokenizer: PreTrainedTokenizerBase
) -> Callable[[Any], Any]:
    """Returns a function from a stored prompt to the plain text or the messages that the policy gets."""
    plain = isinstance(source.rows[0]["prompt"], str)
    template = tokenizer.chat_template is not None
    chat = not plain or data.system is not None or (template if data.chat is None else data.chat)
    if chat and not template:
        why = "its prompts are messages" if not plain else "`chat: true` or `system` asks for messages"
        raise DataError(
            f"{source.name}: {why}, but the tokenizer has no chat template: use an instruction-tuned model's"
        )
    if data.chat is False and (data.system is not None or not plain):
        raise DataError(f"{source.name}: `chat: false` goes with plain prompts and without `system`")
    if not chat:
        return str

    def messages(prompt: Any) -> list[dict[str, Any]]:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [without_nulls(m) for m in prompt]
        if data.system is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": data.system})
        return turns

    return messages


def without_nulls(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message without nulls, which Arrow fills in for keys that only other messages have."""
    return {key: value for key, value in message.items() if value is not None}


def _tokenise(
    source: RawRows, data: sections.DataSection, tokenizer: PreTrainedTokenizerBase, to_prompt: Callable[[Any], Any]
) -> tuple[pa.ChunkedArray, np.ndarray]:
    """Tokenises the prompts; returns their token ids, and the number of tokens of each."""
    problems, chunks, lengths, number = Problems(), [], [], 0
    for prompts in _batches(source):
        texts = []
        for prompt in map(to_prompt, prompts):
            try:
                texts.append(_render(prompt, tokenizer, data.template))
            except (jinja2.TemplateError, TypeError, ValueError) as error:
                problems.add(source.place(number), f"column 'prompt': the chat template rejects it: {error}")
            number += 1
        # A chat template writes the special tokens itself; a plain prompt gets the tokenizer's, such as one BOS.
        plain = to_prompt is str
        encoded = tokenizer(texts, add_special_tokens=plain, return_attention_mask=False)["input_ids"] if texts else []
        chunks.append(pa.array(encoded, type=pa.list_(pa.int32())))
        lengths += map(len, encoded)
    problems.raise_if_any()
    return pa.chunked_array(chunks), np.array(lengths)


def _render(prompt: Any, tokenizer: PreTrainedTokenizerBase, template: Mapping[str, Any]) -> str:
    if isinstance(prompt, str):
        return prompt
    return apply_chat_template({"prompt": prompt}, tokenizer, **template)["prompt"]


def _short_enough(lengths: np.ndarray, longest: int | None, source: RawRows) -> np.ndarray:
    """Numbers of the rows whose prompts have at most ``longest`` tokens; a prompt without tokens is an error."""
    problems = Problems()
    for number in np.flatnonzero(lengths == 0):
        problems.add(source.place(int(number)), "column 'prompt' has no tokens")
    problems.raise_if_any()
    numbers = np.flatnonzero(lengths <= longest) if longest is not None else np.arange(len(lengths))
    if not len(numbers):
        raise DataError(
            f"{source.name}: every prompt has more than {longest} tokens (`max_prompt_tokens`); "
            f"the shortest has {lengths.min()}"
        )
    return numbers
