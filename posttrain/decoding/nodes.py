"""Search trees: nodes, and the rules that select, back up and decide.

A select is ``tree -> nodes`` to expand or, where they have ended, to back up; none ends the search. A backup is
``leaf -> None`` and changes the statistics on the leaf's path. An act and a decide are ``tree -> node``.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from posttrain.decoding.particles import most_voted
from posttrain.decoding.prefixes import Prefix
from posttrain.engines.choice import Chooser
from posttrain.option_types import Inner


@dataclass(slots=True, eq=False)
class Node:
    """A prefix in a tree: the parent's prefix and one more step."""

    prefix: Prefix
    version: int
    parent: Node | None = None
    depth: int = 0  # steps
    born: int = 0  # how many expansions had been made
    value: float = 0.0  # the score of the prefix
    reward: float = 0.0  # process reward of the last step
    prior: float = 1.0  # among its siblings
    visits: int = 0
    q: float = 0.0  # what was backed up, in the view of whoever chose this node
    children: list[Node] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return self.prefix.finish is not None

    @property
    def expanded(self) -> bool:
        return bool(self.children)

    @property
    def step(self) -> Sequence[int]:
        """The tokens of the last step."""
        return self.prefix.tokens[0 if self.parent is None else len(self.parent.prefix.tokens) :]

    def path(self) -> list[Node]:
        """The nodes from the root to this one."""
        nodes, node = [], self
        while node is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def below(self) -> Iterator[Node]:
        """This node and all its descendants, parents first."""
        yield self
        for child in self.children:
            yield from child.below()


@dataclass(slots=True, eq=False)
class Tree:
    """The tree and state of one search."""

    root: Node
    seed: int
    choose: Chooser
    current: Node = field(init=False)  # where simulations start: moves bring it forward
    frontier: dict[Node, None] = field(default_factory=dict)  # neither expanded nor given up nor reached, oldest first
    paths: list[Node] = field(default_factory=list)  # ended nodes that the search has reached, in that order
    expansions: int = 0
    generated: int = 0  # tokens
    scored: int = 0  # prefixes

    def __post_init__(self) -> None:
        self.current = self.root
        self.frontier[self.root] = None

    def reach(self, node: Node) -> None:
        """Records that the search has reached the end of a path."""
        if node.ended and node not in self.paths:
            self.paths.append(node)
            self.frontier.pop(node, None)

    def endings(self) -> list[Node]:
        """All ended nodes, whether the search has reached them or not."""
        return [node for node in self.root.below() if node.ended]


Select = Annotated[Callable[[Tree], list[Node]], Inner("posttrain.decoding.nodes", ("tree",))]
"""A rule that chooses the nodes to expand next."""
BackupRule = Annotated[Callable[[Node], None], Inner("posttrain.decoding.nodes", ("leaf",))]
"""A rule that changes the statistics on the path of a leaf."""
Decide = Annotated[Callable[[Tree], Node], Inner("posttrain.decoding.nodes", ("tree",))]
"""A rule that chooses the answer, or the next move."""
OptionalDecide = Annotated[Callable[[Tree], Node] | None, Inner("posttrain.decoding.nodes", ("tree",))]
Key = Annotated[Callable[[Node], float], Inner("posttrain.decoding.nodes", ("node",))]


# -------------------------------------------------------------------------------------------------------------- keys


def value_key(node: Node) -> float:
    """The score of the prefix."""
    return node.value


def path_key(node: Node, *, alpha: float = 0.5) -> float:
    """Length-normalised log-prob of the path: Σ log p / L^α over its tokens, with L steps.

    Xin et al. 2025 (BFS-Prover), arXiv:2502.03438. α = 0 explores what is short first; with α > 0 it is
    not monotone along a path.
    """
    return sum(node.prefix.logps) / max(node.depth, 1) ** alpha


def a_star_key(node: Node, *, weight: float = 1.0, aggregate: Literal["min", "max", "sum", "last"] = "min") -> float:
    """Q*'s A* key f = g + weight · h: g aggregates the process rewards of the path's steps, h is the value.

    Wang et al. 2024 (Q*), arXiv:2406.14283. With an h that is never below the true return the first path reached
    is the best one; learned values promise nothing.
    """
    rewards = [step.reward for step in node.path()[1:]] or [0.0]
    g = {"min": min, "max": max, "sum": sum, "last": lambda own: own[-1]}[aggregate](rewards)
    return g + weight * node.value


# ------------------------------------------------------------------------------------------------------------ select


def best_first(tree: Tree, *, key: Key = value_key, count: int = 1) -> list[Node]:
    """The unexpanded node with the highest key anywhere in the tree; the oldest of several."""
    return heapq.nlargest(count, tree.frontier, key=key)


def beam(tree: Tree, *, key: Key = value_key, width: int = 4) -> list[Node]:
    """The ``width`` nodes with the highest keys, ended nodes included; the rest is dropped.

    BFS-V of TS-LLM (Feng et al. 2023, arXiv:2309.17179) with values; Tree of Thoughts (Yao et al. 2023,
    arXiv:2305.10601).
    """
    kept = best_first(tree, key=key, count=width)
    ended = [node for node in kept if node.ended]
    tree.frontier = dict.fromkeys(kept)
    if len(ended) == len(kept):
        return ended
    return [node for node in kept if not node.ended]


def depth_first(tree: Tree, *, threshold: float | None = None, drop: float = 0.0) -> list[Node]:
    """The child with the highest value of the node expanded last; goes back up if no child is left.

    DFS-V of TS-LLM (Feng et al. 2023, arXiv:2309.17179).

    Args:
        threshold: nodes of lower value are given up. Default: none are.
        drop: share of siblings, those of lowest value, that is given up.
    """
    allowed = [
        node for node in tree.frontier if (threshold is None or node.value >= threshold) and not _dropped(node, drop)
    ]
    return sorted(allowed, key=lambda node: (-node.born, -node.value))[:1]


def _dropped(node: Node, drop: float) -> bool:
    if node.parent is None:
        return False
    siblings = sorted(node.parent.children, key=lambda one: -one.value)
    return siblings.index(node) >= math.ceil((1 - drop) * len(siblings))


def puct(tree: Tree, *, c_init: float = 3.0, c_base: float = 19652.0, uniform: float = 0.0) -> list[Node]:
    """Walks from the current node down to a leaf by the highest

        Q + P · (log((N + c_base + 1) / c_base) + c_init) · √N / (1 + n)

    with N visits of the parent, n of the child; Q of a child without visits is its value. Silver et al. 2018
    (AlphaZero), doi:10.1126/science.aar6404; with these constants Feng et al. 2023 (TS-LLM), arXiv:2309.17179.

    Args:
        uniform: share of a uniform distribution in the priors where the search stands.
    """

    def bound(parent: Node, child: Node) -> float:
        share = uniform if parent is tree.current else 0.0
        prior = (1 - share) * child.prior + share / len(parent.children)
        weight = math.log((parent.visits + c_base + 1) / c_base) + c_init
        return _estimate(child) + prior * weight * math.sqrt(parent.visits) / (1 + child.visits)

    return [_descend(tree.current, bound)]


def uct(tree: Tree, *, c: float = 1.0) -> list[Node]:
    """Walks from the current node down to a leaf by the highest Q + c √(2 log N / n); unvisited children come first.

    Kocsis and Szepesvári 2006. Of several such children the one of highest value is first.
    """

    def bound(parent: Node, child: Node) -> float:
        if child.visits == 0:
            return 1e12 + child.value
        return child.q + c * math.sqrt(2 * math.log(parent.visits) / child.visits)

    return [_descend(tree.current, bound)]


def _descend(node: Node, bound: Callable[[Node, Node], float]) -> Node:
    while node.expanded:
        parent = node
        node = max(parent.children, key=lambda child: bound(parent, child))
    return node


def _estimate(node: Node) -> float:
    return node.q if node.visits else node.value


# ------------------------------------------------------------------------------------------------------------ backup


def average(leaf: Node, *, sign: int = 1) -> None:
    """Sets Q of each node of the path to the mean of the leaf values that passed through it.

    Args:
        sign: -1 where two players take turns (negamax): what is good for one is bad for the other.
    """
    value, node = leaf.value, leaf
    while node is not None:
        node.visits += 1
        node.q += (value - node.q) / node.visits
        value, node = sign * value, node.parent


def maximum(leaf: Node, *, sign: int = 1) -> None:
    """Sets Q of each node of the path to its children's best Q, of a leaf to its value; biased up by noisy values."""
    node = leaf
    while node is not None:
        node.visits += 1
        node.q = sign * max(map(_estimate, node.children)) if node.expanded else node.value
        node = node.parent


# ------------------------------------------------------------------------------------------------------ act and decide


def most_visited(tree: Tree, *, temperature: float = 0.0) -> Node:
    """The move: the child with most visits, or one drawn with probability proportional to visits^(1 / temperature)."""
    children = tree.current.children
    if temperature == 0:
        return max(children, key=lambda child: (child.visits, _estimate(child)))
    largest = max(child.visits for child in children) or 1
    powers = [(child.visits / largest) ** (1 / temperature) for child in children]
    return children[tree.choose([power / sum(powers) for power in powers])]


def best_ending(tree: Tree) -> Node:
    """The ended node with the highest value; if none has ended, the unexpanded node with the highest value."""
    nodes = tree.endings() or [node for node in tree.root.below() if not node.expanded]
    return max(nodes, key=value_key)


def reached_first(tree: Tree) -> Node:
    """The first ended node that the search reached, or else :func:`best_ending`."""
    return tree.paths[0] if tree.paths else best_ending(tree)


def where_moves_led(tree: Tree) -> Node:
    """The node at which the moves of the search have arrived."""
    return tree.current


def voted(
    tree: Tree, *, answer: Callable[[Sequence[int]], Hashable], by: Literal["count", "sum", "max"] = "sum"
) -> Node:
    """The ended node that wins a vote among all ended nodes: see :func:`posttrain.decoding.particles.most_voted`.

    Args:
        answer: reads the answer in the generated tokens.
    """
    ended = tree.endings()
    if not ended:
        return best_ending(tree)
    winner = most_voted([answer(node.prefix.generated) for node in ended], [node.value for node in ended], by)
    return max(ended, key=value_key) if winner is None else ended[winner]
