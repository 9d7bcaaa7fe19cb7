"""Tests of preferences: lists, annotators, conversions, cuts that keep the difference, rows that are left out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.batch import Finish
from posttrain.commands import cli
from posttrain.data import examples
from posttrain.data.examples.dataset_examples import EncodedCompletion
from posttrain.data.examples.groups import convert, cut_completions, fit, merge_annotators, pairs_of, repeat_votes
from posttrain.errors import DataError
from posttrain.recipe import sections


@pytest.fixture
def make(tmp_path: Path, tokenizer):
    """A function ``make(part, rows, **options)`` that writes rows as JSON lines and reads them with a part."""

    def make(part, rows, *, data=None, **chosen):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return part(sections.DataSection(path=str(path), **(data or {})), tokenizer, None, **chosen)

    return make


def texts(loaded) -> list[list[tuple[str, float]]]:
    """Text and reward of each completion of each group."""
    batch = loaded.batch(range(len(loaded)))
    triples = list(zip(batch.group.tolist(), batch.texts, batch.reward.tolist(), strict=True))
    return [[(text, reward) for g, text, reward in triples if g == group] for group in range(len(loaded))]


LIST = {"prompt": "q", "completions": ["a", "bb", "c"], "scores": [1, 3, 2]}


def test_a_list_is_a_group_with_its_scores(make):
    loaded = make(examples.lists, [LIST, {"prompt": "r", "completions": ["x", "y", "z"], "scores": [0.5, None, 2]}])
    assert texts(loaded)[0] == [("a", 1.0), ("bb", 3.0), ("c", 2.0)]
    assert loaded.batch([1]).reward.isnan().tolist() == [False, True, False]
    assert loaded.batch([0]).rows[0]["scores"] == [1, 3, 2]


def test_lists_of_messages(make):
    user, said = {"role": "user", "content": "q"}, lambda text: [{"role": "assistant", "content": text}]
    row = {"prompt": [user], "completions": [said("yes"), said("no")], "ratings": [2, 1]}
    assert texts(make(examples.lists, [row], scores="ratings")) == [[("yes", 2.0), ("no", 1.0)]]


def test_lists_become_pairs_the_best_and_worst_or_single(make):
    tied = {"prompt": "t", "completions": ["u", "v"], "scores": [1, 1]}
    loaded = make(examples.lists, [LIST, tied], into="pairs")
    assert texts(loaded) == [[("bb", 3), ("a", 1)], [("c", 2), ("a", 1)], [("bb", 3), ("c", 2)]]
    assert loaded.dropped[0].count == 1 and "different ratings" in loaded.dropped[0].reason
    assert texts(make(examples.lists, [LIST], into="best_and_worst")) == [[("bb", 3), ("a", 1)]]
    assert texts(make(examples.lists, [LIST], into="single")) == [[("a", 1)], [("bb", 3)], [("c", 2)]]


def test_pairs_become_unpaired_with_completions_of_other_prompts(make):
    rows = [{"prompt": p, "chosen": "yes" + p, "rejected": "no" + p} for p in "ab"]
    loaded = make(examples.pairs, rows, into="single", mismatched=True)
    batch = loaded.batch(range(4))
    assert batch.reward[~batch.baseline_only].tolist() == [1, 0, 1, 0] and len(loaded) == 4
    assert [t for t, g in zip(batch.texts, batch.baseline_only.tolist(), strict=True) if g] == [
        "yesb",
        "yesb",
        "yesa",
        "yesa",
    ]
    with pytest.raises(DataError, match="set `into: single`"):
        make(examples.pairs, rows, mismatched=True)


def test_unpaired_become_pairs_where_a_prompt_has_both(make):
    rows = [
        {"prompt": p, "completion": c, "label": v}
        for p, c, v in (("a", "x", True), ("b", "y", True), ("a", "z", False))
    ]
    loaded = make(examples.rated, rows, group="prompt", into="pairs")
    assert texts(loaded) == [[("x", 1.0), ("z", 0.0)]]
    assert [(each.count, each.first[0].rsplit(":")[-1]) for each in loaded.dropped] == [(1, "2")]


def test_annotators_become_a_probability(make):
    """Two of three annotators prefer 'x', one of them in the other order of columns."""
    said = [("x", "y", "ann"), ("y", "x", "bob"), ("x", "y", "cleo"), ("x", "z", "ann")]
    rows = [{"prompt": "p", "chosen": c, "rejected": r, "who": who} for c, r, who in said]
    loaded = make(examples.pairs, rows, annotator="who")
    assert texts(loaded) == [[("x", 1), ("y", 0)], [("x", 1), ("z", 0)]]
    batch = loaded.batch([0, 1])
    assert [row["probability"] for row in batch.rows] == pytest.approx([2 / 3, 2 / 3, 1, 1])
    assert [row["annotators"] for row in batch.rows] == [3, 3, 1, 1]
    assert len(make(examples.pairs, rows, annotator="who", per_annotator="each")) == 4


def test_a_majority_for_the_rejected_one_turns_the_pair_around(make):
    rows = [
        {"prompt": "p", "chosen": c, "rejected": r, "who": i}
        for i, (c, r) in enumerate([("x", "y"), *[("y", "x")] * 3])
    ]
    loaded = make(examples.pairs, rows, annotator="who")
    assert texts(loaded) == [[("y", 1), ("x", 0)]] and loaded.batch([0]).rows[0]["probability"] == 0.75


def test_votes_of_a_row_become_a_probability_or_a_pair_each(make):
    rows = [{"prompt": "p", "chosen": "x", "rejected": "y", "votes": [1, 0, 0, 0.5]}]
    soft = make(examples.pairs, rows, votes="votes")
    assert texts(soft) == [[("y", 1), ("x", 0)]] and soft.batch([0]).rows[0]["probability"] == pytest.approx(0.625)
    each = make(examples.pairs, rows, votes="votes", per_annotator="each")
    assert texts(each) == [[("x", 1), ("y", 0)], [("y", 1), ("x", 0)], [("y", 1), ("x", 0)]]


def test_pairs_that_are_the_same_and_pairs_too_long_are_accounted_for(make):
    rows = [
        {"prompt": "p", "chosen": c, "rejected": r} for c, r in (("a", "a"), ("a" * 50, "b"), ("a", "b"), ("c", "c"))
    ]
    loaded = make(examples.pairs, rows, max_tokens=20)
    assert (len(loaded), sum(entry.count for entry in loaded.dropped)) == (1, 3)
    account = {each.reason: (each.count, [place.rsplit(":")[-1] for place in each.first]) for each in loaded.dropped}
    assert account == {
        "the completions are all the same": (2, ["1", "4"]),
        "more than 20 tokens (`max_tokens`)": (1, ["2"]),
    }
    assert str(loaded.dropped[1]).startswith("1 row left out: more than 20 tokens")


def test_prompts_too_long_are_accounted_for(make):
    rows = [{"prompt": "p" * n, "chosen": "a", "rejected": "b"} for n in (1, 30, 2)]
    loaded = make(examples.pairs, rows, data={"max_prompt_tokens": 10})
    assert [(each.count, each.reason) for each in loaded.dropped] == [
        (1, "a prompt of more than 10 tokens (`max_prompt_tokens`)")
    ]


def test_cut_prompts_lose_their_beginning_on_both_sides_alike(make, tokenizer):
    rows = [{"prompt": "0123456789", "chosen": "abcdef", "rejected": "g"}]
    loaded = make(examples.pairs, rows, data={"chat": False}, max_tokens=12, too_long="cut_prompt")
    batch = loaded.batch([0])
    assert [tokenizer.decode(t[:n].tolist()) for t, n in zip(batch.tokens, batch.length, strict=True)] == [
        "56789abcdef<|end|>",
        "56789g<|end|>",
    ]
    assert batch.finish.tolist() == [Finish.STOPPED] * 2
    assert [(each.what, each.count) for each in loaded.dropped] == [("cut", 1)]


def test_cut_completions_keep_the_difference_or_are_left_out(make, tokenizer):
    """The prompt takes 4 of 12 tokens: 'aaaaaaaabb' differs from 'aaaaaaaacc' only after the eight that remain."""
    rows = [
        {"prompt": "0123", "chosen": "a" * 7 + "xyz", "rejected": "a" * 7 + "uvw"},
        {"prompt": "0123", "chosen": "a" * 8 + "bb", "rejected": "a" * 8 + "cc"},
        {"prompt": "0123", "chosen": "a" * 9, "rejected": "b"},
        {"prompt": "0" * 12, "chosen": "a", "rejected": "b"},
    ]
    loaded = make(examples.pairs, rows, data={"chat": False}, max_tokens=12, too_long="cut_completion")
    assert [[text for text, _ in group] for group in texts(loaded)] == [["aaaaaaax", "aaaaaaau"], ["aaaaaaaa", "b"]]
    batch = loaded.batch([1])
    assert batch.finish.tolist() == [Finish.LENGTH, Finish.STOPPED]
    account = [(each.what, each.reason.split(" ")[0], each.count) for each in loaded.dropped]
    assert account == [("left out", "more", 1), ("left out", "differ", 1), ("cut", "more", 2)]


completion = st.lists(st.integers(0, 2), min_size=1, max_size=8)


@settings(deadline=None)
@given(st.lists(completion, min_size=2, max_size=4, unique_by=tuple), st.integers(1, 4), st.integers(2, 9))
def test_a_cut_never_makes_completions_alike(answers, prompt, longest):
    group = [
        EncodedCompletion(
            np.array([9] * prompt + each, np.int32), np.arange(prompt + len(each)) >= prompt, row, Finish.STOPPED
        )
        for row, each in enumerate(answers)
    ]
    for how in ("cut_prompt", "cut_completion"):
        fitted = fit([group], longest, how)
        assert len(fitted.groups) + bool(fitted.too_long) + bool(fitted.indistinct) == 1
        for cut in fitted.groups:
            assert len({each.tokens[each.mask].tobytes() for each in cut}) == len(group)
            assert all(len(each) <= longest and each.mask.any() and not each.mask[0] for each in cut)
    cut = cut_completions(group, longest)
    assert cut is None or all(
        (each.tokens == old.tokens[: len(each)]).all() for each, old in zip(cut, group, strict=True)
    )


@given(st.lists(st.integers(0, 3), min_size=1, max_size=5))
def test_pairs_of_a_group_are_every_two_with_different_ratings(rewards):
    group = [
        EncodedCompletion(np.array([i]), np.array([True]), i, Finish.STOPPED, float(r)) for i, r in enumerate(rewards)
    ]
    pairs = pairs_of(group)
    expected = {(a, b) for a, x in enumerate(rewards) for b, y in enumerate(rewards) if x > y}
    assert {(two[0].row, two[1].row) for two in pairs} == expected and len(pairs) == len(expected)
    converted, unpaired = convert([group], "best_and_worst")
    if expected:
        assert converted[0][0].reward == max(rewards) and converted[0][1].reward == min(rewards) and not unpaired
    else:
        assert not converted and unpaired == list(range(len(rewards)))


def test_merging_does_not_depend_on_which_side_was_first():
    one, two = (EncodedCompletion(np.array([7, i]), np.array([False, True]), i, Finish.STOPPED) for i in (1, 2))
    there = [
        EncodedCompletion(g.tokens, g.mask, row, g.finish, reward)
        for row, (g, reward) in enumerate([(one, 1.0), (two, 0.0)])
    ]
    back = [EncodedCompletion(g.tokens, g.mask, 5, g.finish, reward) for g, reward in ((two, 1.0), (one, 0.0))]
    judged = merge_annotators([there, back, back])
    ((chosen, rejected),) = judged.groups
    assert chosen.tokens.tolist() == [7, 2] and (chosen.reward, rejected.reward) == (1.0, 0.0)
    assert judged.columns[0]["probability"] == pytest.approx(2 / 3)
    assert repeat_votes([there], lambda row: [0.5]) == []


GOOD: dict[str, Any] = {"prompt": "p", "chosen": "a", "rejected": "b"}
MALFORMED = {
    "half a line": ('{"prompt": "p", "chosen": "a", "rejec', r"pairs.jsonl:2: not JSON at column \d+"),
    "not an object": ('["p", "a", "b"]', r"pairs.jsonl:2: .*where an object such as"),
    "no rejected": ({"prompt": "p", "chosen": "a"}, r"pairs.jsonl:2: columns 'chosen' and 'rejected' are .* and null"),
    "a number": (
        GOOD | {"chosen": 3},
        r"pairs.jsonl:2: column 'chosen' is 3 \(a number\).*'a' \(text\) at .*use one type",
    ),
    "text and messages": (
        GOOD | {"rejected": [{"role": "assistant", "content": "b"}]},
        r"pairs.jsonl:2: column 'rejected' is \[.*'b' \(text\) at .*use one type",
    ),
    "empty": (GOOD | {"rejected": ""}, r"pairs.jsonl:2: column 'rejected' is empty text"),
    "no prompt": ({"prompt": None, "chosen": "a", "rejected": "b"}, r"pairs.jsonl:2: column 'prompt'"),
    "not UTF-8": (b'{"prompt": "\xff", "chosen": "a", "rejected": "b"}', r"pairs.jsonl:2: byte 13 is not UTF-8"),
    "an empty prompt": (GOOD | {"prompt": " "}, r"pairs.jsonl:2: column 'prompt' is empty text"),
    "an unknown ending": (GOOD | {"finish": "stop"}, r"pairs.jsonl:2: column 'finish' is 'stop'.*'stopped'"),
    "a margin that is text": (GOOD | {"gap": "wide"}, r"pairs.jsonl:2: column 'gap' .*'wide' \(text\)"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_end_with_code_2_and_their_row_and_nothing_is_written(
    name, tmp_path, tiny_model_folder, capsys
):
    row, message = MALFORMED[name]
    first = GOOD | {
        key: {"finish": "stopped", "gap": 1.0}[key] for key in ("finish", "gap") if isinstance(row, dict) and key in row
    }
    line = row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
    (tmp_path / "pairs.jsonl").write_bytes(json.dumps(first).encode() + b"\n" + line + b"\n")
    margin = "[{use: given, name: gap}]" if "gap" in name + message else "[]"
    (tmp_path / "recipe.yaml").write_text(
        f"policy: {{model: '{tiny_model_folder}'}}\ndata: {{path: pairs.jsonl}}\nexamples: {{use: pairs}}\n"
        f"loss: [{{use: pairwise, margin: {margin}}}]\nrun: {{folder: '{tmp_path / 'run'}'}}\n"
        f"reference: {{cache: '{tmp_path / 'cache'}'}}\n"
    )
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["train", str(tmp_path / "recipe.yaml")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert sorted(tmp_path.rglob("*")) == before
