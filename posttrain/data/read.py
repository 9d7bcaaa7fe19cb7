"""Reads a dataset from the place that ``data.path`` names, and remembers where each row came from."""

from __future__ import annotations

import csv
import difflib
import inspect
import json
import os
import traceback
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet

from posttrain.data.problems import Problems, kind_of, shown
from posttrain.data.raw_rows import RawRows
from posttrain.errors import DataError
from posttrain.recipe import sections
from posttrain.recipe.resolve import resolve, specify
from posttrain.recipe.yaml_reader import suggestion
from posttrain.system.hub import offline_note, use_hub
from posttrain.system.places import expanded, is_there, no_plain_file, obstacle


def read(data: sections.DataSection, base: Path | None) -> RawRows:
    """Reads the rows of a dataset, at most ``data.limit``.

    Args:
        base: the recipe's folder; relative paths are looked up there, then in the current folder.

    Raises:
        DataError: if the rows cannot be read; the message names the file and line.
    """
    # `name`, `split` and `options` may be without use here: another dataset in place of the base's inherits them.
    source = read_generator(data, base) if ".py:" in data.path else _read_stored(data, base)
    if data.limit is not None and data.limit < len(source.rows):
        return replace(source, rows=source.rows.select(range(data.limit)))
    return source


def _read_stored(data: sections.DataSection, base: Path | None) -> RawRows:
    path = find(data.path, base)
    if path is None:
        return read_hub(data, base)
    if path.is_dir():
        return read_folder(path, data)
    if kind := no_plain_file(path):
        raise DataError(f"{path}: is {kind}; a dataset is a file or a folder")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        kind = f"files ending in `{path.suffix}`" if path.suffix else "files without an ending"
        raise DataError(f"{path}: {kind} cannot be read; use {', '.join(READERS)} or a .py generator")
    if data.split != "train":
        raise DataError(
            f"{path}: a file has no split {data.split!r}; leave `split` out, and use `limit` for the first rows"
        )
    return reader(path)


def find(path: str, base: Path | None) -> Path | None:
    """Finds a file or folder, in the recipe's folder or else in the current one; None if there is none."""
    for folder in _folders(base):
        candidate = folder / expanded(path)
        if is_there(candidate):
            return candidate
    return None


def read_json_lines(path: Path) -> RawRows:
    """Reads a file with one JSON object on each line, in UTF-8; blank lines are skipped.

    Raises:
        DataError: if a line is not a JSON object; the message names each such line.
    """
    lines, problems = array("q"), Problems()

    def rows() -> Iterator[dict[str, Any]]:
        del lines[:]
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = _json_line(
                        line.lstrip(b"\xef\xbb\xbf") if number == 1 else line, f"{path}:{number}", problems
                    )
                    if row is not None:
                        lines.append(number)
                        yield row

    return _collect(path, rows, lambda index: f"{path}:{lines[index]}", problems)


def _json_line(line: bytes, place: str, problems: Problems) -> dict[str, Any] | None:
    try:
        value = json.loads(line.decode().rstrip())
    except UnicodeDecodeError as error:
        problems.add(place, f"byte {error.start + 1} is not UTF-8: save the file in UTF-8")
    except json.JSONDecodeError as error:
        hint = "; a JSON array goes into a file that ends in .json" if line.strip() == b"[" else ""
        problems.add(place, f"not JSON at column {error.colno}: {error.msg}; each line should be one object{hint}")
    except BEYOND_JSON as error:
        problems.add(place, _beyond(error))
    else:
        if isinstance(value, dict):
            return value
        problems.add(place, f'{shown(value)} where an object such as {{"prompt": "...", "answer": "..."}} is expected')
    return None


BEYOND_JSON = (ValueError, RecursionError)
"""Errors of Python's JSON reader on values that it cannot hold."""


def _beyond(error: ValueError | RecursionError) -> str:
    what = (
        "lists or objects nested too deeply" if isinstance(error, RecursionError) else "a number with too many digits"
    )
    return f"{what} to be read"


def read_json(path: Path) -> RawRows:
    """Reads a JSON array of objects.

    Raises:
        DataError: if the file holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start + 1} is not UTF-8: save the file in UTF-8") from None
    except json.JSONDecodeError as error:
        hint = "; one object a line goes into a file that ends in .jsonl" if error.msg == "Extra data" else ""
        raise DataError(f"{path}:{error.lineno}: not JSON at column {error.colno}: {error.msg}{hint}") from None
    except BEYOND_JSON as error:
        raise DataError(f"{path}: {_beyond(error)}") from None
    if not isinstance(values, list):
        raise DataError(f"{path}: {kind_of(values)} where an array of objects is expected")
    problems = Problems()

    def place(index: int) -> str:
        return f"{path}, row {index + 1}"

    for index, value in enumerate(values):
        if not isinstance(value, dict):
            problems.add(place(index), f"{shown(value)} where an object is expected")
    problems.raise_if_any()
    return _collect(path, lambda: values, place, problems)


def read_csv(path: Path) -> RawRows:
    """Reads comma- or tab-separated values under a header, in UTF-8. CSV has no types: every value is text.

    Raises:
        DataError: if the number of values differs from the header's; the message names each such line.
    """
    lines, problems = array("q"), Problems()

    def rows() -> Iterator[dict[str, Any]]:
        del lines[:]
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            header = next(reader, [])
            _check_header(path, header)
            for values in reader:
                if not values:
                    continue
                if len(values) == len(header):
                    lines.append(reader.line_num)
                    yield dict(zip(header, values, strict=True))
                else:
                    hint = "; put values that contain a comma in double quotes" if len(values) > len(header) else ""
                    problem = f"{len(values)} values for the {len(header)} columns {', '.join(header)}{hint}"
                    problems.add(f"{path}:{reader.line_num}", problem)

    try:
        return _collect(path, rows, lambda index: f"{path}:{lines[index]}", problems)
    except csv.Error as error:
        raise DataError(f"{path}: not CSV after line {lines[-1] if lines else 1}: {error}") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8: save the file in UTF-8") from None


def _check_header(path: Path, header: list[str]) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{path}:1: column {twice[0]!r} occurs twice in the header")


def read_parquet(path: Path) -> RawRows:
    """Reads a Parquet file.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        table = pyarrow.parquet.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {_first_line(error)}") from None
    if not len(table):
        raise DataError(f"{path}: no rows")
    return RawRows(datasets.Dataset(table), lambda index: f"{path}, row {index + 1}", str(path))


READERS: Mapping[str, Callable[[Path], RawRows]] = {
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".parquet": read_parquet,
    ".csv": read_csv,
    ".tsv": read_csv,
}


MOST_FILES = 20_000
"""Most files in a dataset's folder and the folders below it."""

DATA_SUFFIXES = frozenset([*READERS, ".arrow", ".txt", ".xml", ".gz", ".bz2", ".lz4", ".xz", ".zst", ".zip", ".tar"])
"""Endings of the files that may hold rows, packed or not."""


def read_folder(path: Path, data: sections.DataSection) -> RawRows:
    """Reads a folder that ``save_to_disk`` made, or one of data files laid out as on the hub.

    Raises:
        DataError: if there is no such split, or a file cannot be read.
    """
    name = f"{path} ({data.split})"
    _check_folder(path)
    try:
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return _named(_pick_split(datasets.load_from_disk(str(path)), data.split, path), name)
        return _named(datasets.load_dataset(str(path), data.name, split=data.split), name)
    except DataError:
        raise
    except Exception as error:  # datasets raises many kinds, from its builders and from Arrow
        for file in sorted(file for file in path.rglob("*") if file.suffix.lower() in READERS):
            READERS[file.suffix.lower()](file)  # raises an error that names the wrong line, if there is one
        raise DataError(f"{path}: {_first_line(error)}") from None


def _check_folder(folder: Path) -> None:
    """Refuses a folder that holds no data, in which datasets would search for minutes, such as ``/`` or ``/sys``."""
    count, holds_data = 0, False
    for _, _, names in os.walk(folder):
        count += len(names)
        holds_data = holds_data or any(Path(name).suffix.lower() in DATA_SUFFIXES for name in names)
        if count > MOST_FILES:
            raise DataError(f"{folder}: has more than {MOST_FILES:,} files; name the folder of the dataset, or a file")
    if not holds_data:
        raise DataError(f"{folder}: holds no data files, such as {', '.join(READERS)}")


def read_hub(data: sections.DataSection, base: Path | None) -> RawRows:
    """Reads a dataset of the hub, or from the hub's cache.

    Raises:
        DataError: if it cannot be loaded, with the hub's message.
    """
    if problem := next(filter(None, (obstacle(folder / expanded(data.path)) for folder in _folders(base))), ""):
        raise DataError(f"data.path: {problem}")
    if Path(data.path).suffix.lower() in READERS or data.path.startswith((".", "/", "~")):
        raise DataError(_missing(data.path, base))
    use_hub()
    try:
        rows = datasets.load_dataset(data.path, data.name, split=data.split)
    except Exception as error:  # datasets and the hub's client raise many kinds
        raise DataError(
            f"data.path: {data.path!r} is no file or folder here, nor a dataset of the hub: {_first_line(error)}"
            f"{offline_note()}"
        ) from None
    return _named(rows, f"{data.path} ({data.split})")


def read_generator(data: sections.DataSection, base: Path | None) -> RawRows:
    """Reads the rows that a user's generator function yields: dicts of columns.

    Raises:
        DataError: if it raises or yields something else; the message names the row.
    """
    function = resolve(specify(data.path, "posttrain.data.read", _folders(base)))
    try:
        inspect.signature(function).bind(**data.options)
    except TypeError as error:
        raise DataError(f"{data.path}: {error}; `data.options` are {dict(data.options)}") from None
    problems = Problems()

    def place(index: int) -> str:
        return f"{data.path}, row {index + 1}"

    def rows() -> Iterator[dict[str, Any]]:
        index = -1
        try:
            for index, row in enumerate(islice(function(**data.options), data.limit)):
                if isinstance(row, dict):
                    yield row
                else:
                    problems.add(place(index), f"yielded {shown(row)} where a dict of columns is expected")
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            at = f"{Path(where.filename).name}:{where.lineno}"
            raise DataError(f"{place(index + 1)}: raised {type(error).__name__}: {error} ({at})") from error

    return _collect(data.path, rows, place, problems)


def _collect(
    name: str | Path, rows: Callable[[], Iterable[dict[str, Any]]], place: Callable[[int], str], problems: Problems
) -> RawRows:
    source = RawRows.of(rows, place, str(name))
    problems.raise_if_any()
    if not len(source):
        raise DataError(f"{name}: no rows")
    return source


def _named(rows: Any, name: str) -> RawRows:
    if not len(rows):
        raise DataError(f"{name}: no rows")
    return RawRows(rows, lambda index: f"{name}, row {index + 1}", name)


def _pick_split(stored: Any, split: str, path: Path) -> datasets.Dataset:
    if isinstance(stored, datasets.Dataset):
        return stored
    if split not in stored:
        raise DataError(f"{path}: no split {split!r}; {suggestion(split, stored)}")
    return stored[split]


def _missing(path: str, base: Path | None) -> str:
    folders = [folder.resolve() for folder in _folders(base)]
    looked = " and ".join(dict.fromkeys(str((folder / path).parent) for folder in folders))
    beside = [
        file.name for folder in folders if (folder / path).parent.is_dir() for file in (folder / path).parent.iterdir()
    ]
    close = difflib.get_close_matches(Path(path).name, beside, n=1)
    return f"data.path: there is no file {path!r} in {looked}" + (f" (did you mean {close[0]!r}?)" if close else "")


def _folders(base: Path | None) -> list[Path]:
    return [Path()] if base is None else [base, Path()]


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
