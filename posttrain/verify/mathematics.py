r"""The ``math`` verifier, which compares the final answer of a completion with the gold answer.

Numbers, words, dates and times are compared here, exactly and in microseconds. Sets, intervals, matrices and
expressions go to math-verify, which reads LaTeX into sympy (tens of milliseconds). ``docs/math.md`` says what counts.
"""

from __future__ import annotations

from posttrain.verify.columns import reads
from posttrain.verify.final_answer import LONGEST_ANSWER, final_answer, first_clause, gold_answer, without_thoughts
from posttrain.verify.numbers import Number, read_number, same_number, tidy
from posttrain.verify.question import more_to_work_out, prose_in, stands_in, words_of
from posttrain.verify.symbolic import equal_expressions, too_large
from posttrain.verify.unmarked import last_formula, last_number, number_after_words
from posttrain.verify.wording import same_wording


@reads(answer=lambda answer: gold_text(answer))
def math(
    completion: str, *, answer: str | int | float, marked: bool = False, prompt_text: str = "", finish: str = ""
) -> float:
    r"""1 if the completion's final answer equals ``answer``, else 0.

    The final answer is what ``<answer>...</answer>``, ``\boxed{}``, ``####`` or "the answer is" marks, else the last
    number or formula of the text, unless that is cut off. Where ``answer`` is a number, a number counts and nothing
    that is still to be worked out does. An answer that repeats the question in another form than the gold's counts
    as wrong. ``docs/math.md`` has the rules.

    Args:
        answer: the gold answer, or a worked solution that marks it by ``####`` or ``\boxed{}``.
        marked: only a marked answer counts.
        prompt_text: the prompt as the model read it; the pool passes it.
        finish: ``length`` for a completion that was cut off; the pool passes it.

    Raises:
        ValueError: if ``answer`` is none: empty, not a number (NaN), infinite, or neither text nor a number.
    """
    verdict = math_quick(completion, answer=answer, marked=marked, prompt_text=prompt_text, finish=finish)
    if verdict is not None:
        return verdict
    final = final_answer(completion, truncated=finish == "length")
    written = last_formula(without_thoughts(completion)) if final is None else final
    return float(equal_expressions(gold_text(answer), tidy(written)))


def math_quick(
    completion: str, *, answer: str | int | float, marked: bool = False, prompt_text: str = "", finish: str = ""
) -> float | None:
    """Fast version of :func:`math`, in milliseconds whatever the text; ``None`` if only sympy can decide."""
    gold = gold_text(answer)
    final = final_answer(completion, truncated=finish == "length")
    if final is not None:
        return _verdict(final, gold, prompt_text)
    if marked or finish == "length":
        return 0.0
    text = without_thoughts(completion)
    gold_number = read_number(gold)
    if gold_number is None:
        return _verdict(last_formula(text), gold, prompt_text)
    last = last_number(text, prompt_text)
    return float(last is not None and _meets(last, gold_number, prompt_text))


def gold_text(answer: str | int | float) -> str:
    """The gold answer in the form in which answers are compared.

    Raises:
        ValueError: if it is empty, not finite, or neither text nor a number.
    """
    number = isinstance(answer, int | float) and not isinstance(answer, bool) and abs(answer) < float("inf")
    gold = tidy(gold_answer(answer)) if number or isinstance(answer, str) else ""
    if not gold:
        raise ValueError(f"answer is {answer!r:.80}; it must be text that is not empty, or a finite number")
    return gold


def _verdict(final: str, gold: str, prompt: str) -> float | None:
    """Compares the text of a final answer with a gold answer; ``None`` if only sympy can decide."""
    if len(final) > LONGEST_ANSWER:
        return 0.0
    written = tidy(final)
    if not written or written == gold:
        return float(written == gold)
    if (gold_number := read_number(gold)) is not None:
        number = _number(written, final, prompt)
        return float(number is not None and _meets(number, gold_number, prompt))
    if (verdict := same_wording(written, tidy(first_clause(final)), gold)) is not None:
        return float(verdict)
    if too_large(written) or prose_in(written, gold) or stands_in(written, prompt) or more_to_work_out(written, gold):
        return 0.0
    return None


def _number(written: str, final: str, prompt: str) -> Number | None:
    """The number that an answer is, perhaps with a unit, a reason or the beginning of a sentence around it."""
    clause = tidy(first_clause(final))
    texts = dict.fromkeys((written, clause))
    for known in ((), words_of(prompt)):
        for text in texts:
            if (number := read_number(text, known=known)) is not None:
                return number
        if not stands_in(clause, prompt) and (number := number_after_words(clause, known)) is not None:
            return number  # a sentence, but not one of the question
    return None


def _meets(number: Number, gold: Number, prompt: str) -> bool:
    """True if a number is the gold number, worked out, and not the question repeated in another form."""
    if not same_number(number, gold):
        return False
    if number.same_form(gold):
        return True
    if number.kind == "fraction" and gold.kind in ("integer", "decimal", "scientific") and gold.value.denominator == 1:
        return False  # 144/2 is still to be divided
    return not stands_in(number.text, prompt)
