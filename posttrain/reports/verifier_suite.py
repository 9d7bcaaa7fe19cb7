"""The suite ``verifier``: which verifiers are audited, and on which problems; run by ``posttrain eval SUITE``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import ConfigDict, Field, InstanceOf
from pydantic.dataclasses import dataclass

from posttrain.option_types import Count
from posttrain.recipe import sections
from posttrain.recipe.loading import load_as
from posttrain.recipe.part import Checked, Part
from posttrain.recipe.yaml_reader import Location, Overrides


@dataclass(config=sections.CONFIG, kw_only=True, frozen=True)
class VerifierReportSection:
    """The report of an audit."""

    folder: str | None = None
    """Folder of the report. Default: ``reports/<suite's name>``. A report in it is replaced."""
    shown: Count = 3
    """Number of examples of each cheat that the report shows."""


@dataclass(config=ConfigDict(extra="forbid", use_attribute_docstrings=True), frozen=True, kw_only=True)
class VerifierSuite(Checked):
    """Tries completions that must earn nothing on verifiers, and right answers that must earn everything."""

    modules: ClassVar[Mapping[str, str]] = {"verify": "posttrain.verify.functions"}

    suite: Literal["verifier"]
    """Kind of the suite."""
    verify: tuple[InstanceOf[Part], ...]
    data: sections.DataSection
    """Problems, with the columns that the verifiers read."""
    policy: sections.PolicySection | None = None
    """Model whose chat template writes the prompts and whose end tokens are tried; only its tokenizer is loaded."""
    answer: str = "answer"
    """Column with the gold answer. Without it fewer cheats are tried, and no right answers."""
    full: float = Field(default=1.0, gt=0)
    """Value that a verifier gives to a right answer."""
    right: tuple[str, ...] = ()
    """Forms of a right answer, such as ``"The answer is {answer}"``. Default: those that the verifier documents."""
    fail_above: float | None = Field(default=None, ge=0, le=1)
    """Exit with code 1 if a cheat earns more than this share, or a right answer loses more. Default: never."""
    report: VerifierReportSection = field(default_factory=VerifierReportSection)

    name: str = "verifier"
    path: Path | None = None  # path of the YAML file

    def conflicts(self) -> Iterator[tuple[Location, str]]:
        """Yields settings that contradict each other, with their places."""
        if not self.verify:
            yield ("verify",), "is empty: there is no verifier to audit"
        for index, text in enumerate(self.right):
            if "{answer}" not in text:
                yield ("right", index), "does not say where the answer is: write `{answer}` there"

    @property
    def base(self) -> Path | None:
        """The folder that local paths are relative to."""
        return self.path.parent if self.path else None

    @property
    def folder(self) -> Path:
        """Folder that the report is written to."""
        return Path(self.report.folder or Path("reports") / self.name)

    @property
    def settings(self) -> str:
        """The main settings as YAML, for the report."""
        verify = [{"use": part.name, **part.options} for part in self.verify]
        data = {name: getattr(self.data, name) for name in ("path", "split", "limit", "columns")}
        plain: dict[str, Any] = {"suite": self.suite, "verify": verify, "data": data, "answer": self.answer}
        return yaml.safe_dump(plain | {"full": self.full}, sort_keys=False, allow_unicode=True, width=120)


def read_suite(path: str | Path, overrides: Overrides = ()) -> VerifierSuite:
    """Reads the verifier suite in a YAML file.

    Raises:
        RecipeError: one line for each problem, with its place and a suggestion.
    """
    return load_as(VerifierSuite, path, overrides)
