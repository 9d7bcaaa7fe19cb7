"""Tree search: one loop and five plug points: propose, select, evaluate, back up, decide.

* best-first: ``best_first``; Q*'s A*: with ``a_star_key`` and a process score; BFS-Prover: with ``path_key``
* beam search over steps: ``beam``; depth-first search with pruning: ``depth_first``
* MCTS: ``puct`` or ``uct`` with the backup ``average``. With ``act`` it moves after every ``simulations`` and keeps the
  subtree (MCTS-α of TS-LLM); without, it goes on from the root until there are enough ``paths`` or tokens (rollout);
  with ``to_end`` every simulation walks down to an ending before it is backed up

All searches of all prompts run in lockstep: the nodes that they want expanded are expanded in one call of the engine
and scored in one call of the score.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Generator, Hashable, Sequence
from typing import Annotated, Any

from torch import Tensor

from posttrain.decoding.base import Decoder
from posttrain.decoding.context import NotInRecipes, Separator
from posttrain.decoding.nodes import BackupRule, Decide, Node, OptionalDecide, Select, Tree, average, best_ending
from posttrain.decoding.particles import rule_of
from posttrain.decoding.prefixes import OptionalScore, Prefix, ScoreOption, continue_prefixes, grown
from posttrain.engines.base import Completion, Engine, OnCompletion, Row, Sampling, ShapingEngine
from posttrain.engines.choice import MakeChooser, seeded_chooser
from posttrain.errors import RecipeError
from posttrain.option_types import Count, Inner, PositiveCount
from posttrain.seeds import CHOICES, FreshSeeds, derived_seed, sample_seed

Propose = Annotated[
    Callable[[Engine, Sequence[Prefix], Sampling, Sequence[int]], list[list[tuple[Prefix, Completion]]]],
    Inner("posttrain.decoding.tree", ("engine", "prefixes", "sampling", "seeds")),
]
"""A rule that continues each prefix by one step. Returns prefixes and continuations; there is one seed a prefix."""


def sampled_steps(
    engine: Engine,
    prefixes: Sequence[Prefix],
    sampling: Sampling,
    seeds: Sequence[int],
    *,
    width: int = 4,
    tokens: int | None = None,
    ends: Sequence[int] = (),
) -> list[list[tuple[Prefix, Completion]]]:
    """Samples ``width`` steps from each prefix.

    Args:
        tokens: most tokens of a step.
        ends: tokens that end a step, such as that of a line break.
    """
    continued = continue_prefixes(engine, prefixes, sampling, width, seeds, block=tokens, ends=ends)
    return [
        [(grown(prefix, completion, sampling, ends), completion) for completion in own]
        for prefix, own in zip(prefixes, continued, strict=True)
    ]


def top_tokens(
    engine: ShapingEngine, prefixes: Sequence[Prefix], sampling: Sampling, seeds: Sequence[int], *, k: int = 4
) -> list[list[tuple[Prefix, Completion]]]:
    """The ``k`` most probable next tokens of each prefix, most probable first."""
    distributions: dict[tuple[int, int], tuple[int, float]] = {}

    def force(logps: Tensor, rows: Sequence[Row]) -> Tensor:
        """Forces sample j of a prefix to its j-th best token; the engine decides which tokens end a completion."""
        best = logps.topk(k, -1)
        forced = logps.new_full(logps.shape, -math.inf)
        for index, row in enumerate(rows):
            token = int(best.indices[index, row.sample])
            distributions[row.prompt, row.sample] = token, float(best.values[index, row.sample])
            forced[index, token] = 0.0
        return forced

    one = dataclasses.replace(sampling, max_tokens=1)
    outputs = engine.generate([prefix.tokens for prefix in prefixes], one, k, seeds=seeds, shaper=force)
    found = []
    for i, (prefix, completions) in enumerate(zip(prefixes, outputs, strict=True)):
        known = [dataclasses.replace(c, logps=[distributions[i, j][1]]) for j, c in enumerate(completions)]
        found.append([(grown(prefix, completion, sampling, ()), completion) for completion in known])
    return found


class TreeSearch(Decoder):
    """Tree search over steps: propose, select, evaluate, back up, decide. One search makes one completion.

    Log-probs of its completions are those of the engine's own distribution: a search samples from no distribution with
    log-probs. ``measured`` holds ``generated`` and ``scored``. If the chosen node has not ended, the engine completes
    it.

    Args:
        engine: proposes steps.
        score: scores prefixes: the value of a node.
        select: chooses the nodes that are expanded next.
        propose: makes the steps from a node.
        separator: tokens that end a step, for a ``propose`` that takes ``ends``; in a recipe the text that they end
            with, such as a line break.
        backup: changes the statistics on the path of a simulation.
        decide: chooses the answer.
        act: the move after ``simulations``, from which the search continues with the subtree; default: no moves.
        simulations: number of rounds of select and backup, for each move if there are moves.
        paths: number of endings at which the search is over.
        tokens: number of generated tokens at which the search is over.
        delay: visits before a node is expanded, except the current node: generation is expensive.
        to_end: let each simulation continue until it reaches an ending.
        final_score: scores completions that have ended; default: ``score``.
        process: process reward of a step, read at the prefix that ends with it; for ``a_star_key``.
        key: steps of a node with equal keys are one child: equal tokens by default, equal actions, equal texts.
        make_chooser: makes the random decisions.
        seed: seed of the seeds that are drawn if ``generate`` is given none.

    Raises:
        RecipeError: for a separator with a ``propose`` that does not take ``ends``.
    """

    def __init__(
        self,
        engine: Engine,
        score: ScoreOption,
        *,
        select: Select,
        propose: Propose = sampled_steps,
        separator: Separator = (),
        backup: BackupRule = average,
        decide: Decide = best_ending,
        act: OptionalDecide = None,
        simulations: PositiveCount = 100,
        paths: PositiveCount | None = None,
        tokens: PositiveCount | None = None,
        delay: Count = 0,
        to_end: bool = False,
        final_score: OptionalScore = None,
        process: OptionalScore = None,
        key: NotInRecipes[Callable[[Sequence[int]], Hashable]] = tuple,
        make_chooser: NotInRecipes[MakeChooser] = seeded_chooser,
        seed: NotInRecipes[int] = 0,
    ) -> None:
        self.engine, self.score, self.final_score, self.process = engine, score, final_score, process
        self.select, self.backup, self.decide, self.act = select, backup, decide, act
        self.propose = _with_ends(propose, separator) if separator else propose
        self.simulations, self.paths, self.tokens = simulations, paths, tokens
        self.delay, self.to_end, self.key = delay, to_end, key
        self.make_chooser = make_chooser
        self._fresh_seeds = FreshSeeds(seed)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        n: int = 1,
        *,
        seeds: Sequence[int] | None = None,
        on_completion: OnCompletion | None = None,
    ) -> list[list[Completion]]:
        """See :meth:`posttrain.engines.base.Engine.generate`: one search for each completion."""
        trees = self.search(prompts, sampling, n, seeds=seeds)
        chosen = [(tree, self.decide(tree)) for group in trees for tree in group]
        unfinished = [(tree, node) for tree, node in chosen if not node.ended]
        rest = continue_prefixes(
            self.engine,
            [node.prefix for _, node in unfinished],
            sampling,
            1,
            [derived_seed(tree.seed, tree.expansions + 1) for tree, _ in unfinished],
        )
        ends = {id(tree): completion for (tree, _), (completion,) in zip(unfinished, rest, strict=True)}
        done = [_completion(tree, node, ends.get(id(tree)), sampling) for tree, node in chosen]
        grouped = [done[i * n : (i + 1) * n] for i in range(len(prompts))]
        if on_completion is not None:
            for i, group in enumerate(grouped):
                for j, completion in enumerate(group):
                    on_completion(i, j, completion)
        return grouped

    def search(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        n: int = 1,
        *,
        seeds: Sequence[int] | None = None,
    ) -> list[list[Tree]]:
        """The trees of ``n`` searches of each prompt."""
        seeds = self._fresh_seeds.unless(seeds, len(prompts))
        trees = [
            [self._tree(prompt, sample_seed(seed, j)) for j in range(n)]
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        flat = [tree for group in trees for tree in group]
        self._evaluate([(tree, tree.root) for tree in flat])
        # Control is inverted: each search is a generator that stops where it wants nodes expanded. So the nodes of all
        # searches are expanded by one call of the engine, and then every search goes on until it wants nodes again.
        waiting = _advance_all([(tree, self._search(tree)) for tree in flat])
        while waiting:
            self._expand([(tree, node) for tree, _, nodes in waiting for node in nodes], sampling)
            waiting = _advance_all([(tree, search) for tree, search, _ in waiting])
        return trees

    def _tree(self, prompt: Sequence[int], seed: int) -> Tree:
        root = Node(prefix=Prefix(tokens=list(prompt), start=len(prompt)), version=self.version)
        return Tree(root=root, seed=seed, choose=self.make_chooser(sample_seed(seed, CHOICES)))

    def _search(self, tree: Tree) -> Search:
        """The loop of one search; yields the nodes that it wants expanded before it goes on."""
        while True:
            for _ in range(self.simulations):
                leaves = yield from self._simulation(tree)
                for leaf in leaves:
                    self.backup(leaf)
                    tree.reach(leaf)
                if not leaves or self._out_of_budget(tree):
                    break
            if self.act is None or not tree.current.expanded:
                return
            tree.current = self.act(tree)
            if tree.current.ended:
                return

    def _simulation(self, tree: Tree) -> Generator[list[Node], None, list[Node]]:
        while True:
            leaves = self.select(tree)
            unexpanded = [leaf for leaf in leaves if not leaf.ended and self._should_expand(tree, leaf)]
            if unexpanded:
                yield unexpanded
            if not self.to_end or all(leaf.ended for leaf in leaves):
                return leaves

    def _should_expand(self, tree: Tree, leaf: Node) -> bool:
        return self.to_end or leaf is tree.current or leaf.visits >= self.delay

    def _out_of_budget(self, tree: Tree) -> bool:
        enough = self.paths is not None and len(tree.paths) >= self.paths
        return enough or (self.tokens is not None and tree.generated >= self.tokens)

    def _expand(self, wanted: Sequence[tuple[Tree, Node]], sampling: Sampling) -> None:
        """Gives each node its children, in one call of the engine and one of the score."""
        seeds, born = [], []
        for tree, node in wanted:
            tree.expansions += 1
            tree.frontier.pop(node, None)
            born.append(tree.expansions)
            seeds.append(derived_seed(tree.seed, tree.expansions))
        proposed = self.propose(self.engine, [node.prefix for _, node in wanted], sampling, seeds)
        children: list[tuple[Tree, Node]] = []
        for (tree, node), steps, number in zip(wanted, proposed, born, strict=True):
            distinct = {self.key(completion.tokens): (prefix, completion) for prefix, completion in reversed(steps)}
            kept = list(distinct.values())[::-1]
            priors = _priors([completion for _, completion in kept])
            for (prefix, completion), prior in zip(kept, priors, strict=True):
                child = Node(prefix, completion.version, node, node.depth + 1, number, prior=prior)
                node.children.append(child)
                tree.frontier[child] = None
                children.append((tree, child))
            tree.generated += sum(len(completion.tokens) for _, completion in steps)
        self._evaluate(children)

    def _evaluate(self, children: Sequence[tuple[Tree, Node]]) -> None:
        """Computes the values and process rewards of new nodes."""
        final = self.final_score or self.score
        for score, ended in ((self.score, False), (final, True)):
            members = [node for _, node in children if node.ended is ended]
            if members:
                for node, value in zip(members, score.score([one.prefix for one in members]).tolist(), strict=True):
                    node.value = value
        if self.process is not None and children:
            rewards = self.process.score([node.prefix for _, node in children]).tolist()
            for (_, node), reward in zip(children, rewards, strict=True):
                node.reward = reward
        for tree, _ in children:
            tree.scored += 1 if self.process is None else 2


Search = Generator[list[Node], None, None]


def _with_ends(propose: Propose, ends: Sequence[int]) -> Propose:
    """Binds the tokens that end a step to the rule."""
    target = rule_of(propose)
    if "ends" not in inspect.signature(target).parameters:
        raise RecipeError(f"decoder.separator: the steps of {target.__name__} do not end with a text; leave it out")
    rule: Callable[..., Any] = propose
    return functools.partial(rule, ends=tuple(ends))


def _advance_all(searches: Sequence[tuple[Tree, Search]]) -> list[tuple[Tree, Search, list[Node]]]:
    """Lets each search go on until it wants nodes expanded. Searches that are over drop out."""
    waiting = []
    for tree, search in searches:
        nodes = next(search, None)
        if nodes is not None:
            waiting.append((tree, search, nodes))
    return waiting


def _priors(steps: Sequence[Completion]) -> list[float]:
    """Priors proportional to exp(mean log-prob of the step's tokens), summing to 1 (TS-LLM, its code)."""
    means = [math.exp(sum(step.logps) / len(step.logps)) for step in steps]
    return [mean / sum(means) for mean in means]


def _completion(tree: Tree, node: Node, rest: Completion | None, sampling: Sampling) -> Completion:
    prefix = node.prefix if rest is None else grown(node.prefix, rest, sampling, ())
    generated = tree.generated + (0 if rest is None else len(rest.tokens))
    measured = {"generated": float(generated), "scored": float(tree.scored)}
    assert prefix.finish is not None
    return Completion(list(prefix.generated), list(prefix.logps), prefix.finish, node.version, measured)
