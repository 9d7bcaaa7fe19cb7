"""Tests of the other policies: how they move, which one is the opponent, and their state in a checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from parts_cases import close
from preference_cases import answers, every_pair, train
from random_batch import make_random_batch
from tabular_engine import TabularEngine
from test_preference_optima import REFERENCE, REWARD, sigmoid, soft_dpo, tilted
from torch import Tensor, nn
from transformers import AutoTokenizer

from posttrain.batch import Author
from posttrain.decoding.mixture import Mixture, mixed
from posttrain.engines import make_engine
from posttrain.engines.base import Sampling
from posttrain.errors import DataError, RecipeError, UserError
from posttrain.models.policy import Policy, build_policy
from posttrain.recipe.sections import EngineSection, LoraSection
from posttrain.recipe.sections import PolicySection as PolicyOptions
from posttrain.rollout.rollouts import Context, Prompts, against, beside_given
from posttrain.training.loop import ids_of
from posttrain.training.other_policies import OtherPolicies, adapted_copy, check_twins, move, weights_of
from posttrain.training.recipe import Recipe, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes" / "preference"


class Table(nn.Module):
    """A policy of one token: a softmax of logits."""

    has_adapters = False

    def __init__(self, probabilities: Any) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probabilities).double().log())

    @property
    def distribution(self) -> Tensor:
        return self.logits.detach().softmax(-1)


def players_of(policy: Any, recipe: Recipe, **others: Any) -> OtherPolicies:
    return OtherPolicies(policy, others.get("reference"), others.get("average"), recipe)


def shipped(name: str, *overrides: str) -> Recipe:
    return load_recipe(RECIPES / f"{name}.yaml", overrides)


# ---- Moves


def test_a_reference_moves_by_its_rate_when_it_is_due() -> None:
    policy, reference = Table([0.5, 0.3, 0.2]), Table([0.2, 0.2, 0.6])
    players = players_of(policy, shipped("tr_dpo", "--reference.every=3", "--reference.rate=0.6"), reference=reference)
    before, now = reference.logits.detach().clone(), policy.logits.detach()
    for step in (1, 2):
        players.after(step)
        assert torch.equal(reference.logits, before)
    players.after(3)
    close(reference.logits.detach(), 0.6 * now + 0.4 * before, 1e-12)
    players_of(policy, shipped("spin"), reference=reference).after(50)
    assert torch.equal(reference.logits, policy.logits)  # to the bit


def test_an_average_follows_and_a_reference_without_an_interval_stays() -> None:
    policy, average, reference = Table([0.5, 0.3, 0.2]), Table([0.2, 0.2, 0.6]), Table([0.1, 0.1, 0.8])
    players = players_of(policy, shipped("nash_ema"), reference=reference, average=average)
    before, stays = average.logits.detach().clone(), reference.logits.detach().clone()
    for step in range(1, 4):
        players.after(step)
    left = (1 - 0.001) ** 3
    close(average.logits.detach(), left * before + (1 - left) * policy.logits.detach(), 1e-12)
    assert torch.equal(reference.logits, stays)
    assert players.moving.keys() == {"average"}


def test_every_move_of_the_reference_tilts_dpo_s_optimum_once_more() -> None:
    """π_k ~ ref e^(k r / beta): what the reference took over counts as the beginning."""
    policy, reference = Table(REFERENCE), Table(REFERENCE)
    players = players_of(policy, shipped("iterative_dpo"), reference=reference)
    pairs = every_pair(4)
    soft = [sigmoid(REWARD[i] - REWARD[j]) for i, j in pairs]
    for k in (1, 2, 3):
        batch = answers([[(i, 1.0), (j, 0.0)] for i, j in pairs], reference.distribution.tolist(), probability=soft)
        found = train([(1.0, soft_dpo)], batch, reference.distribution.tolist())
        with torch.no_grad():
            policy.logits.copy_(torch.tensor(found).double().log())
        players.after(50 * k)
        close(reference.distribution, tilted(REFERENCE, [k * r for r in REWARD], 0.5), 1e-5)


def test_looking_ahead_is_undone_and_remembered() -> None:
    policy = Table([0.5, 0.3, 0.2])
    players = players_of(policy, shipped("egpo"))
    start = policy.distribution
    with players.one_step_ahead():  # nothing is ahead yet
        assert torch.equal(policy.distribution, start)
    players.remember()
    with torch.no_grad():
        policy.logits += torch.tensor([1.0, -1.0, 0.5]).double()
    ahead = policy.distribution
    players.go_back()
    assert torch.equal(policy.distribution, start)
    with pytest.raises(RuntimeError), players.one_step_ahead():
        assert torch.equal(policy.distribution, ahead)
        raise RuntimeError
    assert torch.equal(policy.distribution, start)
    other = players_of(policy, shipped("egpo"))
    other.restore(copy.deepcopy(players.state()))
    with other.one_step_ahead():
        assert torch.equal(policy.distribution, ahead)


def test_a_checkpoint_without_a_player_is_refused() -> None:
    players = players_of(Table([0.5, 0.5]), shipped("spin"), reference=Table([0.5, 0.5]))
    with pytest.raises(UserError, match="holds no moving reference"):
        players.restore({})


def test_models_of_other_shapes_cannot_move(tiny_model_folder: Path) -> None:
    policy = build_policy(PolicyOptions(model=str(tiny_model_folder)))
    with pytest.raises(UserError, match=r"other shapes \(logits and \d+ more\)"):
        check_twins(Table([0.5, 0.5]), policy)  # type: ignore[arg-type]


# ---- Adapters


def wide_lora(folder: Path) -> Policy:
    torch.manual_seed(0)
    policy = build_policy(PolicyOptions(model=str(folder), lora=LoraSection(rank=4)))
    with torch.no_grad():
        for weight in weights_of(policy).values():
            weight.add_(0.1 * torch.randn_like(weight))
    return policy


def test_a_copy_of_adapters_is_the_policy_of_then(tiny_model_folder: Path) -> None:
    """The copy stays when the policy moves on, follows to the bit when it is moved, and takes no gradient."""
    policy, batch = wide_lora(tiny_model_folder), make_random_batch(1)
    then = policy(batch.tokens, batch.mask)[0].detach()
    trained = [name for name, weight in policy.named_parameters() if weight.requires_grad]
    twin = adapted_copy(policy)
    assert [name for name, weight in policy.named_parameters() if weight.requires_grad] == trained
    assert torch.equal(twin(batch.tokens, batch.mask)[0], then)
    with torch.no_grad():
        for weight in weights_of(policy).values():
            weight.mul_(1.5)
    now = policy(batch.tokens, batch.mask)[0].detach()
    assert torch.equal(twin(batch.tokens, batch.mask)[0], then) and (now - then).abs().max() > 1e-3
    kl = policy.statistics(batch.tokens, batch.mask, kl_from=twin).kl_ref
    assert kl is not None and kl[batch.mask].max() > 1e-4
    kl.sum().backward()
    assert all(weight.grad is None for weight in weights_of(twin).values())
    move(twin, policy, rate=1.0)
    assert torch.equal(twin(batch.tokens, batch.mask)[0], now)
    same = policy.statistics(batch.tokens, batch.mask, kl_from=twin).kl_ref
    assert same is not None and not same.any()


# ---- What does not go together


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("tr_dpo", ["--policy.lora={rank: 4}"], "averages of adapters' factors"),
        ("spin", ["--policy.lora={rank: 4}", "--reference.model=m"], "moves by taking over"),
        ("dpo", ["--reference.rate=0.5"], "the reference never moves"),
        ("nash_ema", ["--policy.lora={rank: 4}"], "averages of adapters' factors"),
        ("online_dpo", ["--rollout={use: against}"], "asks for completions of an opponent"),
        ("online_dpo", ["--opponent={share: 0.5}"], "samples nothing unless `rollout` asks"),
        ("egpo", ["--steps=3"], "come in pairs with `extragradient`, and 3 is odd"),
        ("dpo", ["--extragradient=true"], "works on the policy's own samples"),
    ],
)
def test_settings_that_do_not_go_together(name: str, overrides: list[str], expected: str) -> None:
    with pytest.raises(RecipeError) as raised:
        shipped(name, *overrides)
    assert expected in str(raised.value)


# ---- Mixtures


@pytest.mark.parametrize("share", [0.125, 0.5, 1.0])
def test_a_mixture_of_laws_is_the_normalised_product_of_their_powers(share: float) -> None:
    distributions = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(0)).double().softmax(-1)
    found = mixed(distributions[0].log(), distributions[1].log(), share).exp()
    for row in range(5):
        powers = [
            float(p) ** (1 - share) * float(q) ** share
            for p, q in zip(distributions[0, row], distributions[1, row], strict=True)
        ]
        close(found[row], [power / sum(powers) for power in powers], 1e-9)
    impossible = torch.tensor([[0.0, -torch.inf]])
    assert torch.equal(mixed(impossible, torch.tensor([[-1.0, -2.0]]), 1.0), torch.tensor([[-1.0, -2.0]]))


@pytest.mark.engine
@pytest.mark.parametrize(("library", "lora"), [("transformers", False), ("transformers", True), ("vllm", False)])
def test_completions_of_a_mixture_have_the_mixture_s_log_probs(
    library: Any, lora: bool, tiny_model_folder: Path
) -> None:
    """Log-probs of every token equal those of two full forward passes; a share of 1 samples as the reference does."""
    reference = build_policy(PolicyOptions(model=str(tiny_model_folder)))
    if lora:
        policy = wide_lora(tiny_model_folder)
        other = policy
    else:
        torch.manual_seed(0)
        policy, other = build_policy(PolicyOptions(model=str(tiny_model_folder))), reference
        with torch.no_grad():
            for weight in policy.parameters():
                weight.add_(0.02 * torch.randn_like(weight))
    engine = make_engine(
        tiny_model_folder, EngineSection(use=library, cache_mb=16, max_concurrent=16), dtype="float32", max_model_len=64
    )
    engine.load(policy.weights(), 1)
    sampling, prompts = Sampling(max_tokens=8, temperature=0.8), [[5, 6, 7], [8, 9], [10]]
    mixture = Mixture(engine, other, share=0.3, without_adapters=lora)
    completions = mixture.generate(prompts, sampling, 3, seeds=[1, 2, 3])
    policy.eval()

    def distribution(model: Policy, tokens: list[int]) -> Tensor:
        return model.next_logits(model.hidden_states(torch.tensor([tokens]))[0, -1:], 0.8)[0].log_softmax(-1)

    with torch.no_grad():
        for prompt, group in zip(prompts, completions, strict=True):
            for completion in group[:2]:
                for t, token in enumerate(completion.tokens):
                    so_far = [*prompt, *completion.tokens[:t]]
                    expected = (0.7 * distribution(policy, so_far) + 0.3 * distribution(reference, so_far)).log_softmax(
                        -1
                    )[token]
                    assert completion.logps[t] == pytest.approx(float(expected), abs=2e-4)
    alone = Mixture(engine, other, share=1.0, without_adapters=lora).generate(prompts, sampling, 2, seeds=[1, 2, 3])
    engine.load(reference.weights(), 2)
    of_reference = engine.generate(prompts, sampling, 2, seeds=[1, 2, 3])
    assert [[c.tokens for c in group] for group in alone] == [[c.tokens for c in group] for group in of_reference]
    engine.close()


# ---- Rollouts with others

TREE = {prefix: [0.0, 0.5, 1.0] for prefix in [(0,), (0, 0), (0, 1), (0, 2)]}


def prompts_of(*rows: dict[str, Any]) -> Prompts:
    count = len(rows)
    places = [f"d.jsonl:{i + 1}" for i in range(count)]
    return Prompts(tokens=[[0]] * count, rows=rows, places=places, group=range(count), seeds=range(count))


@pytest.mark.parametrize("role", ["player", "baseline", "calibration"])
def test_the_opponent_s_completions_stand_beside_the_policy_s(role: Any) -> None:
    """Both policies have the same table but draw differently; each draw is reported under its own number."""
    told: list[tuple[int, int]] = []
    context = Context(
        sampling=Sampling(max_tokens=2),
        decode=str,
        on_text=lambda prompt, sample, text, tokens: told.append((prompt, sample)),
        opponent=TabularEngine(TREE, max_model_len=3),
    )
    prompts = prompts_of(*[{}] * 20)
    batch = against(TabularEngine(TREE, max_model_len=3), prompts, 2, context, opponents=1, role=role)
    author = Author.CALIBRATION if role == "calibration" else Author.OPPONENT
    assert batch.author is not None and batch.author.tolist() == [0, 0, int(author)] * 20
    assert batch.baseline_only.tolist() == [False, False, role == "baseline"] * 20
    assert batch.by(Author.POLICY).sum() == 40
    assert sorted(told) == [(i, j) for i in range(20) for j in range(3)]
    draws = batch.tokens.view(20, 3, 3)
    assert not torch.equal(draws[:, 0], draws[:, 2])
    with pytest.raises(ValueError, match="there is no opponent"):
        against(TabularEngine(TREE), prompts, 1, Context(sampling=Sampling(), decode=str))


def test_all_completions_of_ipo_md_are_the_mixture_s() -> None:
    """The policy and the opponent each write one token alone, so that it shows who wrote a completion."""
    recipe = shipped("ipo_md")
    assert recipe.opponent is not None and (recipe.opponent.share, recipe.completions) == (0.125, 2)
    policy, opponent = (
        TabularEngine(dict.fromkeys(TREE, probabilities), max_model_len=3)
        for probabilities in ([-99.0, 99.0, -99.0], [-99.0, -99.0, 99.0])
    )
    context = Context(sampling=Sampling(max_tokens=2), decode=str, opponent=opponent)
    batch = recipe.rollout(policy, prompts_of({}, {}), recipe.completions, context)
    assert batch.tokens[batch.mask].unique().tolist() == [2]
    assert batch.by(Author.OPPONENT).all() and not batch.baseline_only.any() and batch.group.tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="there is no opponent"):
        recipe.rollout(policy, prompts_of({}), 2, Context(sampling=Sampling(), decode=str))


def test_a_given_completion_stands_beside_the_policy_s(tiny_model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    encode, eos = ids_of(tokenizer), tokenizer.eos_token_id
    context = Context(sampling=Sampling(max_tokens=2), decode=str, encode=encode)
    batch = beside_given(
        TabularEngine(TREE, max_model_len=3), prompts_of({"said": "a"}, {"said": "ab"}), 1, context, given="said"
    )
    assert batch.author is not None and batch.author.tolist() == [0, 3, 0, 3]
    assert batch.tokens[1, 1:].tolist() == [*tokenizer.encode("a"), eos] and batch.finish[1] == 0
    assert batch.tokens[3, 1:].tolist() == tokenizer.encode("ab") and batch.finish[3] == 1  # cut at two tokens
    assert batch.logp_sampler[[1, 3]][:, 1:].isnan().all()
    with pytest.raises(DataError, match="d.jsonl:1: column 'said' should hold the completion .* as text, not None"):
        beside_given(TabularEngine(TREE, max_model_len=3), prompts_of({}), 1, context, given="said")
