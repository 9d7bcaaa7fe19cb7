"""Tests of the ``math`` verifier: a table of answers, agreement with math-verify, and quick paths that stay quick."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.verify import functions as verifiers
from posttrain.verify.mathematics import gold_answer, last_boxed, math_quick

SAME = [  # (written in the box, gold)
    ("72", "72"), ("72.0", "72"), ("72", "72.00"), ("+3", "3"), ("- 3", "-3"), ("\u22123", "-3"), ("072", "72"),
    ("1,234", "1234"), ("1234", "1,234"), ("1{,}000{,}000", "1000000"), ("1,234.50", "1234.5"), (".5", "0.5"),
    ("\\$5", "5"), ("$5.00", "5"), ("5\\%", "5"), ("50%", "0.5"), ("0.50", "50\\%"), ("12.5%", "0.125"),
    ("1/2", "0.5"), ("\\frac{1}{2}", "1/2"), ("\\dfrac12", "0.5"), ("\\tfrac{2}{4}", "1/2"), ("-\\frac{1}{2}", "-0.5"),
    ("0.333333", "1/3"), ("1/3", "0.333333"), ("0.666667", "\\frac{2}{3}"), ("\\text{72}", "72"),
    ("72\\text{ apples}", "72"), ("72^\\circ", "72"), ("x=5", "5"), ("2\\frac12", "2.5"),
    ("\\frac{3}{\\sqrt{3}}", "\\sqrt{3}"),
    ("x^2+2x+1", "(x+1)^2"), ("\\{1,2\\}", "\\{2,1\\}"), ("(1,2)", "(1, 2)"), ("[0,1)", "[0,1)"), ("72 km", "72"),
    ("18 apples", "18"), ("\\pi/2", "\\frac{\\pi}{2}"),
    ("Paris", "Paris"), ("\\text{paris}", "Paris"), ("A", "(A)"), ("10^{3}", "1000"), ("2\\cdot 3", "6"),
    ("\\sqrt{16}", "4"), ("y^2+x^2", "x^2+y^2"),
]  # fmt: skip
DIFFERENT = [
    ("71", "72"), ("-72", "72"), ("7.2", "72"), ("", "72"), ("1.2", "1,2"), ("0.3333", "1/3"), ("1.0000001", "1"),
    ("0.5", "5"), ("3/4", "4/3"), ("\\frac{1}{3}", "0.3"), ("2pi", "2"), ("2\\pi", "2"), ("3 million", "3"),
    ("2x", "2"),
    ("(2,1)", "(1,2)"), ("x^2+1", "(x+1)^2"), ("[0,1]", "[0,1)"), ("B", "(A)"), ("72 or 73", "72"), ("1/0", "1"),
    ("London", "Paris"),
]  # fmt: skip
DECIDED_OTHERWISE = [  # (written, gold, verdict): the deliberate differences that the module's docstring lists
    ("5.", "5", 1.0), ("50%", "50.0", 1.0), ("72 dollars", "72", 1.0),
    ("pairs", "Paris", 0.0), ("silent", "listen", 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("written", "gold"), SAME)
def test_math_accepts(written: str, gold: str) -> None:
    assert verifiers.math(f"So it is \\boxed{{{written}}}.", answer=gold) == 1.0


@pytest.mark.parametrize(("written", "gold"), DIFFERENT)
def test_math_refuses(written: str, gold: str) -> None:
    assert verifiers.math(f"So it is \\boxed{{{written}}}.", answer=gold) == 0.0


def by_math_verify(written: str, gold: str) -> float:
    from math_verify import parse, verify

    def boxed(text: str):
        return parse(f"\\boxed{{{text}}}", parsing_timeout=0)

    return float(verify(boxed(gold), boxed(written), timeout_seconds=0))


def test_quick_path_agrees_with_math_verify() -> None:
    table = SAME + DIFFERENT
    quick = {pair: math_quick(f"\\boxed{{{pair[0]}}}", answer=pair[1]) for pair in table}
    decided = {pair: verdict for pair, verdict in quick.items() if verdict is not None}
    assert len(decided) >= 40, "most of the table is numbers, which are what the quick path is for"
    assert decided == {pair: by_math_verify(*pair) for pair in decided}


@pytest.mark.parametrize(("written", "gold", "verdict"), DECIDED_OTHERWISE)
def test_deliberate_differences_from_math_verify(written: str, gold: str, verdict: float) -> None:
    assert verifiers.math(f"\\boxed{{{written}}}", answer=gold) == verdict
    assert by_math_verify(written, gold) != verdict


@pytest.mark.parametrize(
    ("completion", "verdict"),
    [
        ("3 * 24 = 72\n#### 72", 1.0),
        ("#### 71\nno, again:\n#### 72", 1.0),
        ("\\boxed{71} no: \\boxed{72}", 1.0),
        ("\\boxed{72} no: \\boxed{71}", 0.0),
        ("\\boxed{\\frac{144}{2}}", 1.0),
        ("The answer is 72.", 1.0),
        ("the final answer is: **$72**", 1.0),
        ("Answer: 71", 0.0),
        ("3 * 24 = 72", 1.0),
        ("I do not know", 0.0),
        ("", 0.0),
        ("<think>perhaps \\boxed{72}</think> It is \\boxed{71}.", 0.0),
        ("<think>perhaps \\boxed{71}</think> It is \\boxed{72}.", 1.0),
        ("\\boxed{72", 0.0),  # cut off
        ("\\boxed{" + "9" * 5000 + "}", 0.0),
    ],
)
def test_math_finds_the_final_answer(completion: str, verdict: float) -> None:
    assert verifiers.math(completion, answer="24 a day for 3 days is 3 * 24 = 72.\n#### 72") == verdict


def test_gold_answer_and_boxes() -> None:
    assert gold_answer("so 1,050 grams\n#### 1,050") == "1,050"
    assert gold_answer("thus \\boxed{\\frac{1}{2}}") == "\\frac{1}{2}"
    assert gold_answer(72) == "72"
    assert last_boxed("\\boxed{a{b}c} and \\boxed{d") is None
    assert last_boxed("\\boxed{d} and \\boxed{a{b}c}!") == "a{b}c"


@given(st.integers(-(10**9), 10**9), st.integers(0, 3))
def test_quick_path_reads_a_number_in_every_notation(value: int, zeros: int) -> None:
    decimals = "." + "0" * zeros if zeros else ""
    for written in (f"{value}{decimals}", f"{value:,}{decimals}", f"${value:,}$", f"{2 * value}/2", f"{value} apples"):
        assert math_quick(f"\\boxed{{{written}}}", answer=str(value)) == 1.0
        assert math_quick(f"\\boxed{{{written}}}", answer=str(value + 1)) == 0.0


@given(st.fractions(-1000, 1000, max_denominator=999), st.fractions(-1000, 1000, max_denominator=999))
def test_quick_path_compares_fractions_exactly(a: Fraction, b: Fraction) -> None:
    written = f"{'-' if a < 0 else ''}\\frac{{{abs(a.numerator)}}}{{{a.denominator}}}"
    assert math_quick(f"\\boxed{{{written}}}", answer=f"{b.numerator}/{b.denominator}") == float(a == b)


@pytest.mark.parametrize(
    "filling", [" ", "answer ", "\\boxed{", "}", "9", "9,", "a ", "#", "</think>", "<think>", "\n"]
)
def test_quick_paths_are_quick_on_any_text(filling: str) -> None:
    """Quick paths run in the process that trains, without a time limit."""
    for text in (filling * 20_000, f"#### a{filling * 20_000}b", f"\\boxed{{1{filling * 20_000}2}}"):
        start = time.process_time()
        math_quick(text, answer="72")
        verifiers.format(text)
        verifiers.exact(text, answer="72")
        assert time.process_time() - start < 0.5
