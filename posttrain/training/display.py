"""The columns of a run's display: what the recipe learns, in the order in which it is read."""

from __future__ import annotations

from posttrain.output.progress import (
    COST_COLUMNS,
    LENGTH_COLUMN,
    LOSS_COLUMN,
    SAMPLED_COLUMNS,
    SCORE_COLUMN,
    Column,
)
from posttrain.training.recipe import Recipe

SCORE = Column("score/mean", "score", "{:.3f}")
KEPT = Column("kept/reward/mean", "kept reward", "{:.3f}")
PREFERENCES = (
    Column("preference/accuracy", "preferred", "{:.3f}"),
    Column("preference/auc", "AUC", "{:.3f}"),
    Column("preference/margin", "margin", "{:.3f}"),
    Column("eval/preference/accuracy", "held-out preferred", "{:.3f}"),
    Column("eval/preference/auc", "held-out AUC", "{:.3f}"),
    Column("eval/preference/margin", "held-out margin", "{:.3f}"),
)
LIKELIHOOD = (Column("nll", "NLL", "{:.3f}"), Column("eval/nll", "held-out NLL", "{:.3f}"))
RANKING = (
    Column("value/pair_accuracy", "pairs right", "{:.3f}"),
    Column("value/auc", "AUC", "{:.3f}"),
    Column("eval/value/pair_accuracy", "held-out pairs right", "{:.3f}"),
    Column("eval/value/auc", "held-out AUC", "{:.3f}"),
)
EXPLAINED = (
    Column("value/explained_variance", "explained", "{:.3f}"),
    Column("eval/value/explained_variance", "held-out explained", "{:.3f}"),
)
VALUE_LOSS = Column("eval/value/loss", "held-out loss", "{:.4g}")


def columns_of(recipe: Recipe) -> tuple[Column, ...]:
    """The columns that say what a recipe learns; one whose metric a run does not have is left out.

    Over completions from a dataset these are not their labels, which do not change: preferences show how the policy
    ranks the two sides, other losses the negative log-likelihood, and value models their ranking of completions and
    the share of the targets' variance that they explain. A model that is trained to rank pairs explains no targets.
    """
    sampled = recipe.examples is None
    ranks = any(term.fact("ranks_completions") for term in recipe.loss)
    columns: tuple[Column, ...] = sampled_columns(recipe) if sampled else ()
    if recipe.loss:
        columns += PREFERENCES if ranks else () if sampled else LIKELIHOOD
    if recipe.value_loss:
        compares = any(term.fact("compares_values") for term in recipe.value_loss)
        columns += (() if sampled else RANKING) + (() if compares else EXPLAINED) + (VALUE_LOSS,)
    return (*columns, SCORE_COLUMN, LOSS_COLUMN, LENGTH_COLUMN, *COST_COLUMNS)


def sampled_columns(recipe: Recipe) -> tuple[Column, ...]:
    """Reward and accuracy of what was drawn and, if the recipe drops completions, the reward of what was kept."""
    if not recipe.select and not recipe.keep:
        return SAMPLED_COLUMNS
    reward, accuracy = SAMPLED_COLUMNS
    # Rewards are computed after `select`, so the score alone is known of all that was drawn.
    unknown = recipe.select and recipe.changes_scores
    return (SCORE if unknown else reward, accuracy, KEPT)
