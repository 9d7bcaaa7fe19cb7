"""Tests of the slot ``examples``: completions as ids, masks, steps and rewards; messages for rows that do not fit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from posttrain.batch import Finish
from posttrain.data import examples
from posttrain.data.rollout_files import write_rollouts
from posttrain.errors import DataError
from posttrain.models.text import written_text
from posttrain.recipe import sections
from posttrain.recipe.part import Part
from posttrain.training.recipe import load_recipe

GENERATION = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}{% else %}{{ m['content'] }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def make(tmp_path: Path, tokenizer):
    """A function ``make(part, rows, **options)`` that writes rows as JSON lines and reads them with a part."""

    def make(part, rows, *, data=None, tokenizer=tokenizer, **chosen):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return part(sections.DataSection(path=str(path), **(data or {})), tokenizer, None, **chosen)

    return make


def chosen_text(batch, row: int, tokenizer) -> str:
    """Text of the chosen tokens, special tokens included."""
    return tokenizer.decode(batch.tokens[row][batch.mask[row]].tolist())


def before(batch, row: int, tokenizer) -> str:
    first = int(batch.mask[row].int().argmax())
    return tokenizer.decode(batch.tokens[row][:first].tolist())


def test_demonstration_of_plain_text_is_prompt_text_and_end(make, tokenizer):
    loaded = make(examples.demonstrations, [{"prompt": "1+1=?", "completion": "It is 2.", "note": "a"}])
    batch = loaded.batch([0])
    assert before(batch, 0, tokenizer) == "<|user|>1+1=?<|end|><|assistant|>"
    assert chosen_text(batch, 0, tokenizer) == "It is 2.<|end|>"
    assert batch.texts == ("It is 2.",)
    assert batch.reward.tolist() == batch.score.tolist() == [1.0]
    assert batch.finish.tolist() == [Finish.STOPPED]
    assert batch.rows[0]["note"] == "a"
    assert batch.mask[0].tolist() == [i >= 8 for i in range(17)]
    assert batch.step_id[0].tolist() == [-1] * 8 + [0] * 9
    assert batch.logp_sampler[0].isnan().tolist() == batch.mask[0].tolist()


def test_messages_go_through_the_template(make, tokenizer):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    batch = make(examples.demonstrations, [{"messages": turns}]).batch([0])
    assert before(batch, 0, tokenizer) == "<|user|>Hi<|end|><|assistant|>"
    assert chosen_text(batch, 0, tokenizer) == "Yes?<|end|>"


def test_line_break_that_a_template_puts_behind_the_end_is_not_the_policys(make, tiny_model_folder):
    other_tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    other_tokenizer.chat_template = other_tokenizer.chat_template.replace("<|end|>", "<|end|>\n")
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    batch = make(examples.demonstrations, [{"messages": turns}], tokenizer=other_tokenizer).batch([0])
    assert chosen_text(batch, 0, other_tokenizer) == "Yes?<|end|>"
    assert before(batch, 0, other_tokenizer) == "<|user|>Hi<|end|>\n<|assistant|>"


def test_several_turns_are_masked_by_generation_markers(make, tiny_model_folder):
    other_tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    other_tokenizer.chat_template = GENERATION
    turns = [("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    batch = make(examples.demonstrations, [row], tokenizer=other_tokenizer).batch([0])
    assert chosen_text(batch, 0, other_tokenizer) == "one<|end|>two<|end|>"
    assert before(batch, 0, other_tokenizer) == "<|user|>a<|end|><|assistant|>"
    assert batch.step_id[0][batch.mask[0]].tolist() == [0] * 4 + [1] * 4  # a turn is a step
    whole = other_tokenizer.decode(batch.tokens[0].tolist())
    assert whole == "<|user|>a<|end|><|assistant|>one<|end|><|user|>b<|end|><|assistant|>two<|end|>"


def test_earlier_answers_in_the_prompt_are_not_learned(make, tiny_model_folder):
    other_tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    other_tokenizer.chat_template = GENERATION
    said = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "one"), ("user", "b"))]
    more = [{"role": r, "content": c} for r, c in (("assistant", "two"), ("user", "c"), ("assistant", "three"))]
    batch = make(examples.demonstrations, [{"prompt": said, "completion": more}], tokenizer=other_tokenizer).batch([0])
    assert chosen_text(batch, 0, other_tokenizer) == "two<|end|>three<|end|>"


def test_several_turns_need_generation_markers(make):
    turns = [{"role": r, "content": "x"} for r in ("user", "assistant", "user", "assistant")]
    with pytest.raises(DataError, match="generation"):
        make(examples.demonstrations, [{"messages": turns}])


def test_template_that_rewrites_the_prompt_is_refused(make, tiny_model_folder):
    other_tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    other_tokenizer.chat_template = other_tokenizer.chat_template.replace(
        "<|assistant|>{% endif %}", "<|assistant|><think>{% endif %}"
    )
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    with pytest.raises(DataError, match=r"rows.jsonl:1: column 'completion': with the answer after it.*plain text"):
        make(examples.demonstrations, [{"messages": turns}], tokenizer=other_tokenizer)


def test_rated_takes_numbers_and_verdicts(make):
    for name, values in (("reward", [0.25, -1.0]), ("score", [3, 4]), ("label", [True, False])):
        rows = [{"prompt": "p", "completion": f"c{i}", name: value} for i, value in enumerate(values)]
        loaded = make(examples.rated, rows)
        assert len(loaded) == 2
        assert loaded.batch([1, 0]).reward.tolist() == [float(v) for v in reversed(values)]
        assert loaded.batch([1, 0]).group.tolist() == [0, 1]


def test_rated_rows_of_one_prompt_can_be_a_group(make):
    rows = [{"prompt": p, "completion": "c", "reward": r} for p, r in (("a", 1), ("b", 2), ("a", 3))]
    loaded = make(examples.rated, rows, group="prompt")
    assert len(loaded) == 2
    batch = loaded.batch([0, 1])
    assert batch.group.tolist() == [0, 0, 1]
    assert batch.reward.tolist() == [1, 3, 2]


def test_cut_off_completion_gets_no_end(make, tokenizer):
    row = {"prompt": "p", "completion": "half a sen", "reward": 0}
    rows = [row | {"finish": finish} for finish in ("length", "stopped")]
    batch = make(examples.rated, rows).batch([0, 1])
    assert [chosen_text(batch, i, tokenizer) for i in (0, 1)] == ["half a sen", "half a sen<|end|>"]
    assert batch.finish.tolist() == [Finish.LENGTH, Finish.STOPPED]


def test_end_that_is_there_already_is_not_doubled(make, tokenizer):
    batch = make(examples.rated, [{"prompt": "p", "completion": "done<|end|>", "reward": 0}]).batch([0])
    assert chosen_text(batch, 0, tokenizer) == "done<|end|>"


def test_stepwise_puts_labels_at_the_last_token_of_each_step(make, tokenizer):
    row = {"prompt": "p", "completions": ["ab", "c", "def"], "labels": [True, None, False]}
    batch = make(examples.stepwise, [row]).batch([0])
    assert chosen_text(batch, 0, tokenizer) == "ab\nc\ndef<|end|>"
    mask = batch.mask[0]
    assert batch.step_id[0][mask].tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    labels = batch.step_reward[0][mask]
    assert labels[2] == 1.0 and labels[4].isnan() and labels[8] == 0.0
    assert labels[[0, 1, 3, 5, 6, 7]].tolist() == [0.0] * 6
    assert batch.step_id[0][~mask].eq(-1).all() and batch.step_reward[0][~mask].eq(0).all()
    assert batch.reward.tolist() == [0.0]  # the last label


def test_stepwise_reward_column_wins_over_the_last_label(make):
    row = {"prompt": "p", "completions": ["a", "b"], "labels": [0.5, None], "reward": 1.0}
    batch = make(examples.stepwise, [row], separator="\n\n").batch([0])
    assert batch.reward.tolist() == [1.0]
    assert batch.texts == ("a\n\nb",)
    last_unknown = make(examples.stepwise, [row | {"reward": 0.25}]).batch([0])
    assert last_unknown.reward.tolist() == [0.25]
    del row["reward"]
    assert make(examples.stepwise, [row]).batch([0]).reward.tolist() == [0.5]  # the last label that is known


def test_pairs_with_and_without_prompt_plain_and_as_messages(make, tokenizer):
    user = {"role": "user", "content": "q"}
    good, bad = ({"role": "assistant", "content": text} for text in ("yes", "no"))
    for row in (
        {"prompt": "q", "chosen": "yes", "rejected": "no", "margin": 2.0},
        {"prompt": [user], "chosen": [good], "rejected": [bad], "margin": 2.0},
        {"chosen": [user, good], "rejected": [user, bad], "margin": 2.0},
        {"prompt": "q", "chosen": [user, good], "rejected": [user, bad], "margin": 2.0},
    ):
        batch = make(examples.pairs, [row, row]).batch([1, 0])
        assert [chosen_text(batch, i, tokenizer) for i in range(2)] == ["yes<|end|>", "no<|end|>"]
        assert {before(batch, i, tokenizer) for i in range(4)} == {"<|user|>q<|end|><|assistant|>"}
        assert batch.reward.tolist() == [1, 0, 1, 0]
        assert batch.group.tolist() == [0, 0, 1, 1]
        assert batch.rows[0]["margin"] == 2.0


def test_implicit_prompt_of_plain_text_is_the_common_beginning(make, tokenizer):
    row = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    batch = make(examples.pairs, [row], data={"chat": False}).batch([0])
    assert before(batch, 0, tokenizer) == "The sky is"
    assert chosen_text(batch, 0, tokenizer) == " blue.<|end|>"
    assert chosen_text(batch, 1, tokenizer) == " green.<|end|>"


def test_rows_that_are_too_long_are_left_out_and_counted(make):
    rows = [{"prompt": "p", "chosen": "a" * n, "rejected": "b"} for n in (3, 50, 4)]
    loaded = make(examples.pairs, rows, max_tokens=20)
    assert (len(loaded), loaded.dropped[0].count, int(loaded.batch([0, 1]).length.max())) == (2, 1, 9)
    assert loaded.dropped[0].first[0].endswith("rows.jsonl:2")
    with pytest.raises(DataError, match=r"every row has more than 3 tokens.*the shortest has 6"):
        make(examples.pairs, rows, max_tokens=3)


@pytest.mark.parametrize(
    ("part", "row", "message"),
    [
        (examples.rated, {"completion": "c", "reward": "good"}, r"rows.jsonl:2: column 'reward' is 'good' \(text\)"),
        (examples.rated, {"completion": "c", "reward": None}, r"rows.jsonl:2: column 'reward' is null"),
        (examples.rated, {"completion": "", "reward": 1}, r"rows.jsonl:2: column 'completion' is empty"),
        (examples.rated, {"completion": "c", "reward": 1, "finish": "lenght"}, r"'finish' is 'lenght'.*'length'"),
        (examples.stepwise, {"completions": ["a"], "labels": [1, 0]}, r"'labels' has 2 elements; there are 1 steps"),
        (examples.stepwise, {"completions": [], "labels": []}, r"rows.jsonl:2: column 'completions' is \[\]"),
        (examples.stepwise, {"completions": ["a", ""], "labels": [1, 0]}, r"each step should be some text"),
        (examples.pairs, {"chosen": "c"}, r"rows.jsonl:2: columns 'chosen' and 'rejected' are 'c' \(text\) and null"),
        (examples.demonstrations, {"messages": [{"role": "user", "content": "u"}]}, r"no message of the assistant"),
    ],
)
def test_row_that_does_not_fit_is_named(make, part, row, message):
    good = {
        examples.rated: {"completion": "c", "finish": "stopped"},
        examples.stepwise: {"completions": ["a"], "labels": [1]},
        examples.pairs: {"chosen": "c", "rejected": "d"},
        examples.demonstrations: {"messages": [{"role": r, "content": "x"} for r in ("user", "assistant")]},
    }[part]
    if part is examples.rated:
        good = {**good, "reward": row["reward"] if isinstance(row["reward"], str) else 1}
        row = {"finish": "stopped", **row}
        if isinstance(good["reward"], str):
            message = message.replace("rows.jsonl:2", "rows.jsonl:1")
    prompt = {} if part is examples.demonstrations else {"prompt": "p"}
    with pytest.raises(DataError, match=message):
        make(part, [prompt | good, prompt | row])


def test_missing_columns_are_named_with_what_is_there(make):
    with pytest.raises(DataError, match=r"no column 'completion'.*did you mean 'completions'"):
        make(examples.rated, [{"prompt": "p", "completions": "c", "reward": 1}])
    with pytest.raises(DataError, match=r"none of the columns is a rating .*'rating'.*reward: <column>"):
        make(examples.rated, [{"prompt": "p", "completion": "c", "rating": 1}])
    with pytest.raises(DataError, match=r"several columns may be the rating \('reward', 'score'\)"):
        make(examples.rated, [{"prompt": "p", "completion": "c", "reward": 1, "score": 2}])
    with pytest.raises(DataError, match=r"no column 'rejected'"):
        make(examples.pairs, [{"prompt": "p", "chosen": "c"}])


@pytest.fixture
def stored(tmp_path: Path, tokenizer, random_batch):
    """Folder of a run with the rollouts of three steps, and the batches that were stored."""
    batches = []
    for step in (1, 2, 3):
        batch = random_batch(step).set(step=step)
        decode = written_text(tokenizer)
        batch = batch.set(texts=tuple(decode(t[m].tolist()) for t, m in zip(batch.tokens, batch.mask, strict=True)))
        write_rollouts(tmp_path / "run" / "rollouts" / f"step-{step:06d}.parquet", batch, [""] * len(batch))
        batches.append(batch)
    return tmp_path / "run", batches


def test_rollouts_of_an_earlier_run(stored, tokenizer):
    folder, batches = stored
    loaded = examples.rollouts(sections.DataSection(path=str(folder)), tokenizer, None)
    assert len(loaded) == 9
    batch = loaded.batch([4, 0])
    second, first = batches[1][[4, 5, 6, 7]], batches[0][[0, 1, 2, 3]]
    assert batch.group.tolist() == [0] * 4 + [1] * 4
    assert torch.equal(batch.reward, torch.cat([second.score, first.score]))
    assert batch.texts == second.texts + first.texts
    for row, (old, i) in enumerate([(second, i) for i in range(4)] + [(first, i) for i in range(4)]):
        n = int(old.length[i])
        for name in ("tokens", "mask", "logp_sampler", "step_id"):
            assert torch.equal(getattr(batch, name)[row, :n], getattr(old, name)[i, :n]), name
    assert batch.step_reward.eq(0).all()
    assert batch.advantage is None and batch.logp_old is None and batch.value is None and batch.step == 0


def test_rollouts_with_the_rewards_of_that_run(stored, tokenizer):
    folder, batches = stored
    loaded = examples.rollouts(sections.DataSection(path=str(folder)), tokenizer, None, reward="reward", first_step=3)
    batch = loaded.batch([0, 1, 2])
    assert torch.equal(batch.reward, batches[2].reward)
    columns = batch.tokens.shape[1]
    assert torch.equal(batch.step_reward, batches[2].step_reward[:, :columns])


def test_rollouts_that_cannot_be_had(stored, tokenizer, tmp_path, tiny_model_folder):
    folder, _ = stored
    with pytest.raises(DataError, match="no rollouts of steps 7 to None; there are those of steps 1 to 3"):
        examples.rollouts(sections.DataSection(path=str(folder)), tokenizer, None, first_step=7)
    with pytest.raises(DataError, match="there is no file or folder"):
        examples.rollouts(sections.DataSection(path=str(tmp_path / "nothing")), tokenizer, None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no rollouts"):
        examples.rollouts(sections.DataSection(path=str(tmp_path / "empty")), tokenizer, None)
    other = AutoTokenizer.from_pretrained(tiny_model_folder)
    shifted = json.loads(other.backend_tokenizer.to_str())
    vocabulary = shifted["model"]["vocab"]
    names = [name for name, i in sorted(vocabulary.items(), key=lambda each: each[1]) if i >= 5]
    vocabulary.update({name: 5 + (i + 7) % len(names) for i, name in enumerate(names)})
    other._tokenizer = type(other.backend_tokenizer).from_str(json.dumps(shifted))
    with pytest.raises(DataError, match=r"step-000001.parquet, row \d+: the tokens are not those of this policy's"):
        examples.rollouts(sections.DataSection(path=str(folder)), other, None)


def test_recipe_names_examples_by_bare_name(tmp_path: Path, tiny_model_folder: Path, make):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "p", "completion": "c", "score": 0.5}) + "\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"policy: {{model: {tiny_model_folder}}}\ndata: {{path: rows.jsonl}}\n"
        "examples: {use: rated, max_tokens: 64}\nverify: [{use: math}]\n"
        "advantage: {use: outcome}\nloss: [{use: clip}]\n"
    )
    part = load_recipe(recipe).examples
    assert isinstance(part, Part) and part.target is examples.rated
    assert math.isclose(part.every_option["max_tokens"], 64)
