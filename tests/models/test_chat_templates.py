"""Tests of conversations under every chat template that TRL bundles: nothing in them is lost or printed as Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from bundled_templates import TEMPLATES, tokenizer_of_templates

from posttrain.data import load_rows
from posttrain.data.examples import demonstrations
from posttrain.errors import DataError
from posttrain.models.chat_template import REFUSALS, UnreadMessage, render, turn_ends
from posttrain.recipe.sections import DataSection

ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "diffusion_gemma": "<turn|>",
    "gemma4": "<turn|>",
    "gemma": "<end_of_turn>",
    "glm4moe": "<|user|>",  # the next message's role ends a turn
    "gptoss": "<|return|>",
    "idefics3": "<end_of_utterance>",
    "llama": "<|eot_id|>",
    "llava": "</s>",
    "muse_glimmer": "<|eot|>",
    "phi3": "<|end|>",
    "smolvlm": "<end_of_utterance>",
}
"""Token that ends an answer, by the beginning of the template's name; all others end it with <|im_end|>."""
WITHOUT_TOOLS = ["cohere", "cohere2", "deepseek_r1_distill", "deepseekv3", "gemma", "gemma3", "idefics3", "llama3"]
WITHOUT_TOOLS += ["llava_next", "phi3", "phi3_5", "qwen2_5_vl", "smolvlm"]
TOOL = {
    "type": "function",
    "function": {
        "name": "tide_height",
        "description": "Tells how high the tide is.",
        "parameters": {"type": "object", "properties": {"port": {"type": "string"}}, "required": ["port"]},
    },
}
PARTS = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 2?"}]


@pytest.fixture(scope="module")
def special_tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return tokenizer_of_templates(tmp_path_factory.mktemp("templates"))


@pytest.fixture(params=TEMPLATES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def templated(name: str, special_tokenizer):
    """The tokenizer with one of the templates."""
    special_tokenizer.chat_template = TEMPLATES[name]
    return special_tokenizer


def call(tool: str, **arguments: Any) -> dict[str, Any]:
    return {"id": "call00001", "type": "function", "function": {"name": tool, "arguments": arguments}}


def test_text_parts_reach_the_model_as_text(templated) -> None:
    answer = {"role": "assistant", "content": PARTS}
    for messages in ([{"role": "user", "content": PARTS}], [{"role": "user", "content": "And?"}, answer]):
        text = render(messages, templated)
        assert text.index("What is") < text.index("2 + 2?") and "'type'" not in text and '"type"' not in text
        joined = [{**message, "content": "".join(p["text"] for p in PARTS)} for message in messages[-1:]]
        whole = render([*messages[:-1], *joined], templated)
        assert "What is 2 + 2?" in whole and len(text) <= len(whole) + 1  # a template may put its own space between


def test_a_system_message_is_written_or_refused(templated) -> None:
    try:
        text = render([{"role": "system", "content": PARTS}, {"role": "user", "content": "Hi"}], templated)
    except REFUSALS as error:
        assert str(error)
    else:
        assert "What is" in text and "2 + 2?" in text and "'type'" not in text


def test_tools_are_described_or_refused(name: str, templated) -> None:
    messages = [{"role": "user", "content": "How high is the water at Brest?"}]
    if name.removesuffix("_training") in WITHOUT_TOOLS:
        with pytest.raises(UnreadMessage, match="does not describe `tools` to the model"):
            render(messages, templated, {"tools": [TOOL]}, generate=True)
    else:
        text = render(messages, templated, {"tools": [TOOL]}, generate=True)
        assert "tide_height" in text and "Tells how high the tide is." in text


def test_the_end_of_an_answer_is_found(name: str, templated) -> None:
    expected = next((end for prefix, end in ENDS.items() if name.startswith(prefix)), "<|im_end|>")
    ends = templated.convert_ids_to_tokens(list(turn_ends(templated, TEMPLATES[name])))
    assert ends[:1] == [expected]
    assert not set(ends[1:]) - {"<|call|>", "<|tool_response>", "<|observation|>"}


def test_tool_calls_keep_their_own_arguments(templated, tmp_path: Path) -> None:
    """Parquet gives every tool call the names of all arguments; those of other rows are not rendered."""
    asks = {"role": "user", "content": "go"}
    rows = [
        {"prompt": [asks, {"role": "assistant", "content": "", "tool_calls": [call("tide", port="Brest")]}, asks]},
        {"prompt": [asks, {"role": "assistant", "content": "", "tool_calls": [call("add", number="one")]}, asks]},
    ]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        expected = render(rows[0]["prompt"], templated, generate=True)
    except REFUSALS:
        with pytest.raises(DataError, match="row 1: column 'prompt'"):
            load_rows(DataSection(path=str(tmp_path / "rows.parquet")), tokenizer=templated)
        return
    assert "Brest" in expected
    for file in ("rows.parquet", "rows.jsonl"):
        loaded = load_rows(DataSection(path=str(tmp_path / file)), tokenizer=templated)
        assert templated.decode(loaded.prompt_tokens(0)) == expected
        assert loaded[0] == rows[0]


def test_of_several_answers_those_with_a_weight_are_learned_with_their_ends(
    name: str, templated, tmp_path: Path
) -> None:
    said = [("user", "q1", 0), ("assistant", "wrong", 0), ("user", "q2", 0), ("assistant", "right", 1)]
    rows = [
        {"messages": [{"role": role, "content": text, "weight": weight} for role, text, weight in said]},
        {"messages": [{"role": role, "content": text} for role, text, _ in said]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        examples = demonstrations(DataSection(path=str(tmp_path / "rows.jsonl")), templated, None)
    except DataError as error:
        assert "generation %} markers" in str(error) or "in another way" in str(error)
        return
    end = templated.convert_ids_to_tokens(list(turn_ends(templated, TEMPLATES[name])))[0]
    batch = examples.batch([0, 1])
    (one,), (first, second) = (
        [templated.decode(ids[steps == step].tolist()) for step in range(int(steps.max()) + 1)]
        for ids, steps in zip(batch.tokens, batch.step_id, strict=True)
    )
    assert one == second and "right" in one and one.endswith(end) and one.count(end) == 1
    within = "<|end|>" if name.startswith("gptoss") else end  # <|return|> ends a whole answer of several messages
    assert "wrong" in first and first.endswith(within) and first.count(within) == 1
