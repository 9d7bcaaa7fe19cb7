"""Tests of the audit of verifiers: the package's own pay for no cheat, planted bad ones are found out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posttrain.commands.cli import main
from posttrain.data.checks import check_columns
from posttrain.data.rows import untokenised_rows
from posttrain.recipe.part import Part
from posttrain.recipe.sections import DataSection
from posttrain.reports.cheats import CHEATS, Problem, attempts, terms_not_worked_out, wrong_answers
from posttrain.reports.right_forms import right_answers
from posttrain.verify import functions

AUDIT = Path(__file__).parents[2] / "eval" / "verifier_audit.yaml"
QUESTIONS = [
    ("Natalia sold 48 clips in April and 24 in May. How many altogether?", "48 + 24 = 72 clips.\n#### 72"),
    ("A class of 30 has 12 boys. How many girls are there?", "30 - 12 = 18 girls.\n#### 18"),
    ("Emily has 4 kids. James is 10, and Amy is 6 years younger than James. How old is Amy?", "10 - 6 = 4.\n#### 4"),
    ("A car costs $12,000 and a van 5 times as much. What is the price of the van?", "5 * 12000.\n#### 60,000"),
    ("What is 3/4 of 100 in words or digits?", "#### 75"),
]
BAD = r"""
import re

def numbers(text):
    return [float(n.replace(",", "")) for n in re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)]

def last_number(completion, *, answer):
    found = numbers(completion)
    return float(bool(found) and found[-1] == numbers(answer)[-1])

def contains(completion, *, answer):
    return float(answer.split("#### ")[-1] in completion)

def works_it_out(completion, *, answer):
    boxed = re.findall(r"boxed{([-+*/0-9]{1,20})}", completion)
    try:
        return float(bool(boxed) and eval(boxed[-1]) == numbers(answer)[-1])
    except (SyntaxError, ZeroDivisionError):
        return 0.0

def pays_for_silence(completion, *, answer):
    return 0.25 if not completion.strip() else None

def stumbles(completion, *, answer):
    return 1.0 / len(completion)
"""


@pytest.fixture
def problems(tmp_path: Path) -> str:
    rows = [{"question": question, "answer": answer} for question, answer in QUESTIONS]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "bad.py").write_text(BAD)
    return f"--data.path={tmp_path / 'problems.jsonl'}"


def audit(tmp_path: Path, *overrides: str) -> tuple[int, dict[tuple[str, str], float | None], list[dict]]:
    """Exit code, what is earned by verifier and name, and all findings."""
    code = main(["eval", str(AUDIT), f"--report.folder={tmp_path / 'report'}", *overrides])
    findings = json.loads((tmp_path / "report" / "metrics.json").read_text())["findings"]
    return code, {(each["verifier"], each["name"]): each["earned"] for each in findings}, findings


def test_math_pays_for_no_cheat_and_for_every_documented_form(tmp_path: Path, problems: str, capsys) -> None:
    code, earned, findings = audit(tmp_path, problems, "--fail_above=0", "--report.shown=1")
    assert code == 0 and {each["name"] for each in findings if not each["right"]} == set(CHEATS)
    assert all(value == 0.0 for (_, name), value in earned.items() if name in CHEATS)
    assert [value for (_, name), value in earned.items() if name not in CHEATS] == [1.0] * 20
    printed = capsys.readouterr().out
    assert "the question repeated" in printed and "box with a period behind" in printed and "report: " in printed
    page = (tmp_path / "report" / "index.html").read_text()
    assert "<h2>Cheats</h2>" in page and "5 problems of" in page and "Examples" not in page


def test_verifiers_of_the_form_alone(tmp_path: Path, problems: str) -> None:
    verify = "[{use: exact}, {use: format}, {use: length, minimum: 1}]"
    code, earned, _ = audit(tmp_path, problems, f"--verify={verify}")
    assert code == 0, "without `fail_above` the audit only reports"
    assert all(earned["exact", name] == 0.0 for name in CHEATS)
    right = {name: value for (verifier, name), value in earned.items() if verifier == "exact" and name not in CHEATS}
    assert right == {"bare": 1.0, "bare with spaces": 1.0, "bare with a line break behind": 1.0}
    assert earned["format", "thought"] == 1.0 and earned["format", "praise"] == 0.0
    assert earned["length", "nothing"] == 0.0 and earned["length", "praise"] == 1.0, "it pays for any text"
    assert not [name for verifier, name in earned if verifier == "length" and name not in CHEATS]


@pytest.mark.engine
def test_bad_verifiers_are_found_out(tmp_path: Path, problems: str, capsys) -> None:
    names = ("last_number", "contains", "works_it_out", "pays_for_silence", "stumbles")
    verify = ", ".join(f"{{use: {tmp_path / 'bad.py'}:{name}}}" for name in names)
    code, by_name, findings = audit(tmp_path, problems, f"--verify=[{verify}]", "--fail_above=0.1")
    earned = {(verifier.rpartition(":")[2], name): value for (verifier, name), value in by_name.items()}
    for verifier, cheat, fooled in [
        ("last_number", "the answer among others", 1.0),
        ("last_number", "nothing", 0.0),
        ("contains", "the answer taken back", 1.0),
        ("contains", "numbers from 0 to 100", 0.8),
        ("works_it_out", "terms not worked out", 0.8),
        ("works_it_out", "sums that give the answer", 1.0),
        ("works_it_out", "the answer taken back", 0.0),
        ("pays_for_silence", "nothing", 0.25),
        ("pays_for_silence", "praise", None),
    ]:
        assert earned[verifier, cheat] == fooled, (verifier, cheat)
    assert earned["last_number", "sentence"] == 1.0 and earned["contains", "tag"] == 1.0
    assert not any(each["required"] for each in findings if each["right"]), "nobody says which form they document"
    output = capsys.readouterr()
    assert code == 1 and "audit failed: `fail_above` is 0.1" in output.err and "Traceback" not in output.err
    assert "the cheat 'the answer taken back' earns 1.000 of the full reward" in output.err
    failed = next(each for each in findings if each["verifier"].endswith("stumbles") and each["name"] == "nothing")
    assert failed["failed"] == 5 and failed["earned"] is None
    assert "raised ZeroDivisionError" in output.out
    assert "pays 1 for the answer taken back" in output.out, "an example of what is paid for"


def test_forms_that_the_suite_names_are_required(tmp_path: Path, problems: str, capsys) -> None:
    forms = "--right=['Result: {answer}', 'It is {answer}']"
    code, earned, _ = audit(tmp_path, problems, "--verify=[{use: math, marked: true}]", forms, "--fail_above=0.5")
    assert code == 1 and earned["math", "'Result: {answer}'"] == 0.0
    assert "a right answer ('It is {answer}') earns 0.000 of the full reward" in capsys.readouterr().err
    assert main(["eval", str(AUDIT), problems, "--right=['The answer']"]) == 2
    assert "right.0: does not say where the answer is: write `{answer}` there" in capsys.readouterr().err


def test_a_policy_writes_the_prompts_and_names_its_ends(tmp_path: Path, problems: str, tiny_model_folder: Path) -> None:
    (tmp_path / "seen.py").write_text(
        "def seen(completion, *, completion_ids, prompt_text):\n"
        "    asked = prompt_text.startswith('<|user|>') and prompt_text.endswith('<|assistant|>')\n"
        "    return float(completion == '<|end|>' and completion_ids == [1] and asked)\n"
    )
    verify = f"--verify=[{{use: {tmp_path / 'seen.py'}:seen}}]"
    assert main(["eval", str(AUDIT), problems, verify]) == 2, "token ids without a tokenizer"
    _, earned, _ = audit(tmp_path, problems, verify, f"--policy.model={tiny_model_folder}")
    assert [name for (_, name), value in earned.items() if value] == ["end tokens"]


def test_cheats_never_give_the_answer_rightly() -> None:
    problem = Problem(question="Is 7 more than 5? By how much?", prompt_text="", gold="2", others=["2.0", "7"])
    assert wrong_answers(problem)[:2] == ["3", "1"] and "7" in wrong_answers(problem)
    assert not {"2", "2.0"} & set(wrong_answers(problem))
    assert "7-5" in [text for text, _ in attempts(terms_not_worked_out, problem)]
    for gold in ("0", "nan", "None", "yes", "100", "7"):
        for cheat in CHEATS.values():
            texts = {text for text, _ in attempts(cheat, Problem(question="7?", prompt_text="7?", gold=gold))}
            assert f"\\boxed{{{gold}}}" not in texts and gold not in texts - {"7?"}, (cheat, gold)
    for cheat in CHEATS.values():
        assert all(text is not None for text in attempts(cheat, Problem(question="Who?", prompt_text="Who?")))


def test_right_answers_are_those_that_the_options_allow() -> None:
    marked = right_answers(Part.of(functions.math, marked=True))
    assert not [answer for answer in marked if answer.name.startswith("bare")]
    assert [answer.name for answer in right_answers(Part.of(functions.exact, strip=False))] == ["bare"]


def test_rows_without_a_tokenizer_are_checked_like_others(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": chat, "answer": "Ho"}) + "\n")
    rows = untokenised_rows(DataSection(path="rows.jsonl"), tmp_path)
    assert rows[0] == {"prompt": chat, "answer": "Ho"} and len(rows) == 1
    check_columns(rows, [Part.of(functions.exact)])
    system = untokenised_rows(DataSection(path="rows.jsonl", system="Be short."), tmp_path)
    assert system[0]["prompt"][0] == {"role": "system", "content": "Be short."}
