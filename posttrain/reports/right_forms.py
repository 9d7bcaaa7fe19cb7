r"""Right answers in the forms that a verifier documents, which must earn the full reward in its audit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from posttrain.recipe.part import Part
from posttrain.verify.functions import exact, format, length, math

FORMS: Mapping[str, str] = {
    "bare": "{answer}",
    "box": "So it is \\boxed{{{answer}}}",
    "hashes": "So it is\n#### {answer}",
    "sentence": "The answer is {answer}",
    "tag": "<answer>{answer}</answer>",
    "thought": "<think>Let me see.</think>{answer}",
}
"""Forms in which verifiers look for answers, by name; ``{answer}`` stands for the gold answer."""

VARIANTS: Mapping[str, Callable[[str, str], str]] = {
    "": lambda form, gold: form.format(answer=gold),
    "with spaces": lambda form, gold: form.format(answer=f" {gold} "),
    "with a line break behind": lambda form, gold: form.format(answer=gold) + "\n",
    "with a period behind": lambda form, gold: form.format(answer=gold) + ".",
}
"""Changes that should not matter, by name."""


class Documented(NamedTuple):
    """The forms of a right answer in which a verifier pays, and the changes that it allows."""

    forms: Sequence[str]  # names of FORMS
    variants: Sequence[str] = tuple(VARIANTS)
    whole_column: bool = False  # True: the answer is all of the column, not the part that "####" or a box marks


DOCUMENTED: Mapping[Any, Documented] = {
    math: Documented(("bare", "box", "hashes", "sentence", "tag")),
    exact: Documented(("bare",), ("", "with spaces", "with a line break behind"), whole_column=True),
    format: Documented(("thought",)),
    length: Documented(()),  # pays for every text of its length
}
"""Forms of the package's verifiers."""


class RightAnswer(NamedTuple):
    """A form of a right answer that is tried."""

    name: str
    make: Callable[[str], str]  # the completion, of the gold answer
    required: bool  # False: no document says that this verifier pays for it
    whole_column: bool = False


def right_answers(part: Part, templates: Sequence[str] = ()) -> list[RightAnswer]:
    """The right answers that a verifier is tried with.

    Args:
        part: the verifier.
        templates: forms that the suite sets, such as ``The answer is {answer}``; they replace what is known.
    """
    documented = DOCUMENTED.get(part.target)
    if documented is None or templates:
        forms = {f"{text!r}": text for text in templates} or FORMS
        return [_answer(name, text, "", required=bool(templates)) for name, text in forms.items()]
    forms = [name for name in documented.forms if not (name == "bare" and part.options.get("marked"))]
    changes = [change for change in documented.variants if not (change and part.options.get("strip") is False)]
    return [
        _answer(name, FORMS[name], change, required=True, whole_column=documented.whole_column)
        for name in forms
        for change in changes
    ]


def _answer(name: str, form: str, change: str, *, required: bool, whole_column: bool = False) -> RightAnswer:
    vary = VARIANTS[change]
    return RightAnswer(f"{name} {change}".strip(), lambda gold: vary(form, gold), required, whole_column)
