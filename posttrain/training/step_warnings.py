"""Warnings about steps that teach nothing or little, in plain English, made of the metrics of the step alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from posttrain.training.recipe import Recipe

MOSTLY = 0.5  # share of truncated completions above which a step is warned of
IN_A_ROW = 5  # number of consecutive steps after which a warning is given a second time


class StepWarnings:
    """Says what is wrong with a step: once for each kind, once more if it lasts, and counts at the end.

    Args:
        recipe: the recipe that is run.
        say: function that shows a line to the person who watches.
    """

    def __init__(self, recipe: Recipe, say: Callable[[str], None]) -> None:
        self._recipe, self._say = recipe, say
        self._steps = 0
        self._counts: dict[str, int] = {}  # number of steps by kind
        self._in_a_row: dict[str, int] = {}

    def look(self, step: int, metrics: Mapping[str, float]) -> None:
        """Looks at the metrics of a step that has ended."""
        self._steps += 1
        found = dict(problems(self._recipe, metrics))
        self._in_a_row = {kind: self._in_a_row.get(kind, 0) + 1 for kind in found}
        for kind, message in found.items():
            self._counts[kind] = self._counts.get(kind, 0) + 1
            if self._counts[kind] == 1:
                self._say(f"warning, step {step}: {message}")
            elif self._in_a_row[kind] == IN_A_ROW:
                self._say(f"warning, steps {step - IN_A_ROW + 1} to {step}, {IN_A_ROW} in a row: {message}")

    def summarise(self) -> None:
        """Says how many steps each warning was true of."""
        for kind, count in self._counts.items():
            self._say(f"warning: {kind} in {count} of {self._steps} steps")


def problems(recipe: Recipe, metrics: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Yields what is wrong with a step: its kind in a few words, and a message with numbers and what to do."""
    if recipe.examples is None:
        yield from _sampling_problems(recipe, metrics)
    for name, model in (("", "the policy"), ("value/", "the value model")):
        waits = not name and metrics.get("policy/waits", 0) > 0
        if waits or f"{name}grad_norm" not in metrics:
            continue
        if metrics[f"{name}learning_rate"] == 0:
            key = "value.optimizer" if name else "optimizer"
            yield (
                f"the learning rate of {model} was 0",
                f"the learning rate of {model} is 0, so its weights do not change: look at `{key}.learning_rate`, "
                "`schedule` and `warmup_steps`, and at `steps`",
            )
        if metrics[f"{name}grad_norm"] == 0 and not metrics.get("skipped") and not _all_advantages_zero(metrics):
            yield (
                f"the gradient of {model} was 0",
                f"the gradient of {model} is exactly 0, so it learns nothing from this step. Look at the loss terms, "
                "at the rewards or labels in the step's rollouts, and at `keep`, which may leave out all completions",
            )
    if metrics.get("skipped"):
        yield (
            "the loss or a gradient was not finite",
            f"the loss or a gradient is not finite in {metrics['skipped']:.0f} optimiser steps, which are left out. "
            "Try a lower `optimizer.learning_rate`, float32, or look at the rewards in the step's rollouts",
        )


def _sampling_problems(recipe: Recipe, metrics: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    score = metrics.get("score/mean", float("nan"))
    if metrics.get("unscored") == 1:
        yield (
            "no completion had a score",
            "no verifier applies to any completion, so there is nothing to learn from. Look at the columns that the "
            "verifiers read, and at `on_error: skip`",
        )
    elif _all_advantages_zero(metrics) and metrics.get("groups/equal") == 1:
        yield (
            "all completions of each prompt had the same score",
            f"all completions of each prompt got the same score (mean {score:.3f}), so every advantage is 0 and the "
            "policy learns nothing. Take problems that the policy solves sometimes, sample more `completions` of a "
            "prompt, check in the rollouts that the verifier recognises right answers, or let `select: [{use: "
            "mixed_groups}]` draw further prompts",
        )
    elif _all_advantages_zero(metrics):
        yield (
            "every advantage was 0",
            "every advantage is 0, so the policy learns nothing. Look at the rewards in the step's rollouts, and at "
            "`advantage` and `shape`",
        )
    elif metrics.get("score/std") == 0 and recipe.verify:
        yield (
            "every completion had the same score",
            f"every completion got the score {score:.3f}, so the verifiers tell no completion from another. Check in "
            "the rollouts that they recognise right answers, and take problems of another difficulty",
        )
    yield from _length_and_number_problems(recipe, metrics)


def _length_and_number_problems(recipe: Recipe, metrics: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    limits = {"truncated": ("sampling.max_tokens", recipe.sampling.max_tokens)}
    if recipe.evaluate is not None:
        limits["eval/truncated"] = ("evaluate.sampling.max_tokens", recipe.evaluate.sampling.max_tokens)
    for name, (key, limit) in limits.items():
        if metrics.get(name, 0) > MOSTLY:
            where = " of the evaluation" if name != "truncated" else ""
            yield (
                f"most completions{where} were cut off",
                f"{metrics[name]:.0%} of the completions{where} were cut off at `{key}: {limit}`, before the policy "
                "had ended, so verifiers read unfinished answers. Raise the limit, ask for shorter answers "
                "(`data.system`), or check that the policy ends its turns with the end token of its tokenizer",
            )
    if missing := metrics.get("prompts/missing"):
        asked = recipe.prompts_per_step
        yield (
            "too few prompts passed `select`",
            f"only {asked - missing:.0f} of {asked} prompts are learned from: no more passed `select` of "
            f"{metrics['prompts/drawn']:.0f} drawn in {metrics['prompts/rounds']:.0f} rounds. Raise `max_refills`, "
            "take problems of another difficulty, or stop here with `short_steps: error`",
        )


def _all_advantages_zero(metrics: Mapping[str, float]) -> bool:
    return metrics.get("advantage/zero") == 1
