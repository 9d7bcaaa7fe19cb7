"""Rows of a dataset with their prompts as token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from posttrain.data.left_out import LeftOut, left_out
from posttrain.data.problems import Problems
from posttrain.data.prompts import prompt_problem
from posttrain.data.raw_rows import BATCH, RawRows
from posttrain.data.read import read
from posttrain.data.template_columns import TEMPLATE_COLUMNS, check_template_columns, template_arguments
from posttrain.errors import DataError
from posttrain.models.chat_template import REFUSALS, refusal, render
from posttrain.models.token_ids import PromptIds, prompt_ids, tokens_before
from posttrain.recipe import sections
from posttrain.recipe.yaml_reader import suggestion


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
    template: Mapping[str, Any]  # arguments of the chat template for all rows
    _tokens: pa.ChunkedArray  # list<int32>
    _numbers: np.ndarray  # number of each row in the source
    _to_prompt: Callable[[Any], Any]

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.source[int(self._numbers[index])]
        return {**row, "prompt": self._to_prompt(row["prompt"])}

    def template_arguments(self, index: int) -> dict[str, Any]:
        """Arguments of the chat template for a row: those of all rows, then those of its own columns."""
        return template_arguments(self.source[int(self._numbers[index])], self.template)

    def prompt_tokens(self, index: int) -> list[int]:
        """Token ids of a row's prompt, the template's generation prompt included."""
        return self._tokens[int(self._numbers[index])].as_py()

    def place(self, index: int) -> str:
        """Place of a row for messages, such as ``problems.jsonl:7``."""
        return self.source.place(int(self._numbers[index]))

    def with_ids_from(self, size: int) -> Iterator[tuple[str, int]]:
        """Yields place and largest token id of each row whose prompt has an id of ``size`` or above."""
        if pc.call_function("max", [pc.call_function("list_flatten", [self._tokens])]).as_py() < size:
            return
        for index in range(len(self)):
            if (largest := max(self.prompt_tokens(index))) >= size:
                yield self.place(index), largest

    def values(self, name: str) -> list[Any]:
        """The values of a column, in the order of the rows, with objects as they were written."""
        everything = [row[name] for rows in self.source.batches([name]) for row in rows]
        return [everything[number] for number in self._numbers.tolist()]

    @property
    def longest_place(self) -> str:
        """Place of the row with the longest prompt."""
        lengths = pc.call_function("list_value_length", [self._tokens]).to_numpy()[self._numbers]
        return self.place(int(lengths.argmax()))

    def fingerprint(self) -> str:
        """Hash of all columns of the dataset, and of the prompts' token ids."""
        digest = hashlib.blake2b(digest_size=16)
        for table in self.source.rows.with_format("arrow").iter(BATCH):
            digest.update(_arrow_bytes(table))  # pyright: ignore[reportArgumentType]
        for chunk in self._tokens.chunks:
            digest.update(_arrow_bytes(pa.table({"tokens": chunk})))
        digest.update(self._numbers.tobytes())
        return digest.hexdigest()

    def column(self, name: str) -> pa.ChunkedArray:
        """A column of the dataset as it is stored, in the order of the rows."""
        return _arrow_column(self.source.rows, name).take(pa.array(self._numbers))


def _arrow_bytes(table: pa.Table) -> memoryview:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table.combine_chunks())
    return memoryview(sink.getvalue())


def load_rows(data: sections.DataSection, *, base: Path | None = None, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """Reads, checks, and tokenises a dataset.

    Args:
        data: the recipe's section ``data``.
        base: the recipe's folder, for relative paths.
        tokenizer: the policy's tokenizer; its chat template is applied to conversational prompts.

    Raises:
        DataError: if rows are wrong; the message names the file, row and column of each.
    """
    return tokenise_rows(read_columns(data, base), data, tokenizer)


def untokenised_rows(data: sections.DataSection, base: Path | None) -> Rows:
    """Reads and checks a dataset whose prompts no model reads: they stay texts or messages.

    Raises:
        DataError: if rows are wrong; the message names the file, row and column of each.
    """
    source = read_columns(data, base)
    _require_prompt(source)
    _check_prompts(source)
    to_prompt = str if isinstance(source[0]["prompt"], str) and data.system is None else _message_maker(data)
    numbers = np.arange(len(source))
    return Rows(
        columns=tuple(source.rows.column_names),
        dropped=(),
        longest_prompt=0,
        source=source,
        template=data.template,
        _tokens=pa.chunked_array([pa.array([[]] * len(source), type=pa.list_(pa.int32()))]),
        _numbers=numbers,
        _to_prompt=to_prompt,
    )


def tokenise_rows(source: RawRows, data: sections.DataSection, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """Checks and tokenises the prompts of rows that have been read.

    Raises:
        DataError: if rows are wrong; the message names the file, row and column of each.
    """
    _require_prompt(source)
    _check_prompts(source)
    to_prompt = _prompt_maker(source, data, tokenizer)
    check_template_columns(source, rendered=to_prompt is not str)
    tokens, lengths, begun = _tokenise(source, data, tokenizer, to_prompt)
    numbers = _short_enough(lengths, data.max_prompt_tokens, source)
    before = tokenizer.decode(tokens_before(tokenizer))
    once = f"the prompt begins with {before!r} itself, which is not put before it again"
    return Rows(
        columns=tuple(source.rows.column_names),
        dropped=left_out(
            f"a prompt of more than {data.max_prompt_tokens} tokens (`max_prompt_tokens`)",
            np.setdiff1d(np.arange(len(lengths)), numbers).tolist(),
            source.place,
        )
        + left_out(once, begun, source.place, "as written"),
        longest_prompt=int(lengths[numbers].max()),
        source=source,
        template=data.template,
        _tokens=tokens,
        _numbers=numbers,
        _to_prompt=to_prompt,
    )


def read_columns(data: sections.DataSection, base: Path | None) -> RawRows:
    """Reads the rows of a dataset, with copies of columns, and without those that are to be ignored.

    Raises:
        DataError: if the rows cannot be read, or if there is no such column.
    """
    source = with_columns(read(data, base), data.columns)
    absent = [name for name in data.ignore if name not in source.rows.column_names]
    if absent:
        hint = suggestion(absent[0], source.rows.column_names)
        raise DataError(f"{source.name}: no column {absent[0]!r} to leave unread (`ignore`); {hint}")
    return replace(source, rows=source.rows.remove_columns(list(data.ignore))) if data.ignore else source


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
    objects = source.objects | {new for new, old in copies.items() if old in source.objects}
    return replace(source, rows=rows, objects=objects)


def _require_prompt(source: RawRows) -> None:
    names = source.rows.column_names
    if "prompt" not in names:
        close = next((name for name in ("question", "problem", "instruction", "query", "input") if name in names), None)
        copy = f"`columns: {{prompt: {close or '<column>'}}}` copies one"
        raise DataError(f"{source.name}: no column 'prompt'; {suggestion('prompt', names)}; {copy}")


def _arrow_column(rows: datasets.Dataset, name: str) -> pa.ChunkedArray:
    return rows.select_columns(name).with_format("arrow")[:][name]  # pyright: ignore[reportReturnType]


def _check_prompts(source: RawRows) -> None:
    problems, number = Problems(), 0
    for rows in source.batches(["prompt"]):
        for row in rows:
            problem = prompt_problem(row["prompt"])
            if problem:
                problems.add(source.place(number), f"column 'prompt' {problem}")
            number += 1
    problems.raise_if_any()


def _prompt_maker(
    source: RawRows, data: sections.DataSection, tokenizer: PreTrainedTokenizerBase
) -> Callable[[Any], Any]:
    """Returns a function from a stored prompt to the plain text or the messages that the policy gets."""
    plain = isinstance(source[0]["prompt"], str)
    template = tokenizer.chat_template is not None
    chat = not plain or data.system is not None or (template if data.chat is None else data.chat)
    if chat and not template:
        why = "its prompts are messages" if not plain else "`chat: true` or `system` asks for messages"
        raise DataError(
            f"{source.name}: {why}, but the tokenizer has no chat template: use an instruction-tuned model's"
        )
    if data.chat is False and (data.system is not None or not plain):
        raise DataError(f"{source.name}: `chat: false` goes with plain prompts and without `system`")
    return _message_maker(data) if chat else str


def _message_maker(data: sections.DataSection) -> Callable[[Any], list[dict[str, Any]]]:
    def messages(prompt: Any) -> list[dict[str, Any]]:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if data.system is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": data.system})
        return turns

    return messages


class Tokenised(NamedTuple):
    """Prompts as token ids."""

    tokens: pa.ChunkedArray  # list<int32>
    lengths: np.ndarray  # number of tokens of each prompt
    begun: list[int]  # rows that have the tokens themselves which the tokenizer puts before every text


def _tokenise(
    source: RawRows, data: sections.DataSection, tokenizer: PreTrainedTokenizerBase, to_prompt: Callable[[Any], Any]
) -> Tokenised:
    problems, chunks, lengths, begun, number = Problems(), [], [], [], 0
    names = ["prompt", *(name for name in TEMPLATE_COLUMNS if name in source.rows.column_names)]
    for rows in source.batches(names):
        texts = []
        for row in rows:
            try:
                texts.append(_text(to_prompt(row["prompt"]), tokenizer, template_arguments(row, data.template)))
            except REFUSALS as error:
                problems.add(source.place(number), f"column 'prompt': {refusal(error)}")
            number += 1
        problems.raise_if_any()
        encoded = _token_ids(texts, tokenizer, plain=to_prompt is str)
        begun += [number - len(texts) + i for i, prompt in enumerate(encoded) if prompt.begun]
        chunks.append(pa.array([prompt.ids for prompt in encoded], type=pa.list_(pa.int32())))
        lengths += (len(prompt.ids) for prompt in encoded)
    return Tokenised(pa.chunked_array(chunks), np.array(lengths), begun)


def _token_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase, *, plain: bool) -> list[PromptIds]:
    """Tokenises prompts. A chat template writes special tokens itself; a plain prompt gets the tokenizer's."""
    if plain or not texts:
        return prompt_ids(texts, tokenizer)
    encoded: Any = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
    return [PromptIds(ids, begun=False) for ids in encoded["input_ids"]]


def _text(prompt: Any, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> str:
    return prompt if isinstance(prompt, str) else render(prompt, tokenizer, arguments, generate=True)


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
