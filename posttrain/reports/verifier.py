"""Audits verifiers: what they pay for completions that must earn nothing, and for right answers in documented forms."""

from __future__ import annotations

import dataclasses
import datetime
import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from posttrain.data.checks import check_columns
from posttrain.data.for_policy import load_prompts
from posttrain.data.rows import untokenised_rows
from posttrain.engines.ends import stop_tokens
from posttrain.errors import CheckFailed, RecipeError
from posttrain.models.load import load_tokenizer
from posttrain.models.text import text_of
from posttrain.output.progress import TABLE_WIDTH
from posttrain.reports.cheats import CHEATS, Attempt, Problem, attempts
from posttrain.reports.metrics_file import write_metrics
from posttrain.reports.page import document, html_table
from posttrain.reports.right_forms import right_answers
from posttrain.reports.verifier_suite import VerifierSuite
from posttrain.system.long_work import LongWork
from posttrain.system.versions import versions
from posttrain.verify import VerifierPool
from posttrain.verify.final_answer import FINAL_MARK, gold_answer

ENDS = ("<|im_end|>", "<|endoftext|>", "</s>", "<|eot_id|>")
"""End tokens that are tried if the suite names no policy."""
LONGEST_SHOWN = 120  # characters of a completion in the report
NOTES = (
    "Earned is the mean over problems of the largest share of the full reward that one of a cheat's completions earns: "
    "what a policy earns that has found the cheat. It should be 0.",
    "Right answers should earn 1 in the forms that the verifier documents; other forms are shown for information.",
)


@dataclass(frozen=True)
class Case:
    """A problem with its row."""

    problem: Problem
    row: dict[str, Any]
    place: str
    gold_column: str  # all of the column with the gold answer, as text


@dataclass(frozen=True)
class Example:
    """A completion with the value that a verifier gave to it."""

    place: str
    text: str
    value: float


@dataclass(frozen=True)
class Finding:
    """The share that one verifier pays for one cheat, or for one form of right answers."""

    verifier: str
    name: str
    right: bool  # True: a right answer
    required: bool  # it should earn nothing (a cheat) or everything (a right answer)
    completions: int
    earned: float | None  # mean over problems of the largest share; None: the verifier applied to none
    failed: int  # calls that raised an error or took too long
    examples: Sequence[Example]  # those at fault: the most that was paid, or right answers that earned less

    def fault(self) -> float:
        """The share that is earned wrongly, or lost."""
        if self.earned is None or not self.required:
            return 0.0
        return 1 - self.earned if self.right else self.earned


def measure_verifiers(suite: VerifierSuite, *, resume: bool = False) -> Path:
    """Audits the verifiers of a suite, prints two tables, and writes ``metrics.json`` and ``index.html``.

    Args:
        resume: changes nothing: an audit takes seconds, and starts anew.

    Returns:
        The report's folder.

    Raises:
        UserError: if data and verifiers do not fit together.
        CheckFailed: if a verifier pays more for a cheat, or loses more of a right answer, than ``fail_above``.
    """
    tokenizer = None if suite.policy is None else load_tokenizer(suite.policy)
    cases = read_cases(suite, tokenizer)
    parts = [dataclasses.replace(part, on_error="skip") for part in suite.verify]
    plain_text = None if tokenizer is None else text_of(tokenizer)
    with VerifierPool(parts, plain_text=plain_text) as pool:
        audit = Audit(suite, cases, pool, tokenizer)
        findings = sorted([*audit.cheats(), *audit.right_answers()], key=lambda each: pool.names.index(each.verifier))
        problems = dict(pool.first_failures)
    print_report(findings, problems)
    write_report(suite, findings, problems, len(cases))
    print(f"report: {suite.folder / 'index.html'}")
    refuse_faults(suite, findings)
    return suite.folder


def read_cases(suite: VerifierSuite, tokenizer: Any) -> list[Case]:
    """Reads the problems, and checks that the verifiers find the columns that they ask for.

    Raises:
        UserError: if not, or if a verifier asks for token ids and the suite names no policy.
    """
    if suite.policy is None:
        rows = untokenised_rows(suite.data, suite.base)
        check_columns(rows, suite.verify)
        prompts, ends = [_plain(rows[i]["prompt"]) for i in range(len(rows))], ENDS
    else:
        rows = load_prompts(suite.data, suite.policy, suite.verify, tokenizer=tokenizer, base=suite.base)
        decode = text_of(tokenizer, special=True)
        prompts = [decode(rows.prompt_tokens(i)) for i in range(len(rows))]
        ends = tuple(decode([token]) for token in stop_tokens(suite.policy, tokenizer))
    columns = [str(rows[i].get(suite.answer, "")).strip() for i in range(len(rows))]
    golds = [gold_answer(text) for text in columns]
    cases = []
    for i, (prompt, column, gold) in enumerate(zip(prompts, columns, golds, strict=True)):
        others = dict.fromkeys(golds[i + 1 : i + 5] + golds[max(0, i - 4) : i])
        problem = Problem(
            question=_question(rows[i]["prompt"]),
            prompt_text=prompt,
            gold=gold if suite.answer in rows.columns and gold else None,
            solution=column.rpartition(FINAL_MARK)[0].strip(),
            others=[text for text in others if text],
            ends=ends,
        )
        cases.append(Case(problem, rows[i], rows.place(i), column))
    return cases


def _plain(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n\n".join(_content(message) for message in prompt)


def _question(prompt: Any) -> str:
    """The text of the last message of the user."""
    if isinstance(prompt, str):
        return prompt
    asked = [message for message in prompt if message.get("role") == "user"]
    return _content((asked or prompt)[-1])


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


class Audit:
    """Tries completions of all problems on the verifiers of a suite."""

    def __init__(self, suite: VerifierSuite, cases: Sequence[Case], pool: VerifierPool, tokenizer: Any) -> None:
        self.suite, self.cases, self.pool, self.tokenizer = suite, cases, pool, tokenizer
        asks = [v.name for v in pool.verifiers if v.signature.takes("completion_ids") or not v.part.special_tokens]
        if asks and tokenizer is None:
            raise RecipeError(f"verify: {asks[0]} reads token ids: set `policy.model`, whose tokenizer makes them")

    def cheats(self) -> Iterable[Finding]:
        """Tries the cheats; yields a finding for each cheat and verifier."""
        work = LongWork("cheats", len(CHEATS))
        for name, cheat in CHEATS.items():
            tried = [attempts(cheat, case.problem) for case in self.cases]
            values, failed = self._values(tried)
            for verifier in self.pool.names:
                yield self._finding(verifier, name, tried, values, failed, right=False, required=True)
            work.count()

    def right_answers(self) -> Iterable[Finding]:
        """Tries right answers; yields a finding for each verifier and form that it may pay for."""
        for verifier in self.pool.verifiers:
            for answer in right_answers(verifier.part, self.suite.right):
                tried = [
                    [Attempt(answer.make(case.gold_column if answer.whole_column else case.problem.gold))]
                    if case.problem.gold is not None
                    else []
                    for case in self.cases
                ]
                if any(tried):
                    values, failed = self._values(tried)
                    yield self._finding(
                        verifier.name, answer.name, tried, values, failed, right=True, required=answer.required
                    )

    def _values(
        self, tried: Sequence[Sequence[Attempt]]
    ) -> tuple[dict[tuple[int, int], Mapping[str, float | None]], Mapping[str, int]]:
        """The values of completions by number of case and attempt, and the number of calls of each that failed."""
        before = self.pool.failures.copy()
        for i, (case, texts) in enumerate(zip(self.cases, tried, strict=True)):
            for j, (text, finish) in enumerate(texts):
                ids = [] if self.tokenizer is None else self.tokenizer(text, add_special_tokens=False)["input_ids"]
                prompt = case.problem.prompt_text
                self.pool.submit((i, j), text, ids, case.row, place=case.place, finish=finish, prompt_text=prompt)
        verdicts = self.pool.collect()
        values: Any = {key: verdict.values for key, verdict in verdicts.items()}
        return values, {name: self.pool.failures[name] - before[name] for name in self.pool.names}

    def _finding(
        self,
        verifier: str,
        name: str,
        tried: Sequence[Sequence[Attempt]],
        values: Mapping[tuple[int, int], Mapping[str, float | None]],
        failed: Mapping[str, int],
        *,
        right: bool,
        required: bool,
    ) -> Finding:
        shares, examples = [], []
        for i, (case, texts) in enumerate(zip(self.cases, tried, strict=True)):
            paid = [(values[i, j][verifier], text) for j, (text, _) in enumerate(texts)]
            applied = [(value / self.suite.full, text) for value, text in paid if value is not None]
            if applied:
                share, text = max(applied)
                shares.append(min(1.0, max(0.0, share)))
                if (share < 1) if right else (share > 0):
                    examples.append(Example(case.place, text, share * self.suite.full))
        examples.sort(key=lambda example: example.value, reverse=not right)
        return Finding(
            verifier=verifier,
            name=name,
            right=right,
            required=required,
            completions=sum(map(len, tried)),
            earned=sum(shares) / len(shares) if shares else None,
            failed=failed[verifier],
            examples=examples[: self.suite.report.shown],
        )


def refuse_faults(suite: VerifierSuite, findings: Sequence[Finding]) -> None:
    """Checks the findings against ``fail_above``.

    Raises:
        CheckFailed: with a line for each cheat that earns more, and each right answer that loses more.
    """
    if suite.fail_above is None:
        return
    lines = []
    for finding in (finding for finding in findings if finding.fault() > suite.fail_above):
        what = f"a right answer ({finding.name}) earns" if finding.right else f"the cheat {finding.name!r} earns"
        lines.append(f"verifier {finding.verifier!r}: {what} {finding.earned:.3f} of the full reward")
    if lines:
        raise CheckFailed([*lines, f"audit failed: `fail_above` is {suite.fail_above:g}"])


def print_report(findings: Sequence[Finding], problems: Mapping[str, str]) -> None:
    """Prints a table of cheats, a table of right answers, and examples of what is at fault."""
    console = Console(width=TABLE_WIDTH)
    for right in (False, True):
        chosen = [finding for finding in findings if finding.right == right]
        if chosen:
            headings, rows = table_of(chosen, right=right)
            table = Table(box=None, padding=(0, 2, 0, 0), title=None)
            for index, heading in enumerate(headings):
                table.add_column(heading, justify="right" if index else "left")
            for row in rows:
                table.add_row(*row)
            console.print(table, "", markup=False)
    for line in fault_lines(findings):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for name, problem in problems.items():
        console.print(f"verifier {name!r} {problem}", markup=False, highlight=False, soft_wrap=True)


def table_of(findings: Sequence[Finding], *, right: bool) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of a table: a row for each cheat or form, a column for each verifier."""
    verifiers = list(dict.fromkeys(finding.verifier for finding in findings))
    by_name: dict[str, dict[str, Finding]] = {}
    for finding in findings:
        by_name.setdefault(finding.name, {})[finding.verifier] = finding
    headings = ["right answer: earned" if right else "cheat: earned", "completions", *verifiers]
    rows = []
    for name, of in by_name.items():
        size = max(finding.completions for finding in of.values())
        rows.append([name, f"{size:,}", *(_cell(of.get(verifier)) for verifier in verifiers)])
    return headings, rows


def _cell(finding: Finding | None) -> str:
    if finding is None:
        return ""
    earned = "-" if finding.earned is None else f"{finding.earned:.3f}"
    failed = f" ({finding.failed:,} failed)" if finding.failed else ""
    return f"{earned}{failed}" if finding.required else f"[{earned}]{failed}"


def fault_lines(findings: Sequence[Finding]) -> list[str]:
    """A line for each verifier and cheat that it pays for, or right answer that it does not, with an example."""
    lines = []
    for finding in (finding for finding in findings if finding.fault() > 0 and finding.examples):
        example, verb = finding.examples[0], "pays" if not finding.right else "pays only"
        what = f"{finding.name} ({example.place})"
        lines.append(f"{finding.verifier} {verb} {example.value:g} for {what}: {shown(example.text)}")
    return lines


def shown(text: str) -> str:
    """A completion on one line, without the middle of a long one."""
    short = text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN // 2]} ... {text[-LONGEST_SHOWN // 2 :]}"
    return repr(short)


def write_report(suite: VerifierSuite, findings: Sequence[Finding], problems: Mapping[str, str], cases: int) -> None:
    """Writes ``metrics.json`` and ``index.html`` into the report's folder."""
    suite.folder.mkdir(parents=True, exist_ok=True)
    plain = [dataclasses.asdict(finding) for finding in findings]
    report = {"date": datetime.date.today().isoformat(), "versions": versions(), "problems": cases, "findings": plain}
    write_metrics(suite.folder, report)
    body = []
    for right, title in ((False, "Cheats"), (True, "Right answers")):
        chosen = [finding for finding in findings if finding.right == right]
        if chosen:
            headings, rows = table_of(chosen, right=right)
            body += [f"<h2>{title}</h2>", html_table(headings, rows, words=1)]
    at_fault = [finding for finding in findings if finding.fault() > 0]
    if at_fault:
        body.append("<h2>Examples</h2>")
    for finding in at_fault:
        rows = [[f"{example.value:g}", example.place, shown(example.text)] for example in finding.examples]
        kind = "right answer" if finding.right else "cheat"
        body += [
            f"<p>{html.escape(finding.verifier)}, {kind}: {html.escape(finding.name)}</p>",
            html_table(["value", "row", "completion"], rows, words=3),
        ]
    body += [f"<p class=note>{html.escape(f'verifier {name!r} {text}')}</p>" for name, text in problems.items()]
    notes = [f"{cases} problems of {suite.data.path}", *NOTES]
    page = document(f"Audit of verifiers: {suite.name}", notes, body, suite.settings)
    (suite.folder / "index.html").write_text(page, encoding="utf-8")
