"""Tests of strict YAML: scalars of YAML 1.2, JSON, aliases."""

from __future__ import annotations

import json
import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from posttrain.errors import RecipeError
from posttrain.recipe.yaml_reader import parse


def test_scalars_follow_yaml_1_2():
    data = parse(
        "a: 1e-5\nb: 010\nc: on\nd: 1:30\ne: 0o17\nf: .inf\ng: 2026-11-21\nh: 1_000\ni: 'true'\nj: ~\nk:\nl: 0x1F\n"
        "m: -3.\nn: True\no: +.5E+3\n",
        "x.yaml",
    ).data
    values = [1e-5, 10, "on", "1:30", 15, math.inf, "2026-11-21", "1_000", "true", None, None, 31, -3.0, True, 500.0]
    assert list(data.values()) == values
    assert [type(value) for value in data.values()] == [type(value) for value in values]
    assert math.isnan(parse("a: .nan", "x.yaml").data["a"])


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("ab:#'\"\\ -1e.é", max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), plain, max_size=4))
def test_json_is_read_as_what_it_is(data):
    assert parse(json.dumps(data), "x.yaml").data == data  # YAML 1.2 contains JSON


@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), plain, max_size=4))
def test_what_pyyaml_writes_is_read_back(data):
    """The run folder keeps the resolved recipe as PyYAML writes it, and --resume reads it."""
    assert parse(yaml.safe_dump(data), "x.yaml").data == data


def test_an_alias_is_its_anchor_and_may_not_contain_itself():
    assert parse("a: &x {k: [1]}\nb: *x", "x.yaml").data == {"a": {"k": [1]}, "b": {"k": [1]}}
    with pytest.raises(RecipeError, match="x.yaml:1:4: an alias contains itself"):
        parse("a: &x [*x]", "x.yaml")
