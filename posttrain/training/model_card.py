"""The README.md of a trained model, with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from posttrain.output.tracking import TIMING
from posttrain.recipe.sections import ValueSection
from posttrain.system.versions import versions
from posttrain.training.citations import ARXIV, papers
from posttrain.training.recipe import Recipe

USAGE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```"""

VALUE_USAGE = """```python
from posttrain import load_value

value_model = load_value(".")  # this folder
values, _ = value_model(tokens, states)  # values of the prefixes of tokens [N, L] that end where states [N, L] is true
```

or in a recipe: `value: {model: <this folder>}`. The entry `posttrain` of `config.json` says what the values mean. Plain
transformers reads it as a model for token classification, or a causal language model where the head is per token."""


def write_model_card(
    folder: Path | str,
    recipe: Recipe,
    *,
    before: Mapping[str, float] | None = None,
    after: Mapping[str, float] | None = None,
    steps: int | None = None,
    engine: str = "",
    of_value: bool = False,
) -> Path:
    """Writes ``README.md`` beside a model's weights: what it is, how it was trained, on what, from which papers.

    Args:
        folder: the model's folder.
        recipe: the recipe; its resolved form is printed in full.
        before: evaluation metrics of the model that training started from.
        after: the same metrics of this model.
        steps: optimiser steps done, where not all of the recipe's.
        engine: the engine that sampled, as ``vllm 0.32.0``.
        of_value: the folder holds the run's value model, not its policy.
    """
    cited, facts = papers(recipe, of_value=of_value), _facts(recipe, steps, engine, of_value)
    base = (recipe.value.model if of_value and recipe.value else None) or recipe.policy.model
    body = [
        f"# {recipe.name}",
        f"{'A value model on ' if of_value else ''}{_model_link(base)}, "
        f"trained with posttrain, recipe `{recipe.name}`.",
        *_section("Evaluation", evaluation_table(before or {}, after or {}, of_value=of_value)),
        *_section("Training", "\n".join(f"- {name}: {fact}" for name, fact in facts if fact)),
        *_section("Papers", "\n".join(f"- {line}" for line in cited)),
        *_section("Use", VALUE_USAGE if of_value else USAGE),
        *_section("Recipe", f"```yaml\n{yaml.safe_dump(dict(recipe.resolved), sort_keys=False, width=120)}```"),
        *_section("Versions", ", ".join(f"{name} {version}" for name, version in versions().items())),
    ]
    path = Path(folder) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    library = "peft" if (path.parent / "adapter_config.json").exists() else "transformers"
    path.write_text(
        f"---\n{front_matter(recipe, cited, library, of_value)}\n---\n\n" + "\n\n".join(body) + "\n", encoding="utf-8"
    )
    return path


def front_matter(recipe: Recipe, cited: list[str], library: str, of_value: bool = False) -> str:
    """The YAML block at the top of the card. Local models and datasets are left out: they have no page on the hub."""
    held_out = [recipe.evaluate.data, recipe.evaluate.examples] if recipe.evaluate else []
    data = [recipe.data, *(section for section in held_out if section is not None)]
    names = [section.path for section in data if is_hub_name(section.path)]
    arxiv_ids = [identifier for line in cited for identifier in ARXIV.findall(line)]
    card = ModelCardData(
        base_model=recipe.policy.model if is_hub_name(recipe.policy.model) else None,
        datasets=list(dict.fromkeys(names)) or None,
        library_name=library,
        pipeline_tag="token-classification" if of_value else "text-generation",
        tags=["posttrain", "reinforcement-learning", *(f"arxiv:{name}" for name in dict.fromkeys(arxiv_ids))],
        model_name=recipe.name,
    )
    return card.to_yaml()


def is_hub_name(name: str) -> bool:
    """True if a name can only be one of the hub: it reads ``owner/name``, and no local file has that name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists() and name[0] not in "./"


def evaluation_table(before: Mapping[str, float], after: Mapping[str, float], *, of_value: bool = False) -> str:
    """A Markdown table of the metrics before and after training; empty if there are none.

    Args:
        of_value: the metrics of the value model, whose names start with ``eval/value/``; otherwise all others.
    """
    names = [name for name in dict.fromkeys([*before, *after]) if not name.startswith(TIMING)]
    names = [name for name in names if name.startswith("eval/value/") == of_value]
    if not names:
        return ""

    def cell(metrics: Mapping[str, float], name: str) -> str:
        return f"{metrics[name]:.4g}" if name in metrics else ""

    rows = [f"| {name} | {cell(before, name)} | {cell(after, name)} |" for name in names]
    return "\n".join(["| metric | before | after |", "|---|---:|---:|", *rows])


def _section(title: str, text: str) -> list[str]:
    return [f"## {title}", text] if text else []


def _model_link(name: str) -> str:
    return f"[{name}](https://huggingface.co/{name})" if is_hub_name(name) else f"`{name}`"


def _facts(recipe: Recipe, steps: int | None, engine: str, of_value: bool) -> Iterator[tuple[str, Any]]:
    value = recipe.value or ValueSection()
    optimizer, lora = (value.optimizer, value.lora) if of_value else (recipe.optimizer, recipe.policy.lora)
    yield "data", f"`{recipe.data.path}`, split `{recipe.data.split}`"
    yield "verifiers", ", ".join(f"`{part.name}`" for part in recipe.verify)
    yield "advantage", f"`{recipe.advantage.name}`" if recipe.advantage and not of_value else ""
    yield "target", f"`{recipe.target.name}`" if recipe.target and of_value else ""
    losses = recipe.value_loss if of_value else recipe.loss
    yield "loss", ", ".join(f"{part.coef:g} x `{part.name}`" for part in losses)
    yield "steps", recipe.steps if steps is None else f"{steps} of {recipe.steps}"
    if recipe.examples is None:
        yield "completions a step", f"{recipe.prompts_per_step} prompts x {recipe.completions}"
    else:
        yield "examples", f"`{recipe.examples.name}`, {recipe.prompts_per_step} a step"
    yield "learning rate", f"{optimizer.learning_rate:g}, {optimizer.schedule}"
    yield "weights trained", f"LoRA of rank {lora.rank}" if lora else "all"
    yield "sampled with", engine
