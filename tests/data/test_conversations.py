"""Tests of what is read from conversations and from the columns beside them, or refused with the file and the row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundled_templates import TEMPLATES

from posttrain.batch import Batch
from posttrain.data import Rows, load_rows
from posttrain.data.examples import demonstrations, pairs
from posttrain.errors import DataError
from posttrain.recipe.sections import DataSection

USER = {"role": "user", "content": "What is 2 + 2?"}
TOOL = {"type": "function", "function": {"name": "tide", "description": "Height of the tide.", "parameters": {}}}


@pytest.fixture
def qwen(tokenizer):
    """The tests' tokenizer with Qwen 3's template, whose end of a turn it has no token for."""
    from copy import deepcopy

    other = deepcopy(tokenizer)
    other.chat_template = TEMPLATES["qwen3"]
    return other


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Rows]:
    """A function ``load(tokenizer, rows, **settings)`` that writes rows to ``rows.jsonl`` and loads them as prompts."""
    return lambda tokenizer, rows, **settings: load_rows(section(tmp_path, rows, **settings), tokenizer=tokenizer)


def section(folder: Path, rows: list[Any], **settings: Any) -> DataSection:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSection(path=str(folder / "rows.jsonl"), **settings)


def learned(tokenizer, batch: Batch, row: int = 0) -> str:
    return tokenizer.decode(batch.tokens[row][batch.mask[row]].tolist())


# --- contents -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([{"type": "image", "image": "cat.png"}], "holds a part of type 'image'; the policy reads text alone"),
        ([{"type": "text", "text": "a"}, {"type": "input_audio"}], "holds a part of type 'input_audio'"),
        (["What?"], "holds 'What?' (text); each part should be an object"),
        ([{"type": "text"}], "holds a text part without its text"),
        ([{"text": "a"}], "each part should be an object such as"),
        ([{"type": "text", "text": "a", "image": "cat.png"}], "holds a text part with 'image', which nothing reads"),
    ],
)
def test_parts_that_are_no_text_are_refused(load, tokenizer, content: Any, problem: str) -> None:
    rows = [{"prompt": [USER]}, {"prompt": [{"role": "user", "content": content}]}]
    with pytest.raises(DataError) as error:
        load(tokenizer, rows)
    assert "rows.jsonl:2: column 'prompt' has a message 1 of 1 that has a content that" in str(error.value)
    assert problem in str(error.value)


def test_parts_are_read_in_completions_too(tokenizer, tmp_path: Path) -> None:
    answer = [{"type": "text", "text": "It is "}, {"type": "text", "text": "4."}]
    rows = [{"prompt": [USER], "completion": [{"role": "assistant", "content": answer}]}]
    batch = demonstrations(section(tmp_path, rows), tokenizer, None).batch([0])
    assert learned(tokenizer, batch) == "It is 4.<|end|>"


@pytest.mark.parametrize("name", ["images", "image", "videos", "audio"])
def test_columns_of_pictures_and_sounds_are_refused_unless_ignored(load, tokenizer, name: str) -> None:
    rows = [{"prompt": [USER], name: []}, {"prompt": [USER], name: ["cat.png"]}]
    with pytest.raises(DataError, match=rf"rows.jsonl:2: column '{name}' holds .*reads text alone.*`ignore`"):
        load(tokenizer, rows)
    assert name not in load(tokenizer, rows, ignore=(name,))[1]
    assert len(load(tokenizer, rows[:1])) == 1
    with pytest.raises(DataError, match=r"no column 'picture' to leave unread \(`ignore`\)"):
        load(tokenizer, rows, ignore=("picture",))


def test_a_message_that_the_template_leaves_out_is_an_error(load, qwen) -> None:
    rows = [{"prompt": [{"role": "developer", "content": "Be brief."}, USER]}]
    with pytest.raises(DataError, match=r":1: column 'prompt': the chat template writes nothing of message 1, of role"):
        load(qwen, rows)


# --- objects as they were written ---------------------------------------------------------------------------------


def test_nulls_that_were_written_stay_and_no_others_come(load, qwen) -> None:
    def asks(**arguments: Any) -> list[dict[str, Any]]:
        call = {"type": "function", "function": {"name": "tide", "arguments": arguments}}
        return [USER, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "5"}]

    rows = [{"prompt": asks(port="Brest", at=None), "info": {"a": 1}}, {"prompt": asks(port=3), "info": {"b": [None]}}]
    loaded = load(qwen, rows)
    assert '{"port": "Brest", "at": null}' in qwen.decode(loaded.prompt_tokens(0))
    assert '{"port": 3}' in qwen.decode(loaded.prompt_tokens(1))
    assert [row["info"] for row in loaded] == [{"a": 1}, {"b": [None]}]
    assert "content" not in loaded[0]["prompt"][1] and loaded[1]["prompt"][2] == {"role": "tool", "content": "5"}


def test_objects_that_begin_in_a_later_chunk_and_texts_among_them(load, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr("posttrain.data.arrow.CHUNK", 2)
    rows: list[Any] = [{"prompt": "a", "x": None}, {"prompt": "b", "x": []}, {"prompt": "c", "x": [{"y": 1}]}]
    assert [row["x"] for row in load(tokenizer, rows, chat=False)] == [None, [], [{"y": 1}]]
    with pytest.raises(DataError, match=r"rows.jsonl:4: column 'x' is 'text' \(text\), but \[\] \(a list\) at"):
        load(tokenizer, [*rows, {"prompt": "d", "x": "text"}], chat=False)


@pytest.mark.parametrize("place", ["prompt", "unread"])
def test_half_a_surrogate_pair_is_refused_with_its_row(load, tokenizer, place: str) -> None:
    rows = [{"prompt": "1+1", "unread": "x"}, {"prompt": "2+2", "unread": "x", place: "odd \ud83d sign"}]
    with pytest.raises(DataError, match=rf"rows.jsonl:2: column '{place}' holds half of a surrogate pair"):
        load(tokenizer, rows)
    with pytest.raises(DataError, match=r"rows.jsonl:1: column 'prompt' holds half of a surrogate pair"):
        load(tokenizer, [{"prompt": [{"role": "user", "content": "\udc00"}]}])
    assert load(tokenizer, [{"prompt": "\U0001f600"}])[0]["prompt"][0]["content"] == "\U0001f600"


# --- columns that the chat template reads -------------------------------------------------------------------------


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_arguments_of_the_template_are_rendered_for_their_row(load, qwen, as_text: bool) -> None:
    def stored(value: Any) -> Any:
        return json.dumps(value) if as_text else value

    rows = [
        {"prompt": [USER], "tools": stored([TOOL]), "chat_template_kwargs": stored({"enable_thinking": False})},
        {"prompt": [USER], "tools": None, "chat_template_kwargs": None},
    ]
    loaded = load(qwen, rows)
    first, second = (qwen.decode(loaded.prompt_tokens(i)) for i in range(2))
    assert "Height of the tide." in first and first.endswith("<think>\n\n</think>\n\n")
    assert "Height of the tide." not in second and second.endswith("assistant\n")
    assert loaded[0]["tools"] == rows[0]["tools"]  # verifiers and stored rollouts get the column


def test_tools_are_rendered_for_demonstrations_and_pairs(qwen, tmp_path: Path) -> None:
    answer, other = ([{"role": "assistant", "content": text}] for text in ("4", "5"))
    shared = {"prompt": [USER], "tools": [TOOL]}
    batches = [
        demonstrations(section(tmp_path, [{**shared, "completion": answer}]), qwen, None).batch([0]),
        pairs(section(tmp_path, [{**shared, "chosen": answer, "rejected": other}]), qwen, None).batch([0]),
    ]
    for batch in batches:
        for row in range(len(batch)):
            assert "Height of the tide." in qwen.decode(batch.tokens[row].tolist())


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"tools": [TOOL]}, "the chat template does not describe `tools` to the model"),
        ({"tools": "{"}, "column 'tools' is '{' (text), which is not JSON"),
        ({"tools": {"name": "tide"}}, "it should be a list of tools, each a JSON schema"),
        ({"tools": ["tide"]}, "column 'tools' holds 'tide' (text); each tool should be an object"),
        ({"chat_template_kwargs": [1]}, "column 'chat_template_kwargs' is [1] (a list); it should be an object"),
    ],
)
def test_tools_that_cannot_be_rendered_are_refused(load, tokenizer, columns: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError) as error:
        load(tokenizer, [{"prompt": [USER], **columns}])
    assert "rows.jsonl:1" in str(error.value) and problem in str(error.value)


def test_tools_beside_plain_prompts_are_refused(load, tokenizer) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:1: column 'tools' .* plain text, which no chat template renders"):
        load(tokenizer, [{"prompt": "How high?", "tools": [TOOL]}], chat=False)


# --- weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        ((None, 0), "has no message of the assistant to learn (`weight: 0`)"),
        ((None, 0.5), "has the weight 0.5 (a number); it is 1 (learned) or 0 (not learned)"),
        ((1, 1), "has a weight of 1, but only the assistant's messages are learned"),
    ],
)
def test_weights_that_cannot_be_used_are_refused(tokenizer, tmp_path: Path, weights: tuple, problem: str) -> None:
    messages = [{**USER, "weight": weights[0]}, {"role": "assistant", "content": "4", "weight": weights[1]}]
    with pytest.raises(DataError) as error:
        demonstrations(section(tmp_path, [{"messages": messages}]), tokenizer, None)
    assert "rows.jsonl:1" in str(error.value) and problem in str(error.value)
