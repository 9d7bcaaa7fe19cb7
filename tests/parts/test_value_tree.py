"""An exact world: every completion of a small token tree is a row, so that expectations are sums and values are known.

Three tokens, of which the last ends the completion; at most three are chosen. Policies are tables of logits, one row a
prefix; values are tables, one number a prefix. All in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from value_cases import decode

from posttrain.batch import Batch, Outputs
from posttrain.parts import advantages, losses, targets, value_losses

VOCABULARY, DEPTH, END = 3, 3, 2
BETA = 0.4
Prefix = tuple[int, ...]
Table = dict[Prefix, float]


@dataclass(frozen=True)
class Tree:
    prefixes: list[Prefix]
    leaves: list[Prefix]
    logp: dict[Prefix, Tensor]  # of the next token, for prefixes that go on
    reward: Table  # of the leaves

    def index(self, prefix: Prefix) -> int:
        return self.prefixes.index(prefix)

    def below(self, prefix: Prefix) -> list[Prefix]:
        return [leaf for leaf in self.leaves if leaf[: len(prefix)] == prefix]

    def chance(self, leaf: Prefix, given: Prefix = ()) -> float:
        steps = range(len(given), len(leaf))
        return math.exp(sum(self.logp[leaf[:t]][leaf[t]].item() for t in steps))


def make_tree(seed: int, *, grid: bool = False) -> Tree:
    """A random policy and random rewards (``grid``: of 0, 0.5 or 1)."""
    g = torch.Generator().manual_seed(seed)
    prefixes: list[Prefix] = [()]
    for prefix in prefixes:
        if len(prefix) < DEPTH and prefix[-1:] != (END,):
            prefixes.extend((*prefix, token) for token in range(VOCABULARY))
    leaves = [prefix for prefix in prefixes if len(prefix) == DEPTH or prefix[-1:] == (END,)]
    going = [prefix for prefix in prefixes if prefix not in leaves]
    table = torch.randn(len(going), VOCABULARY, generator=g, dtype=torch.float64).log_softmax(-1)
    drawn = torch.rand(len(leaves), generator=g, dtype=torch.float64)
    reward = (2 * drawn).round() / 2 if grid else 2 * drawn - 0.5
    return Tree(prefixes, leaves, dict(zip(going, table, strict=True)), dict(zip(leaves, reward.tolist(), strict=True)))


def batch_of(tree: Tree) -> Batch:
    """Batch with a row per leaf: a prompt of one token, then the leaf, sampled uniformly.

    The tree's policy is both the old policy and the reference."""
    n, columns = len(tree.leaves), DEPTH + 1
    length = torch.tensor([len(leaf) + 1 for leaf in tree.leaves])
    column = torch.arange(columns)
    mask = (column >= 1) & (column < length[:, None])
    logp, sampler = torch.zeros(n, columns, dtype=torch.float64), torch.zeros(n, columns, dtype=torch.float64)
    tokens = torch.zeros(n, columns, dtype=torch.long)
    for i, leaf in enumerate(tree.leaves):
        for t, token in enumerate(leaf):
            tokens[i, t + 1] = token
            logp[i, t + 1] = tree.logp[leaf[:t]][token]
            sampler[i, t + 1] = math.log(len(tree.below(leaf[: t + 1])) / len(tree.below(leaf[:t])))
    reward = torch.tensor([tree.reward[leaf] for leaf in tree.leaves], dtype=torch.float64)
    return Batch(
        tokens=tokens,
        mask=mask,
        length=length,
        group=torch.zeros(n, dtype=torch.long),
        finish=torch.zeros(n, dtype=torch.long),
        logp_sampler=sampler,
        version=torch.zeros(n, dtype=torch.long),
        step_id=torch.where(mask, column - 1, -1),
        baseline_only=torch.zeros(n, dtype=torch.bool),
        rows=tuple({} for _ in range(n)),
        texts=tuple("" for _ in range(n)),
        score=reward,
        reward=reward,
        step_reward=torch.zeros(n, columns, dtype=torch.float64),
        logp_old=logp,
        logp_ref=logp,
    )


def places(tree: Tree) -> Tensor:
    """Number of the prefix at each state of each row, 0 elsewhere."""
    result = torch.zeros(len(tree.leaves), DEPTH + 1, dtype=torch.long)
    for i, leaf in enumerate(tree.leaves):
        for t in range(len(leaf) + 1):
            result[i, t] = tree.index(leaf[:t])
    return result


def chances(tree: Tree) -> Tensor:
    return torch.tensor([tree.chance(leaf) for leaf in tree.leaves], dtype=torch.float64)


def filled(tree: Tree, batch: Batch, table: Tensor, kind: targets.Backup | None, beta: float = BETA) -> Batch:
    """The batch as the loop scores it: values of a table, and with a kind the backup over every next token."""
    after = torch.zeros_like(table)
    for prefix, logp in tree.logp.items():
        children = torch.stack([table[tree.index((*prefix, token))] for token in range(VOCABULARY)])
        after[tree.index(prefix)] = targets.backup(children, logp, kind=kind or "mean", beta=beta)
    where = places(tree)
    return batch.set(value=table[where], value_next=after[where] if kind else None)


def fixed_point(tree: Tree, part: Callable[[Batch], Tensor], kind: targets.Backup | None = None) -> Tensor:
    """Table that repeated backups converge to: each prefix's expected target under the tree's policy."""
    batch, where, weight = batch_of(tree), places(tree), chances(tree)[:, None]
    table = torch.randn(len(tree.prefixes), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for _ in range(DEPTH + 2):
        goal = part(filled(tree, batch, table, kind))
        learned = ~goal.isnan()
        mass = torch.zeros_like(table).index_add(0, where[learned], weight.expand_as(goal)[learned])
        table = torch.zeros_like(table).index_add(0, where[learned], (weight * goal)[learned]) / mass
    return table


def mean_value(tree: Tree, prefix: Prefix) -> float:
    return sum(tree.chance(leaf, prefix) * tree.reward[leaf] for leaf in tree.below(prefix))


def soft_value(tree: Tree, prefix: Prefix) -> float:
    terms = [tree.chance(leaf, prefix) * math.exp(tree.reward[leaf] / BETA) for leaf in tree.below(prefix)]
    return BETA * math.log(math.fsum(terms))


def greedy_value(tree: Tree, prefix: Prefix) -> float:
    while prefix not in tree.reward:
        prefix = (*prefix, int(tree.logp[prefix].argmax()))
    return tree.reward[prefix]


def table_of(tree: Tree, value: Callable[[Tree, Prefix], float]) -> Tensor:
    return torch.tensor([value(tree, prefix) for prefix in tree.prefixes], dtype=torch.float64)


def exact(found: Tensor, expected: Tensor, tolerance: float = 1e-8) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


# ---- fixed points ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lambda_", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("expected_next", [False, True])
def test_mean_targets_lead_to_the_expected_reward(lambda_: float, expected_next: bool) -> None:
    """Monte Carlo = TD(λ) = CD-Q: sampled or expected next values, whatever the λ."""
    tree = make_tree(0)

    def part(batch: Batch) -> Tensor:
        return targets.lambda_return(batch, lambda_=lambda_)

    exact(fixed_point(tree, part, "mean" if expected_next else None), table_of(tree, mean_value))


def test_outcome_labels_lead_to_the_expected_reward() -> None:
    tree = make_tree(0)
    exact(fixed_point(tree, targets.outcome_label), table_of(tree, mean_value))


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("soft", soft_value),
        ("max", lambda tree, prefix: max(tree.reward[leaf] for leaf in tree.below(prefix))),
        ("greedy", greedy_value),
    ],
)
def test_other_backups_lead_to_their_values(kind, value) -> None:
    tree = make_tree(0)

    def part(batch: Batch) -> Tensor:
        return targets.lambda_return(batch, lambda_=0.0, backup=kind, beta=BETA)

    exact(fixed_point(tree, part, kind), table_of(tree, value))


def test_c51_leads_to_the_distribution_of_the_reward() -> None:
    """Softmax minus the gradient is the target: its mean over completions is the next table of distributions."""
    tree = make_tree(0, grid=True)
    batch, where, weight = batch_of(tree), places(tree), chances(tree)[:, None, None]
    support = torch.linspace(0, 1, 3, dtype=torch.float64)
    batch = batch.set(target=targets.outcome_label(batch))
    table = torch.full((len(tree.prefixes), 3), 1 / 3, dtype=torch.float64)
    for _ in range(DEPTH + 1):
        logits = table.log().clamp(min=-700)[where].requires_grad_()
        outputs = Outputs(logp=batch.logp_sampler, value_logits=logits, support=support)
        value_losses.c51(outputs, batch).sum().backward()
        goal = (table[where] - logits.grad) * batch.states[..., None]
        mass = torch.zeros_like(table).index_add(0, where[batch.states], (weight + 0 * goal)[batch.states])
        table = torch.zeros_like(table).index_add(0, where[batch.states], (weight * goal)[batch.states]) / mass
        table = table.clamp(min=0)
    for prefix, distribution in zip(tree.prefixes, table, strict=True):
        leaves = tree.below(prefix)
        expected = [
            sum(tree.chance(leaf, prefix) for leaf in leaves if tree.reward[leaf] == z) for z in (0.0, 0.5, 1.0)
        ]
        exact(distribution, torch.tensor(expected, dtype=torch.float64))
    exact(decode(table.log().clamp(min=-700), support), table_of(tree, mean_value))


# ---- policy gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gae", "value_change", "value_change-step", "static_q"])
def test_expected_gradients_are_the_exact_policy_gradient(name: str) -> None:
    """GAE with λ = 1 and any values; changes of value, and values without a baseline, with the true values."""
    tree = make_tree(0)
    batch, weight = batch_of(tree), chances(tree)
    anything = torch.randn(len(tree.prefixes), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    part = {
        "gae": lambda b: advantages.gae(b, lambda_=1.0),
        "value_change": advantages.value_change,
        "value_change-step": lambda b: advantages.value_change(b, level="step", last="reward"),
        "static_q": advantages.static_q,
    }[name]
    scored = filled(tree, batch, anything if name == "gae" else table_of(tree, mean_value), None)
    scored = scored.set(advantage=part(scored))
    theta = {prefix: logp.clone().requires_grad_() for prefix, logp in tree.logp.items()}
    logp = log_probs(tree, theta)
    loss = (losses.reinforce(Outputs(logp=logp), scored) * weight[:, None]).sum()
    found = torch.autograd.grad(-loss, list(theta.values()))
    objective = (log_probs(tree, theta).sum(-1).exp() * batch.reward).sum()
    for mine, wanted in zip(found, torch.autograd.grad(objective, list(theta.values())), strict=True):
        exact(mine, wanted, 1e-12)


def log_probs(tree: Tree, theta: dict[Prefix, Tensor]) -> Tensor:
    """Log-probs of the tokens of each leaf under a table of logits, ``[N, L]``."""
    rows = []
    for leaf in tree.leaves:
        row = [theta[leaf[:t]].log_softmax(-1)[token] for t, token in enumerate(leaf)]
        zero = torch.zeros((), dtype=torch.float64)
        rows.append(torch.stack([zero, *row, *[zero] * (DEPTH - len(leaf))]))
    return torch.stack(rows)


# ---- soft values ----------------------------------------------------------------------------------------------------


def optimum(tree: Tree, values: Tensor) -> Tensor:
    """Log-probs of the tilted policy π ∝ p exp((V(next) - V) / β)."""
    result = torch.zeros(len(tree.leaves), DEPTH + 1, dtype=torch.float64)
    for i, leaf in enumerate(tree.leaves):
        for t, token in enumerate(leaf):
            gain = values[tree.index(leaf[: t + 1])] - values[tree.index(leaf[:t])]
            result[i, t + 1] = tree.logp[leaf[:t]][token] + gain / BETA
    return result


@pytest.mark.parametrize("level", ["token", "step", "response"])
def test_residuals_of_soft_path_consistency_are_0_at_the_optimum(level) -> None:
    tree = make_tree(0)
    values = table_of(tree, soft_value)
    batch = filled(tree, batch_of(tree), values, None)
    outputs = Outputs(logp=optimum(tree, values).requires_grad_(), value=batch.value)
    assert outputs.logp.sum(-1).exp().sum().item() == pytest.approx(1.0, abs=1e-12)  # a policy
    loss = losses.soft_path(outputs, batch, beta=BETA, level=level)
    assert loss.max() < 1e-28
    loss.sum().backward()
    exact(outputs.logp.grad, torch.zeros_like(outputs.logp), 1e-13)
    batch = batch.set(target=targets.lambda_return(batch))
    assert value_losses.soft_path(outputs, batch, beta=BETA).max() < 1e-28


def test_residuals_are_not_0_elsewhere() -> None:
    tree = make_tree(0)
    batch = filled(tree, batch_of(tree), table_of(tree, mean_value), None)
    assert losses.soft_path(Outputs(logp=batch.logp_ref), batch, beta=BETA).max() > 1e-3


def test_soft_values_of_a_tree_by_hand() -> None:
    """Depth 2, a uniform policy, β = ½, rewards [[1, 0], [0, ¼]]: V = ½ log of the mean of exp(2 r) over the leaves."""
    logp = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    second = targets.backup(torch.tensor([[1.0, 0.0], [0.0, 0.25]]).double(), logp.expand(2, 2), kind="soft", beta=0.5)
    first = targets.backup(second, logp, kind="soft", beta=0.5).item()
    assert second[0].item() == pytest.approx(0.5 * math.log((math.exp(2) + 1) / 2), abs=1e-12)
    assert first == pytest.approx(0.5 * math.log((math.exp(2) + 2 + math.exp(0.5)) / 4), abs=1e-12)


@pytest.mark.parametrize("name", ["contrastive_twist", "noise_contrastive"])
def test_twist_losses_have_no_gradient_at_the_soft_value(name: str) -> None:
    """Uniform samples over the leaves, weighed back to the policy: self-normalised weights are exact."""
    tree = make_tree(0)
    batch, where = batch_of(tree), places(tree)
    batch = batch.set(target=targets.outcome_label(batch))
    soft = table_of(tree, soft_value)
    minimum = soft if name == "contrastive_twist" else soft - soft[0]

    def gradient(values: Tensor) -> Tensor:
        table = values.clone().requires_grad_()
        outputs = Outputs(logp=batch.logp_ref, value=table[where].where(batch.states, 0.0))
        getattr(value_losses, name)(outputs, batch, beta=BETA, importance=True).sum().backward()
        return table.grad

    exact(gradient(minimum), torch.zeros_like(soft), 1e-10)
    assert gradient(table_of(tree, mean_value)).abs().max() > 1e-3
