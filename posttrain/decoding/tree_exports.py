"""Exports of a finished search: value targets, demonstrations, preference pairs, and a drawing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from posttrain.decoding.nodes import Node, Tree
from posttrain.parts.targets import Backup, backup


class ValueTarget(NamedTuple):
    """A prefix with the value that a value model should learn."""

    tokens: Sequence[int]  # prompt and beginning of a completion
    start: int  # length of the prompt
    target: float


class PathExample(NamedTuple):
    """A completion to imitate."""

    prompt: Sequence[int]
    completion: Sequence[int]
    value: float


class PreferencePair(NamedTuple):
    """A better and a worse step from the same prefix."""

    prefix: Sequence[int]  # prompt and beginning of a completion
    start: int  # length of the prompt
    chosen: Sequence[int]
    rejected: Sequence[int]
    margin: float  # by how much the chosen one's value is larger


def value_targets(tree: Tree, *, kind: Backup = "mean", beta: float = 1.0) -> list[ValueTarget]:
    """Value targets of all nodes: the backup of their children's targets by their priors; leaves keep their values.

    mean: Feng et al. 2023 (TS-LLM), arXiv:2309.17179; max: Wang et al. 2024 (Q*), arXiv:2406.14283;
    soft: β log Σ p exp(v / β).
    """
    targets = backed_up_values(tree, kind=kind, beta=beta)
    return [ValueTarget(node.prefix.tokens, node.prefix.start, targets[node]) for node in tree.root.below()]


def backed_up_values(tree: Tree, *, kind: Backup, beta: float = 1.0) -> dict[Node, float]:
    """The value of every node by backing up from the leaves, children before parents."""
    values: dict[Node, float] = {}
    for node in reversed(list(tree.root.below())):
        if node.expanded:
            following = torch.tensor([values[child] for child in node.children], dtype=torch.float64)
            priors = torch.tensor([child.prior for child in node.children], dtype=torch.float64)
            values[node] = float(backup(following, priors.log(), kind=kind, beta=beta))
        else:
            values[node] = node.value
    return values


def best_paths(trees: Iterable[Tree], *, count: int, at_least: float = float("-inf")) -> list[PathExample]:
    """The ``count`` distinct completions of highest value of each tree, for supervised fine-tuning."""
    examples = []
    for tree in trees:
        distinct: dict[tuple[int, ...], Node] = {}
        for node in sorted(tree.endings(), key=lambda node: -node.value):
            if node.value >= at_least:
                distinct.setdefault(tuple(node.prefix.generated), node)
        prompt = tree.root.prefix.tokens
        examples += [PathExample(prompt, node.prefix.generated, node.value) for node in list(distinct.values())[:count]]
    return examples


def preference_pairs(tree: Tree, *, margin: float = 0.0) -> list[PreferencePair]:
    """Pairs of the best and the worst step at every node with several children.

    A step counts as what the best ending below it is worth; where none was found, as its value.

    Args:
        margin: pairs that differ by no more are left out.
    """
    worth = backed_up_values(tree, kind="max")
    pairs = []
    for node in tree.root.below():
        if len(node.children) < 2:
            continue
        chosen = max(node.children, key=lambda child: worth[child])
        rejected = min(node.children, key=lambda child: worth[child])
        difference = worth[chosen] - worth[rejected]
        if difference > margin:
            prefix = node.prefix
            pairs.append(PreferencePair(prefix.tokens, prefix.start, chosen.step, rejected.step, difference))
    return pairs


def dot(tree: Tree, decode: Callable[[Sequence[int]], str], *, longest: int = 40) -> str:
    """The tree in Graphviz's language: `dot -Tsvg`. Steps as text, value, visits and Q; endings have a double border.

    Args:
        decode: token ids to text.
        longest: characters of a step that are shown.
    """
    numbers = {node: number for number, node in enumerate(tree.root.below())}
    lines = ["digraph search {", "  node [shape=box, fontname=monospace];"]
    for node, number in numbers.items():
        text = decode(node.step)
        shown = text if len(text) <= longest else text[: longest - 1] + "…"
        facts = f"value {node.value:.3g}" + (f", {node.visits} visits, Q {node.q:.3g}" if node.visits else "")
        border = ", peripheries=2" if node.ended else ""
        lines.append(f"  n{number} [label={_quoted(shown, facts)}{border}];")
        if node.parent is not None:
            lines.append(f'  n{numbers[node.parent]} -> n{number} [label="{node.prior:.2f}"];')
    return "\n".join([*lines, "}"]) + "\n"


def _quoted(*rows: str) -> str:
    escaped = [row.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\\\n") for row in rows]
    return '"' + "\\n".join(escaped) + '"'
