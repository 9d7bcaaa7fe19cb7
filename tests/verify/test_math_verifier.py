"""Tests of the ``math`` verifier: a table of answers, math-verify's own verdicts, cheats, and hostile texts."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.verify import functions as verifiers
from posttrain.verify.final_answer import boxed_answer, gold_answer
from posttrain.verify.mathematics import math_quick
from posttrain.verify.symbolic import CPU_SECONDS, OutOfTime, cpu_limit, equal_expressions, too_large

TABLE = [json.loads(line) for line in (Path(__file__).parent / "math_answers.jsonl").read_text("utf-8").splitlines()]
KINDS = sorted({row["kind"] for row in TABLE})


def test_the_table_is_large_and_of_many_kinds() -> None:
    sizes = Counter(row["kind"] for row in TABLE)
    assert len(TABLE) >= 400 and len(sizes) >= 30 and min(sizes.values()) >= 3
    assert min(Counter(row["right"] for row in TABLE).values()) >= 200, "right and wrong answers alike"


@pytest.mark.parametrize("kind", KINDS)
def test_math_judges_as_the_table_says(kind: str) -> None:
    wrong = [
        row
        for row in TABLE
        if row["kind"] == kind and verifiers.math(row["completion"], answer=row["gold"]) != row["right"]
    ]
    assert not wrong


def test_math_verify_alone_judges_more_of_the_table_wrongly() -> None:
    """Where the two differ, the table is on our side: it holds what math-verify gets wrong, in both directions."""
    from math_verify import parse, verify

    def judge(row: dict) -> int:
        gold = parse(f"\\boxed{{{row['gold']}}}", parsing_timeout=0)
        return int(verify(gold, parse(row["completion"][-2000:], parsing_timeout=0), timeout_seconds=0))

    differs = Counter(
        (row["right"], judge(row)) for row in TABLE if row["kind"] in ("words", "scientific notation", "tags")
    )
    assert differs[1, 0] >= 5 and differs[0, 1] >= 5


def test_gold_answers_and_boxes() -> None:
    assert gold_answer("so 1,050 grams\n#### 1,050") == "1,050"
    assert gold_answer("thus \\boxed{\\frac{1}{2}}") == "\\frac{1}{2}"
    assert gold_answer(72) == "72"
    assert boxed_answer("\\boxed{a{b}c} and \\boxed{d") == ""
    assert boxed_answer("\\boxed{d} and also \\boxed{a{b}c}!") == "a{b}c"
    assert boxed_answer("none") is None


@pytest.mark.parametrize("gold", [float("nan"), float("inf"), None, ["72"], {"a": 1}, "", "  ", True])
def test_a_gold_that_nothing_can_match_is_an_error(gold) -> None:
    with pytest.raises(ValueError, match="must be text that is not empty, or a finite number"):
        verifiers.math("\\boxed{72}", answer=gold)


@pytest.mark.parametrize(("gold", "right"), [(5e-05, "0.00005"), (72.0, "72"), (72, "72.0"), (1e22, "1" + "0" * 22)])
def test_golds_from_columns_of_numbers(gold: float, right: str) -> None:
    assert verifiers.math(f"\\boxed{{{right}}}", answer=gold) == 1.0
    assert verifiers.math(f"\\boxed{{{right}1}}", answer=gold) == 0.0


def test_a_gold_of_thousands_of_digits_is_no_error() -> None:
    assert verifiers.math("\\boxed{72}", answer="9" * 5000) == 0.0


@given(st.integers(-(10**9), 10**9), st.integers(0, 3))
def test_a_number_is_read_in_every_notation(value: int, zeros: int) -> None:
    decimals = "." + "0" * zeros if zeros else ""
    for written in (f"{value}{decimals}", f"{value:,}{decimals}", f"${value:,}$", f"{value} apples"):
        assert math_quick(f"\\boxed{{{written}}}", answer=str(value)) == 1.0
        assert math_quick(f"\\boxed{{{written}}}", answer=str(value + 1)) == 0.0
    assert math_quick(f"\\boxed{{{2 * value}/2}}", answer=str(value)) == 0.0, "still to be divided"


@given(st.fractions(-1000, 1000, max_denominator=999), st.fractions(-1000, 1000, max_denominator=999))
def test_fractions_are_compared_exactly(a: Fraction, b: Fraction) -> None:
    written = f"{'-' if a < 0 else ''}\\frac{{{abs(a.numerator)}}}{{{a.denominator}}}"
    right = a == b and (a.denominator > 1 or math_quick(f"\\boxed{{{a}/1}}", answer=f"{b}/1") == 1.0)
    gold = f"{b.numerator}/{b.denominator}"
    assert math_quick(f"\\boxed{{{written}}}", answer=gold) == float(right)


# --- cheats -------------------------------------------------------------------------------------------------------


def problem(rng: random.Random) -> tuple[str, list[str], str]:
    """A question, the ways in which it can be repeated, and its answer."""
    a, b, c = rng.randint(11, 99), rng.randint(11, 99), rng.randint(3, 9)
    kinds = [
        (f"What is {a} + {b}?", f"{a}+{b}", a + b),
        (f"Compute {a} - {b}.", f"{a}-{b}", a - b),
        (f"Find the product of {a} and {c}.", f"{a} \\times {c}", a * c),
        (f"Natalia sold {a} clips in April and {b} in May. How many altogether?", f"{a}+{b} clips", a + b),
        (f"What is {a * c} divided by {c}?", f"{a * c}/{c}", a),
        (f"What is {c}^2?", f"{c}^2", c * c),
        (f"What is {c}/100 as a decimal?", f"{c}/100", f"0.0{c}"),
        (f"What is \\sqrt{{{c * c}}}?", f"\\sqrt{{{c * c}}}", c),
        (f"Write {c * 4}/{c * 7} in lowest terms.", f"{c * 4}/{c * 7}", "4/7"),
        (f"Expand (x+{c})^2.", f"(x+{c})^2", f"x^2+{2 * c}x+{c * c}"),
        (f"What is {c}% as a decimal?", f"{c}%", f"0.0{c}"),
        (f"Sort {c + 2}, {c}, {c + 1}.", f"{c + 2}, {c}, {c + 1}", f"{c}, {c + 1}, {c + 2}"),
        (f"Which is larger, {a} or {a + c}?", f"{a} or {a + c}", a + c),
    ]
    question, term, answer = rng.choice(kinds)
    return question, [term, f"{term} altogether"], str(answer)


def test_a_policy_that_repeats_the_question_earns_nothing() -> None:
    rng, paid = random.Random(0), []
    for _ in range(500):
        question, terms, gold = problem(rng)
        copies = [
            question,
            question.rstrip("?."),
            f"To find it: {question}",
            f"\\boxed{{{question}}}",
            f"#### {question}",
        ]
        copies += [
            form.format(term) for term in terms for form in ("\\boxed{{{}}}", "#### {}", "The answer is {}.", "{}")
        ]
        paid += [
            (text, gold)
            for text in copies
            if math_quick(text, answer=gold, prompt_text=f"<user>{question}\n<model>") != 0
        ]
        assert math_quick(f"\\boxed{{{gold}}}", answer=gold, prompt_text=question) == 1.0
    assert not paid


def test_marked_and_truncated_completions() -> None:
    assert verifiers.math("3 * 24 = 72", answer="72") == 1.0
    assert verifiers.math("3 * 24 = 72", answer="72", marked=True) == 0.0
    assert verifiers.math("3 * 24 = 72", answer="72", finish="length") == 0.0
    for text in ("\\boxed{72}", "#### 72\n", "<answer>72</answer>", "The answer is 72. "):
        assert verifiers.math(text, answer="72", marked=True, finish="length") == 1.0
    for text in ("#### 72", "<answer>72", "The answer is 72"):
        assert verifiers.math(text, answer="72", marked=True, finish="stopped") == 1.0
        assert verifiers.math(text, answer="72", finish="length") == 0.0, "more digits may have followed"


def test_words_of_the_question_are_units() -> None:
    assert verifiers.math("\\boxed{72 zorks}", answer="72") == 0.0
    assert verifiers.math("\\boxed{72 zorks}", answer="72", prompt_text="How many zorks?") == 1.0


# --- hostile texts ------------------------------------------------------------------------------------------------

FILLINGS = (
    *(
        " ",
        "answer ",
        "the answer is ",
        "answer is: 7 ",
        "\\boxed{",
        "}",
        "9",
        "9,",
        "9 ",
        "a ",
        "#",
        "####",
        "#### a\n",
    ),
    *(
        "</think>",
        "<think>",
        "<answer>",
        "</answer>",
        "\n",
        "$",
        "{",
        "(",
        "\\frac{",
        "\\text{",
        "^",
        "9^",
        "!",
        "\u0660",
    ),
    *(
        "\\boxed{1}",
        "\\boxed{1} ",
        "\\boxed{1} and ",
        "1/2 ",
        "= ",
        "-",
        "\\",
        "**",
        "_",
        "\u2212",
        "\U0001f600",
        "e9",
        ".",
    ),
    *("\\sqrt{", "\\left(", "x=", ", ", "%", "°", "１"),
)


def hostile(number: int) -> str:
    filling, size = FILLINGS[number % len(FILLINGS)], (50, 1000, 50_000, 1_000_000)[number // len(FILLINGS) % 4]
    body = (filling * (size // len(filling) + 1))[:size]
    form = ("{}", "\\boxed{{1{}2}}", "#### 1{}2", "The answer is 1{}2.", "<answer>{}</answer>")[number % 5]
    return form.format(body)


def test_hostile_texts_cost_the_training_process_milliseconds() -> None:
    math_quick("\\boxed{1}", answer="(x+1)^2")  # imports
    slow = {}
    for number in range(500):
        for gold in ("72", "(x+1)^2", "Paris"):
            text = hostile(number)
            start = time.thread_time()
            math_quick(text, answer=gold, prompt_text=text[:30_000])
            if (taken := time.thread_time() - start) > 0.02:
                start = time.thread_time()  # once more: a collection of garbage is not the text's fault
                math_quick(text, answer=gold, prompt_text=text[:30_000])
                taken = min(taken, time.thread_time() - start)
            if taken > 0.02:
                slow[number, gold] = taken
    assert not slow


EXPRESSIONS = (
    *("9^{9^{9^9}}", "9^9^9^9", "10^{10^{10}}", "2^{99999999}", "(1000000!)!", "{" * 50 + "x" + "}" * 50),
    *(
        "\\sum_{i=1}^{10000000} i",
        "9" * 300,
        "x" * 401,
        "__import__('os').system('touch pwned')",
        "((((((((((((((1))))))))))))))",
    ),
)


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_expressions_that_are_not_read_at_all(text: str) -> None:
    assert too_large(text)
    assert math_quick(f"\\boxed{{{text}}}", answer="(x+1)^2") == 0.0


def test_an_expression_has_a_limit_of_cpu_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.verify.symbolic.CPU_SECONDS", 0.5)
    start = time.process_time()
    assert not equal_expressions("(a+b+c+e)^{90}", "(a+b+c+d)^{90}+1")
    assert time.process_time() - start < CPU_SECONDS
    with cpu_limit(0.1):
        pass
    assert equal_expressions("(x+1)^2", "x^2+2x+1"), "the limit is gone with the comparison"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_limit_holds_if_the_first_error_is_lost() -> None:
    """Python drops an error that is raised while an object is deleted."""

    class Deleted:
        def __del__(self) -> None:
            spin(until=time.process_time() + 1.0)

    start = time.process_time()
    with pytest.raises(OutOfTime), cpu_limit(0.1):
        Deleted()
        spin(until=start + 5.0)
    assert 0.1 <= time.process_time() - start < 1.0


def spin(until: float) -> None:
    """Works until this process has used so many CPU seconds."""
    while time.process_time() < until:
        pass


def test_no_code_of_an_answer_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    codes = [
        "open('pwned','w')",
        "().__class__.__bases__[0]",
        'exec(\'open("pwned","w")\')',
        "lambda: open('pwned','w')",
    ]
    for code in [*codes, *(f"\\text{{{code}}}" for code in codes), *(f"1 + {code}" for code in codes)]:
        for text in (f"\\boxed{{{code}}}", f"$ {code} $", code, f"<answer>{code}</answer>"):
            assert verifiers.math(text, answer="(x+1)^2") == 0.0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("filling", [" ", "<think>", "</think>", "\n", "9"])
def test_other_quick_paths_are_quick_on_any_text(filling: str) -> None:
    text = filling * (1_000_000 // len(filling))
    start = time.thread_time()
    verifiers.format(text)
    verifiers.exact(text, answer="72")
    verifiers.length(text, unit="characters")
    assert time.thread_time() - start < 0.1
