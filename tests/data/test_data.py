"""Tests of datasets: every format, every way a row can be wrong, prompts as tokens, samplers that resume."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from posttrain.commands import cli
from posttrain.data import Rows, check_columns, load_rows
from posttrain.errors import DataError
from posttrain.recipe.part import Part
from posttrain.recipe.sections import DataSection
from posttrain.verify import functions as verifiers

EXAMPLES = Path(__file__).parents[2] / "examples"
QUESTIONS = [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i), "level": i} for i in range(5)]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "Bye"}]


@pytest.fixture
def load(tokenizer, tmp_path: Path) -> Callable[..., Rows]:
    """A function ``load("file.jsonl", chat=False, ...)``; paths are relative to the test's folder, like a recipe's."""

    def loader(path: str, *, tokenizer=tokenizer, **options: Any) -> Rows:
        return load_rows(DataSection(path=path, **options), base=tmp_path, tokenizer=tokenizer)

    return loader


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


# --- sources ------------------------------------------------------------------------------------------------------


def write_csv(path: Path, separator: str = ",") -> None:
    lines = [
        ["prompt", "answer", "level"],
        *([f'"{row["prompt"]}"', row["answer"], str(row["level"])] for row in QUESTIONS),
    ]
    path.write_text("\n".join(separator.join(line) for line in lines) + "\n")


GENERATOR = """
def count(*, upto=5, start=0):
    for i in range(start, upto):
        yield {"prompt": f"What is {i} + {i}?", "answer": str(2 * i), "level": i}
"""

SOURCES: dict[str, Callable[[Path], object]] = {
    "rows.jsonl": lambda path: write_lines(path, QUESTIONS),
    "rows.json": lambda path: path.write_text(json.dumps(QUESTIONS)),
    "rows.parquet": lambda path: datasets.Dataset.from_list(QUESTIONS).to_parquet(path),
    "rows.csv": write_csv,
    "rows.tsv": lambda path: write_csv(path, "\t"),
    "saved": lambda path: datasets.Dataset.from_list(QUESTIONS).save_to_disk(path),
    "splits": lambda path: datasets.DatasetDict(train=datasets.Dataset.from_list(QUESTIONS)).save_to_disk(path),
    "folder": lambda path: (path.mkdir(), write_lines(path / "train.jsonl", QUESTIONS)),
    "own.py:count": lambda path: path.with_name("own.py").write_text(GENERATOR),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_gives_the_same_rows(name: str, load, tmp_path: Path) -> None:
    SOURCES[name](tmp_path / name)
    rows = load(name, chat=False)
    assert len(rows) == 5 and set(rows.columns) == {"prompt", "answer", "level"}
    expected = dict(QUESTIONS[3])
    if name.endswith(("csv", "tsv")):
        expected["level"] = "3"  # CSV has no types
    assert rows[3] == expected
    assert name.partition(":")[0] in rows.place(3) and rows.place(3).endswith(("row 4", "rows.jsonl:4", ":5"))


def test_folder_of_parquet_with_splits(load, tmp_path: Path) -> None:
    (tmp_path / "set" / "data").mkdir(parents=True)
    for split in ("train", "test"):
        rows = datasets.Dataset.from_list([{"prompt": split}])
        rows.to_parquet(tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet")
    assert load("set", split="test", chat=False)[0] == {"prompt": "test"}


def test_paths_are_looked_up_beside_the_recipe_and_then_here(load, tmp_path: Path, monkeypatch, tokenizer) -> None:
    here = tmp_path / "here"
    here.mkdir()
    write_lines(here / "a.jsonl", [{"prompt": "here"}])
    monkeypatch.chdir(here)
    assert load("a.jsonl", chat=False)[0]["prompt"] == "here"
    write_lines(tmp_path / "a.jsonl", [{"prompt": "beside"}])
    assert load("a.jsonl", chat=False)[0]["prompt"] == "beside"
    assert load(str(here / "a.jsonl"), chat=False)[0]["prompt"] == "here"


def test_generator_options_and_limit(load, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(GENERATOR)
    assert [row["level"] for row in load("own.py:count", options={"start": 3, "upto": 10**9}, limit=2)] == [3, 4]


def test_limit_and_columns(load, tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"question": f"q{i}", "answer": "1"} for i in range(5)])
    rows = load("a.jsonl", columns={"prompt": "question"}, limit=3, chat=False)
    assert len(rows) == 3 and rows[2] == {"question": "q2", "answer": "1", "prompt": "q2"}


def test_json_keeps_what_arrow_would_change(load, tmp_path: Path) -> None:
    """Dates stay text; blank lines count in line numbers."""
    lines = [{"prompt": "when?", "answer": "2026-01-01", "extra": {"a": [1, 2]}}, "", {"prompt": "and?"}]
    write_lines(tmp_path / "a.jsonl", lines)
    rows = load("a.jsonl", chat=False)
    assert rows[0] == lines[0]
    assert rows[1] == {"prompt": "and?", "answer": None, "extra": None} and rows.place(1).endswith("a.jsonl:3")


def test_a_byte_order_mark_is_no_part_of_the_data(load, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n', encoding="utf-8-sig")
    (tmp_path / "a.csv").write_text("prompt\nx\n", encoding="utf-8-sig")
    assert load("a.jsonl", chat=False)[0] == load("a.csv", chat=False)[0] == {"prompt": "x"}


def test_csv_with_quoted_commas_and_line_ends(load, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,answer\n"one, two\nthree","a ""b"""\nplain,c\n')
    rows = load("a.csv", chat=False)
    assert [rows[i]["prompt"] for i in range(2)] == ["one, two\nthree", "plain"] and rows[0]["answer"] == 'a "b"'
    assert rows.place(1).endswith("a.csv:4")


# --- prompts ------------------------------------------------------------------------------------------------------


def test_plain_prompts_become_chats_where_the_tokenizer_has_a_template(load, tmp_path: Path, tokenizer) -> None:
    write_lines(tmp_path / "a.jsonl", [{"prompt": "Hi"}])
    rows = load("a.jsonl")
    assert rows[0]["prompt"] == [{"role": "user", "content": "Hi"}]
    assert tokenizer.decode(rows.prompt_tokens(0)) == "<|user|>Hi<|end|><|assistant|>"
    rows = load("a.jsonl", system="Be brief.")
    assert rows[0]["prompt"][0] == {"role": "system", "content": "Be brief."}
    assert tokenizer.decode(rows.prompt_tokens(0)) == "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>"
    assert rows.longest_prompt == len(rows.prompt_tokens(0))
    assert tokenizer.decode(load("a.jsonl", chat=False).prompt_tokens(0)) == "Hi"


def test_conversations(load, tmp_path: Path, tokenizer) -> None:
    with_system = [{"role": "system", "content": "Sing."}, *CHAT]
    with_more = [{"role": "user", "content": "Hi", "name": "Ann"}]
    write_lines(tmp_path / "a.jsonl", [{"prompt": CHAT}, {"prompt": with_system}, {"prompt": with_more}])
    rows = load("a.jsonl", system="Be brief.")
    assert [row["prompt"] for row in rows] == [
        [{"role": "system", "content": "Be brief."}, *CHAT],
        with_system,
        [{"role": "system", "content": "Be brief."}, *with_more],
    ]
    text = "<|system|>Sing.<|end|><|user|>Hi<|end|><|assistant|>Ho<|end|><|user|>Bye<|end|><|assistant|>"
    assert tokenizer.decode(rows.prompt_tokens(1)) == text


def test_template_arguments(load, tmp_path: Path, tokenizer, tiny_model_folder: Path) -> None:
    from transformers import AutoTokenizer

    thinking = AutoTokenizer.from_pretrained(tiny_model_folder)
    thinking.chat_template += "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    write_lines(tmp_path / "a.jsonl", [{"prompt": "Hi"}])
    assert not thinking.decode(load("a.jsonl", tokenizer=thinking).prompt_tokens(0)).endswith("</think>")
    rows = load("a.jsonl", tokenizer=thinking, template={"enable_thinking": False})
    assert thinking.decode(rows.prompt_tokens(0)).endswith("<|assistant|><think></think>")


def test_one_beginning_of_sequence_token(load, tmp_path: Path, tiny_model_folder: Path) -> None:
    """The tokenizer here puts a BOS token before every text, and its chat template writes one too."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    pad = tokenizer.pad_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", pad)]
    )
    tokenizer.chat_template = "<|pad|>" + tokenizer.chat_template
    write_lines(tmp_path / "a.jsonl", [{"prompt": "Hi"}])
    for chat in (True, False):
        assert load("a.jsonl", tokenizer=tokenizer, chat=chat).prompt_tokens(0).count(pad) == 1


def test_long_prompts_are_left_out_and_counted(load, tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"prompt": "x" * n, "answer": n} for n in (1, 9, 2, 8, 3)])
    rows = load("a.jsonl", chat=False, max_prompt_tokens=3)
    assert (len(rows), rows.dropped[0].count, rows.longest_prompt) == (3, 2, 3)
    assert [rows[i]["answer"] for i in range(3)] == [1, 2, 3] and rows.place(2).endswith("a.jsonl:5")
    assert rows.column("answer").to_pylist() == [1, 2, 3] and rows.prompt_tokens(2) == rows.prompt_tokens(0) * 3


def test_many_rows_come_back_in_order(load, tmp_path: Path) -> None:
    """There are more rows than are converted, rendered or tokenised at a time; a column appears late."""
    write_lines(tmp_path / "a.jsonl", [{"prompt": str(i)} | ({"late": i} if i > 11_000 else {}) for i in range(12_345)])
    rows = load("a.jsonl", chat=False)
    assert len(rows) == 12_345 and rows[0]["late"] is None and rows[12_000] == {"prompt": "12000", "late": 12_000}
    assert [len(rows.prompt_tokens(i)) for i in (9, 999, 1000, 10_000, 12_344)] == [1, 3, 4, 5, 5]


# --- broken data --------------------------------------------------------------------------------------------------

GOOD = {"prompt": "What is 1 + 1?", "answer": "2"}

BROKEN_LINES: dict[str, tuple[list[Any], str]] = {
    "not json": ([GOOD, '{"prompt": "x",}'], r"rows.jsonl:2: not JSON at column \d+: .*; each line should be one"),
    "an array": (["[", GOOD, "]"], r"rows.jsonl:1: not JSON .*a JSON array goes into a file that ends in .json"),
    "not an object": ([GOOD, "7"], r"rows.jsonl:2: 7 \(a number\) where an object such as"),
    "number": ([GOOD, {"prompt": 7, "answer": "2"}], r"rows.jsonl:2: column 'prompt' is 7 \(a number\), but 'What"),
    "all numbers": ([{"prompt": 7}], r"rows.jsonl:1: column 'prompt' is 7 \(a number\); it should be text, or a list"),
    "null": ([GOOD, "", {"prompt": None}], "rows.jsonl:3: column 'prompt' is null; it should be text"),
    "lacks prompt": ([GOOD, {"answer": "2"}], "rows.jsonl:2: column 'prompt' is null; it should be text"),
    "empty text": ([GOOD, {"prompt": " \n"}], "rows.jsonl:2: column 'prompt' is empty text: leave the row out"),
    "empty list": ([{"prompt": CHAT}, {"prompt": []}], "rows.jsonl:2: column 'prompt' is an empty list"),
    "no role": (
        [{"prompt": [{"rolle": "user", "content": "x"}]}],
        ":1: .*message 1 of 1 .* no 'role'; did you mean 'rolle'",
    ),
    "no content": ([{"prompt": [{"role": "user"}]}], "rows.jsonl:1: .* that has no 'content'"),
    "role": ([{"prompt": [{"role": "usr", "content": "x"}]}], "jsonl:1: .* has the role 'usr'; did you mean 'user'"),
    "system late": ([{"prompt": [*CHAT, {"role": "system", "content": "x"}]}], "'system', which only the first"),
    "assistant last": ([{"prompt": CHAT[:2]}], "rows.jsonl:1: .* ends with a message of role 'assistant'; the last"),
    "content": ([{"prompt": [{"role": "user", "content": 7}]}], r"message 1 of 1 that has the content 7 \(a number\)"),
    "list of text": ([{"prompt": ["x"]}], r"has a message 1 of 1 that is 'x' \(text\); it should be an object with"),
    "mixed": ([GOOD, {"prompt": CHAT}], r"rows.jsonl:2: column 'prompt' is \[.*\(a list\), but 'What.* at .*s.jsonl:1"),
    "mixed column": ([GOOD, {"prompt": "x", "answer": 2}], r"rows.jsonl:2: column 'answer' is 2 \(a number\), but '2'"),
    "no prompt": ([{"promt": "x"}], "rows.jsonl: no column 'prompt'; did you mean 'promt'"),
    "question": ([{"question": "x"}], "no column 'prompt'; known: question; `columns: {prompt: question}` copies one"),
    "nothing": ([], "rows.jsonl: no rows"),
    "blank": (["", " "], "rows.jsonl: no rows"),
}


@pytest.mark.parametrize("name", BROKEN_LINES)
def test_broken_rows(name: str, load, tmp_path: Path) -> None:
    lines, message = BROKEN_LINES[name]
    write_lines(tmp_path / "rows.jsonl", lines)
    with pytest.raises(DataError, match=message) as caught:
        load("rows.jsonl")
    assert str(tmp_path / "rows.jsonl") in str(caught.value)


def torn_parquet(path: Path) -> None:
    datasets.Dataset.from_list(QUESTIONS).to_parquet(path)
    path.write_bytes(path.read_bytes()[:-30])


BROKEN_FILES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "encoding": (
        "a.jsonl",
        lambda p: p.write_bytes(b'{"prompt": "x"}\n{"prompt": "\xe9t\xe9"}\n'),
        "a.jsonl:2: byte 13 is not UTF-8",
    ),
    "json": (
        "a.json",
        lambda p: p.write_text('[{"prompt": "x"},\n {"prompt" "y"}]'),
        "a.json:2: not JSON at column 12",
    ),
    "json lines": (
        "a.json",
        lambda p: p.write_text('{"prompt": "x"}\n{"prompt": "y"}'),
        "one object a line goes into .* .jsonl",
    ),
    "json object": (
        "a.json",
        lambda p: p.write_text('{"prompt": "x"}'),
        "a.json: an object where an array of objects is expected",
    ),
    "json row": (
        "a.json",
        lambda p: p.write_text('[{"prompt": "x"}, 3]'),
        r"a.json, row 2: 3 \(a number\) where an object",
    ),
    "ragged": (
        "a.csv",
        lambda p: p.write_text("prompt,answer\nx,1\ny,2,3\nz\n"),
        r"a.csv:3: 3 values for the 2 columns prompt, answer; put",
    ),
    "csv header": ("a.csv", lambda p: p.write_text("prompt,prompt\nx,1\n"), "a.csv:1: column 'prompt' occurs twice"),
    "csv quote": ("a.csv", lambda p: p.write_text('prompt\nx\n"y\n'), "a.csv: not CSV after line 2"),
    "csv encoding": ("a.csv", lambda p: p.write_bytes(b"prompt\nx\n\xff\n"), "a.csv:3: not UTF-8"),
    "csv empty": ("a.csv", lambda p: p.write_text("prompt,answer\n"), "a.csv: no rows"),
    "parquet": ("a.parquet", torn_parquet, "a.parquet: not a readable Parquet file"),
    "parquet empty": (
        "a.parquet",
        lambda p: pyarrow.parquet.write_table(pa.table({"prompt": pa.array([], "string")}), p),
        "no rows",
    ),
    "kind": (
        "a.txt",
        lambda p: p.write_text("x"),
        r"a.txt: files ending in `.txt` cannot be read; use .jsonl, .json, .parquet",
    ),
    "folder": (
        "set",
        lambda p: (p.mkdir(), write_lines(p / "train.jsonl", [GOOD, "{"])),
        "train.jsonl:2: not JSON at column 2",
    ),
    "no files": ("set", lambda p: p.mkdir(), "set: "),
    "no split": (
        "set",
        lambda p: datasets.DatasetDict(trian=datasets.Dataset.from_list([GOOD])).save_to_disk(p),
        "no split 'train'; did you mean 'trian'",
    ),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_broken_files(name: str, load, tmp_path: Path) -> None:
    file, write, message = BROKEN_FILES[name]
    write(tmp_path / file)
    with pytest.raises(DataError, match=message):
        load(file)


RECIPE = """
policy: {{model: {model}}}
data: {{path: {data}}}
verify: [{{use: math}}]
advantage: {{use: outcome}}
loss: [{{use: clip}}]
normaliser: {{use: token_mean}}
"""


@pytest.mark.parametrize("name", [*BROKEN_FILES, "missing"])
def test_the_command_line_ends_with_code_2_and_the_message(
    name: str, tmp_path: Path, tiny_model_folder, capsys
) -> None:
    file, write, message = BROKEN_FILES.get(
        name, ("a.jsonl", lambda path: None, "data.path: there is no file 'a.jsonl' in")
    )
    write(tmp_path / file)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=tiny_model_folder, data=file))
    assert cli.main(["train", str(tmp_path / "recipe.yaml"), f"--run.folder={tmp_path / 'run'}"]) == 2
    err = capsys.readouterr().err
    assert re.search(message, err) and "Traceback" not in err
    assert not (tmp_path / "run").exists(), "found before anything else is made"


def test_missing_file_and_split_of_a_file(load, tmp_path: Path) -> None:
    write_lines(tmp_path / "problems.jsonl", [GOOD])
    with pytest.raises(DataError, match=r"there is no file .* in .* \(did you mean 'problems.jsonl'\?\)"):
        load("problem.jsonl")
    with pytest.raises(DataError, match="a file has no split 'test'"):
        load("problems.jsonl", split="test")


def test_a_hub_name_that_is_nowhere(load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match="'nobody/nothing' is no file or folder here, nor a dataset of the hub: .*nobody"
    ):
        load("nobody/nothing")


GENERATORS = {
    "raises": ("yield {'prompt': 'x'}\n    raise ValueError('no more')", r"row 2: raised ValueError: no more \(own.py"),
    "yields text": ("yield {'prompt': 'x'}\n    yield 'y'", r"row 2: yielded 'y' \(text\) where a dict of columns"),
    "returns none": ("return None", "row 1: raised TypeError"),
    "yields nothing": ("yield from ()", "own.py:rows: no rows"),
    "odd value": ("yield {'prompt': 'x', 'answer': object()}", "row 1: column 'answer' is <object.* a dataset cannot"),
    "null prompt": ("yield {'prompt': None}", "row 1: column 'prompt' is null"),
}


@pytest.mark.parametrize("name", GENERATORS)
def test_broken_generators(name: str, load, tmp_path: Path) -> None:
    body, message = GENERATORS[name]
    (tmp_path / "own.py").write_text(f"def rows():\n    {body}\n")
    with pytest.raises(DataError, match=message):
        load("own.py:rows")


def test_generator_options_are_checked(load, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(GENERATOR)
    with pytest.raises(DataError, match=r"own.py:count: got an unexpected keyword argument 'up'.*`data.options`"):
        load("own.py:count", options={"up": 3})


def test_ten_problems_are_told_and_the_rest_counted(load, tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", ["{"] * 13)
    with pytest.raises(DataError) as caught:
        load("a.jsonl")
    lines = str(caught.value).splitlines()
    assert len(lines) == 11 and lines[9].startswith(f"{tmp_path}/a.jsonl:10: ") and lines[10] == "... and 3 more"


def test_columns_that_are_not_there_or_there_already(load, tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"question": "x", "prompt": "y"}])
    with pytest.raises(
        DataError, match=r"no column 'qestion' to copy to 'prompt' \(`columns`\); did you mean 'question'"
    ):
        load("a.jsonl", columns={"prompt": "qestion"})
    with pytest.raises(DataError, match="there is a column 'prompt' already; 'question' cannot be copied to it"):
        load("a.jsonl", columns={"prompt": "question"})
    assert load("a.jsonl", columns={"prompt": "prompt"}, chat=False)[0]["prompt"] == "y"


def test_chats_need_a_template(load, tmp_path: Path, tiny_model_folder: Path) -> None:
    from transformers import AutoTokenizer

    bare = AutoTokenizer.from_pretrained(tiny_model_folder)
    bare.chat_template = None
    write_lines(tmp_path / "chat.jsonl", [{"prompt": CHAT}])
    write_lines(tmp_path / "plain.jsonl", [GOOD])
    with pytest.raises(DataError, match="its prompts are messages, but the tokenizer has no chat template"):
        load("chat.jsonl", tokenizer=bare)
    with pytest.raises(DataError, match="asks for messages, but the tokenizer has no chat template"):
        load("plain.jsonl", tokenizer=bare, system="x")
    assert load("plain.jsonl", tokenizer=bare)[0]["prompt"] == GOOD["prompt"]
    with pytest.raises(DataError, match="`chat: false` goes with plain prompts"):
        load("chat.jsonl", chat=False)


def test_a_template_that_refuses_a_row(load, tmp_path: Path, tiny_model_folder: Path) -> None:
    from transformers import AutoTokenizer

    strict = AutoTokenizer.from_pretrained(tiny_model_folder)
    strict.chat_template = (
        "{% if messages|length > 1 %}{{ raise_exception('one at a time') }}{% endif %}{{ messages[0]['content'] }}"
    )
    write_lines(tmp_path / "a.jsonl", [{"prompt": CHAT[:1]}, {"prompt": CHAT}])
    with pytest.raises(DataError, match=r"a.jsonl:2: column 'prompt': the chat template rejects it: one at a time"):
        load("a.jsonl", tokenizer=strict)


def test_every_prompt_too_long(load, tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [GOOD])
    with pytest.raises(
        DataError, match=r"every prompt has more than 3 tokens \(`max_prompt_tokens`\); the shortest has 14"
    ):
        load("a.jsonl", chat=False, max_prompt_tokens=3)


def test_verifiers_find_their_columns(load, tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"prompt": "x", "anser": "1", "unit": None}])
    rows = load("a.jsonl")
    with pytest.raises(
        DataError, match=r"no column 'answer', which the verifier 'math' asks for; did you mean 'anser'"
    ):
        check_columns(rows, [Part.of(verifiers.math)])
    check_columns(rows, [Part.of(verifiers.exact, answer="the same for all"), Part.of(verifiers.length)])
    check_columns(rows, [Part.of(may_be_null), Part.of(takes_all), Part.of(says_nothing)])


def test_verifiers_that_need_a_value_in_every_row(load, tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [GOOD, {"prompt": "x"}, "", {"prompt": "y", "answer": None}])
    with pytest.raises(DataError) as caught:
        check_columns(load("a.jsonl"), [Part.of(verifiers.math)])
    assert [line.partition("a.jsonl:")[2][:30] for line in str(caught.value).splitlines()] == [
        "2: column 'answer' is missing ",
        "4: column 'answer' is missing ",
    ]


def may_be_null(completion: str, *, unit: str | None) -> float:
    return 0.0


def says_nothing(completion, *, unit):
    return 0.0


def takes_all(completions, **columns):
    return [0.0] * len(completions)


def test_the_example_data_fits_the_example_verifiers(tokenizer) -> None:
    from posttrain.training.recipe import load_recipe

    recipe = load_recipe(EXAMPLES / "own_verifier.yaml")
    rows = load_rows(recipe.data, base=EXAMPLES, tokenizer=tokenizer)
    check_columns(rows, recipe.verify)
    assert len(rows) >= 20
    for row in rows:
        assert verifiers.math(row["answer"], answer=row["answer"]) == 1.0
