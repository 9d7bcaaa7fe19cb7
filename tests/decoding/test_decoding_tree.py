"""Tree search on an exact world: what each search must find, and in which order it must look."""

from __future__ import annotations

import functools
import math
import re

import pytest
from exact_world import PROMPT, String, World, make_world, table_score
from reference_decoding import beam as beam_by_hand
from reference_decoding import best_first as best_first_by_hand

from posttrain.decoding.nodes import (
    Node,
    Tree,
    a_star_key,
    average,
    beam,
    best_first,
    depth_first,
    maximum,
    most_visited,
    path_key,
    puct,
    reached_first,
    uct,
    voted,
    where_moves_led,
)
from posttrain.decoding.prefixes import Prefix
from posttrain.decoding.tree import TreeSearch, sampled_steps, top_tokens
from posttrain.decoding.tree_exports import best_paths, dot, preference_pairs, value_targets

WORLD = make_world(11, vocabulary=3, length=4)
ENDING = make_world(12, vocabulary=3, length=3, eos=True)
WORLDS = [WORLD, ENDING]
EMPTY = Prefix(tokens=[0], start=1)


def searched(world: World, values, *, k: int | None = None, **options) -> Tree:
    """One search over the ``k`` best tokens of each prefix."""
    propose = functools.partial(top_tokens, k=k or world.vocabulary)
    search = TreeSearch(engine=world.engine(), score=table_score(values), propose=propose, **options)
    return search.search([PROMPT], world.sampling, seeds=[0])[0][0]


def best_string(world: World) -> String:
    return max(world.reward, key=lambda y: world.reward[y])


def at(tree: Tree, *tokens: int) -> Node:
    """The node of a string."""
    return next(node for node in tree.root.below() if tuple(node.prefix.generated) == tokens)


# ----------------------------------------------------------------------------------------------- row 12 of the test bed


@pytest.mark.parametrize("world", WORLDS)
def test_a_star_with_the_true_values_expands_the_best_path_alone(world: World):
    tree = searched(world, world.max_values(), select=functools.partial(best_first, key=a_star_key), paths=1)
    assert [tuple(node.prefix.generated) for node in tree.paths] == [best_string(world)]
    assert tree.expansions == len(best_string(world))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("width", [1, 2, 5])
def test_beams_with_the_true_values_find_the_best_string(world: World, width: int):
    tree = searched(world, world.max_values(), select=functools.partial(beam, width=width))
    assert tuple(max(tree.paths, key=lambda node: node.value).prefix.generated) == best_string(world)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("width", [1, 2, 3])
def test_beams_with_other_values_are_those_of_the_scalar_loop(world: World, width: int):
    values = world.mean_values()
    tree = searched(world, values, select=functools.partial(beam, width=width))
    found = max(tree.paths, key=lambda node: node.value)
    assert tuple(found.prefix.generated) == beam_by_hand(world, values, width)
    assert len(tree.paths) == width


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("world", WORLDS)
def test_best_first_pops_in_the_order_of_the_scalar_loop(world: World, alpha: float):
    select = functools.partial(best_first, key=functools.partial(path_key, alpha=alpha))
    tree = searched(world, world.mean_values(), select=select, simulations=9)
    expanded = sorted((n for n in tree.root.below() if n.expanded), key=lambda n: n.children[0].born)
    popped = [s for s in best_first_by_hand(world, alpha, 9) if not world.ended(s)]
    assert [tuple(node.prefix.generated) for node in expanded] == popped


def test_best_first_by_hand():
    """p(0) = .6, p(1) = .4; after 0 both tokens have .5, after 1 token 0 has .9.

    Log-probs of paths: 0: log .6, 1: log .4, 00 and 01: log .3, 10: log .36. With alpha 0 the order is root, 0, 1; with
    alpha 1 paths of two tokens count half: 10 has -.51 and 00 -.60, but 0 has -.51 (log .6 = -.5108 > log .36 / 2 =
    -.5108 only by rounding), so p(0) is .61 here: root, 0 (-.494), then 00 (log .305 / 2 = -.594) before 1 (-.942).
    """
    logits = {(0,): [math.log(0.61), math.log(0.39)], (0, 0): [0.0, 0.0], (0, 1): [math.log(9), 0.0]}
    logits |= {(0, a, b): [0.0, 0.0] for a in (0, 1) for b in (0, 1)}
    strings = {s for s in make_world(0, vocabulary=2, length=3).prefixes}
    world = World(logits, dict.fromkeys([s for s in strings if len(s) == 3], 0.0), 2, 3)
    orders = {}
    for alpha in (0.0, 1.0):
        select = functools.partial(best_first, key=functools.partial(path_key, alpha=alpha))
        tree = searched(world, dict.fromkeys(strings, 0.0), select=select, simulations=4)
        expanded = sorted((n for n in tree.root.below() if n.expanded), key=lambda n: n.children[0].born)
        orders[alpha] = [tuple(n.prefix.generated) for n in expanded]
    assert orders[0.0] == [(), (0,), (1,), (1, 0)]
    assert orders[1.0] == [(), (0,), (0, 0), (0, 1)]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("select", [functools.partial(puct, c_init=1.0), functools.partial(uct, c=0.5)])
@pytest.mark.parametrize("backup", [average, maximum])
def test_visits_gather_where_the_true_values_are_best(world: World, select, backup):
    tree = searched(world, world.max_values(), select=select, backup=backup, simulations=150)
    found = tree.root
    while found.expanded and found.visits > 5:
        found = max(found.children, key=lambda child: child.visits)
        assert tuple(found.prefix.generated) == best_string(world)[: found.depth]
    assert found.depth == len(best_string(world))


def test_statistics_of_a_simulation_by_hand():
    """Root, expanded at once and backed up with its value 1; then its child of value 5: Q of the root is 3."""
    values = {(): 1.0, (0,): 2.0, (1,): 5.0} | {(a, b): 0.0 for a in (0, 1) for b in (0, 1)}
    world = make_world(0, vocabulary=2, length=2)
    tree = searched(world, values, select=functools.partial(puct, c_init=0.0), simulations=2)
    assert (tree.root.visits, tree.root.q) == (2, 3.0)
    assert (at(tree, 1).visits, at(tree, 1).q) == (1, 5.0)
    assert at(tree, 0).visits == 0 and at(tree, 1, 0).visits == 0
    distribution = world.next_distribution(())
    assert at(tree, 0).prior == pytest.approx(distribution[0])


def test_negamax_over_a_whole_tree_is_minimax():
    values = dict.fromkeys(WORLD.prefixes, 0.0) | dict(WORLD.reward)
    whole = functools.partial(best_first, count=1000)
    tree = searched(WORLD, values, select=whole, backup=lambda leaf: None, simulations=10)
    for leaf in tree.endings():
        maximum(leaf, sign=-1)

    def minimax(string: String, mine: bool) -> float:
        """The first player's payoff; a reward goes to whoever chose the last token."""
        if WORLD.ended(string):
            return -WORLD.reward[string] if mine else WORLD.reward[string]
        return (max if mine else min)(minimax((*string, a), not mine) for a in range(WORLD.vocabulary))

    # the root's Q is in the view of the second player, who would have chosen it
    assert tree.root.q == pytest.approx(-minimax((), True))
    assert len(tree.endings()) == len(WORLD.strings)


def test_negamax_means_change_sign_at_every_step():
    nodes = [Node(prefix=EMPTY, version=0)]
    for _ in range(3):
        nodes.append(Node(prefix=EMPTY, version=0, parent=nodes[-1]))
    nodes[-1].value = 2.0
    average(nodes[-1], sign=-1)
    assert [node.q for node in nodes] == [-2.0, 2.0, -2.0, 2.0]


# ------------------------------------------------------------------------------------------------------- other searches


@pytest.mark.parametrize("world", WORLDS)
def test_depth_first_goes_down_by_value_and_backs_out(world: World):
    values = world.mean_values()
    tree = searched(world, values, select=depth_first, paths=3)

    def walk(string: String):
        if world.ended(string):
            yield string
            return
        for after in sorted(((*string, a) for a in range(world.vocabulary)), key=lambda s: -values[s]):
            yield from walk(after)

    walked = walk(())
    assert [tuple(node.prefix.generated) for node in tree.paths] == [next(walked) for _ in range(3)]


def test_depth_first_gives_up_bad_nodes():
    values = WORLD.mean_values()
    whole = searched(WORLD, values, select=depth_first, simulations=1000)
    assert len(whole.paths) == len(WORLD.strings)
    cut = searched(WORLD, values, select=functools.partial(depth_first, threshold=0.0), simulations=1000)
    passing = [y for y in WORLD.strings if all(values[y[:n]] >= 0 for n in range(0, 5))]
    assert sorted(tuple(node.prefix.generated) for node in cut.paths) == sorted(passing)
    dropped = searched(WORLD, values, select=functools.partial(depth_first, drop=0.5), simulations=1000)
    assert len(dropped.paths) == 2**4  # two of three siblings stay: ceil(.5 * 3)


def test_moves_keep_the_subtree():
    """MCTS-α: after 12 simulations the search moves to the child with most visits, which it has visited before."""
    search = TreeSearch(
        engine=WORLD.engine(),
        score=table_score(WORLD.max_values()),
        propose=functools.partial(top_tokens, k=3),
        select=functools.partial(puct, c_init=1.0),
        act=most_visited,
        decide=where_moves_led,
        simulations=12,
    )
    (tree,) = search.search([PROMPT], WORLD.sampling, seeds=[3])[0]
    assert tuple(tree.current.prefix.generated) == best_string(WORLD)
    first = tree.current.path()[1]
    assert tree.root.visits > 12 and first.visits > 12  # simulations after the first move count for the root's path too
    (completion,) = search.generate([PROMPT], WORLD.sampling, seeds=[3])[0]
    assert tuple(completion.tokens) == best_string(WORLD)
    assert math.exp(sum(completion.logps)) == pytest.approx(WORLD.strings[best_string(WORLD)])


def test_moves_drawn_by_visits():
    root = Node(prefix=EMPTY, version=0)
    root.children = [Node(prefix=EMPTY, version=0, parent=root, visits=visits) for visits in (1, 0, 3)]
    asked = []
    tree = Tree(root=root, seed=0, choose=lambda distribution: asked.append(distribution) or 2)
    assert most_visited(tree, temperature=0.5) is root.children[2]
    assert asked[0] == pytest.approx([0.1, 0.0, 0.9])  # 1 : 0 : 9
    assert most_visited(tree) is root.children[2]


def test_walks_to_the_end_back_up_endings_alone():
    tree = searched(WORLD, WORLD.mean_values(), select=puct, to_end=True, simulations=5, delay=9)
    visited = [node for node in tree.root.below() if node.visits and not node.children]
    assert visited and all(node.ended for node in visited)
    assert tree.root.visits == 5
    mean = sum(node.visits * node.value for node in visited) / 5
    assert tree.root.q == pytest.approx(mean)


def test_rollouts_go_on_until_enough_paths_were_reached():
    tree = searched(WORLD, WORLD.max_values(), select=functools.partial(puct, c_init=1.0), paths=4, simulations=10_000)
    assert len(tree.paths) == 4 and len(set(tree.paths)) == 4


def test_a_budget_of_tokens():
    tree = searched(WORLD, WORLD.mean_values(), select=puct, tokens=20, simulations=10_000)
    assert 20 <= tree.generated < 20 + 3


def test_delayed_expansion_needs_a_second_visit():
    soon = searched(WORLD, WORLD.mean_values(), select=puct, simulations=20)
    late = searched(WORLD, WORLD.mean_values(), select=puct, simulations=20, delay=1)
    assert late.expansions < soon.expansions
    assert all(node.visits >= 2 for node in late.root.below() if node.expanded and node is not late.root)


def test_uniform_shares_of_the_priors_reach_every_child_of_the_root():
    world = make_world(13, vocabulary=3, length=2)
    values = dict.fromkeys(world.prefixes, 0.0)
    tree = searched(world, values, select=functools.partial(puct, uniform=1.0, c_init=5.0), simulations=31)
    assert sorted(child.visits for child in tree.root.children) == [10, 10, 10]


def test_equal_steps_become_one_child():
    search = TreeSearch(
        engine=WORLD.engine(),
        score=table_score(WORLD.mean_values()),
        propose=functools.partial(sampled_steps, width=60, tokens=1),
        select=best_first,
        simulations=1,
    )
    (tree,) = search.search([PROMPT], WORLD.sampling, seeds=[0])[0]
    assert sorted(child.step for child in tree.root.children) == [[0], [1], [2]]
    assert tree.generated == 60
    assert sum(child.prior for child in tree.root.children) == pytest.approx(1.0)
    for child in tree.root.children:
        assert child.prior == pytest.approx(WORLD.next_distribution(())[child.step[0]])


def test_process_rewards_are_aggregated_along_the_path():
    chain = [Node(prefix=EMPTY, version=0)]
    for reward in (0.5, 0.2, 0.9):
        chain.append(Node(prefix=EMPTY, version=0, parent=chain[-1], reward=reward, value=10.0))
    f = {how: a_star_key(chain[-1], weight=0.1, aggregate=how) for how in ("min", "max", "sum", "last")}
    assert f == pytest.approx({"min": 1.2, "max": 1.9, "sum": 2.6, "last": 1.9})


# ------------------------------------------------------------------------------------------------------------ interface


def test_unfinished_answers_are_completed_by_the_engine():
    search = TreeSearch(
        engine=ENDING.engine(),
        score=table_score(ENDING.mean_values()),
        propose=functools.partial(top_tokens, k=2),
        select=functools.partial(beam, width=2),
        simulations=1,
    )
    outputs = search.generate([PROMPT] * 5, ENDING.sampling, 2, seeds=range(5))
    for group in outputs:
        for completion in group:
            assert ENDING.ended(tuple(completion.tokens))
            assert math.exp(sum(completion.logps)) == pytest.approx(ENDING.strings[tuple(completion.tokens)])
            assert completion.measured["generated"] >= 2 + len(completion.tokens) - 1


def test_searches_depend_on_their_own_seed_alone():
    search = TreeSearch(
        engine=WORLD.engine(),
        score=table_score(WORLD.mean_values()),
        propose=functools.partial(sampled_steps, width=2, tokens=1),
        select=functools.partial(beam, width=2),
    )
    seen = {}
    together = search.generate(
        [PROMPT] * 4, WORLD.sampling, 2, seeds=[4, 5, 6, 7], on_completion=lambda i, j, c: seen.setdefault((i, j), c)
    )
    assert search.generate([PROMPT], WORLD.sampling, 2, seeds=[6]) == [together[2]]
    assert seen == {(i, j): c for i, group in enumerate(together) for j, c in enumerate(group)}
    assert len({tuple(c.tokens) for c in seen.values()}) > 1
    assert search.generate([PROMPT], WORLD.sampling, 8) != search.generate([PROMPT], WORLD.sampling, 8)


def test_the_first_path_reached_and_votes():
    tree = searched(WORLD, WORLD.mean_values(), select=depth_first, paths=5)
    assert reached_first(tree) is tree.paths[0]
    by_first_token = functools.partial(voted, answer=lambda tokens: tokens[0], by="count")
    firsts = [node.prefix.generated[0] for node in tree.endings()]
    assert by_first_token(tree).prefix.generated[0] == max(set(firsts), key=firsts.count)


# -------------------------------------------------------------------------------------------------------------- exports


@pytest.mark.parametrize("kind", ["mean", "soft", "max"])
def test_targets_of_a_whole_tree_are_the_exact_values(kind: str):
    values = dict.fromkeys(ENDING.prefixes, 0.0) | dict(ENDING.reward)
    tree = searched(ENDING, values, select=functools.partial(best_first, count=1000))
    exact = {"mean": ENDING.mean_values, "soft": ENDING.soft_values, "max": ENDING.max_values}[kind]()
    targets = value_targets(tree, kind=kind, beta=ENDING.beta)
    assert {tuple(target.tokens[target.start :]): target.target for target in targets} == pytest.approx(
        exact, abs=1e-12
    )
    assert len(targets) == len(exact)


def test_best_paths_and_pairs():
    values = dict.fromkeys(WORLD.prefixes, 0.0) | dict(WORLD.reward)
    tree = searched(WORLD, values, select=functools.partial(best_first, count=1000))
    ranking = sorted(WORLD.reward, key=lambda y: -WORLD.reward[y])
    paths = best_paths([tree], count=3)
    assert [tuple(path.completion) for path in paths] == ranking[:3] and paths[0].prompt == list(PROMPT)
    assert len(best_paths([tree], count=100, at_least=1.0)) == sum(r >= 1 for r in WORLD.reward.values())
    best = WORLD.max_values()
    pairs = preference_pairs(tree)
    assert len(pairs) == sum(node.expanded for node in tree.root.below())
    for pair in pairs:
        string = tuple(pair.prefix[pair.start :])
        following = {(a,): best[(*string, a)] for a in range(WORLD.vocabulary)}
        assert tuple(pair.chosen) == max(following, key=lambda a: following[a])
        assert tuple(pair.rejected) == min(following, key=lambda a: following[a])
        assert pair.margin == pytest.approx(max(following.values()) - min(following.values()))
    assert preference_pairs(tree, margin=100.0) == []


def test_a_drawn_tree_names_every_node_and_edge():
    tree = searched(ENDING, ENDING.mean_values(), select=puct, simulations=4)
    nodes = list(tree.root.below())
    drawn = dot(tree, lambda tokens: 'a"b\\\n' + "x" * 50 if tokens == [1] else str(tokens))
    assert len(re.findall(r"^  n\d+ \[label=", drawn, re.M)) == len(nodes)
    assert len(re.findall(r"^  n\d+ -> n\d+ ", drawn, re.M)) == len(nodes) - 1
    assert drawn.count("peripheries=2") == sum(node.ended for node in nodes)
    assert r"a\"b\\\\nx" in drawn and "…" in drawn
