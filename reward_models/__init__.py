"""Reward models as parts: ``reward: [{use: reward_models.outcome, model: path}]``.

Each is built once a process from its options and called with a batch: ``batch -> [N]`` (one reward a completion) or
``batch -> [N, L]`` (rewards at the ends of steps, or at tokens). Models are loaded at the first call. For evaluation
and decoding, outcome models and ensembles also score texts, ``of_texts(prompts, completions) -> [M]``, and prefixes of
the policy's tokens, ``of_prefixes(prefixes) -> [M]``; a judge scores texts.

Read ``loading.py`` first, then ``outcome.py``. Recipes and the rooms to the right use the names below; the modules
import from ``data``, ``models``, ``parts``, ``recipe`` and the rooms to their left.
"""

from __future__ import annotations

from reward_models.ensemble import EnsembleModel as ensemble
from reward_models.implicit import ImplicitModel as implicit
from reward_models.judge import Judge as judge
from reward_models.judge import PairwiseJudge as pairwise_judge
from reward_models.outcome import OutcomeModel as outcome
from reward_models.preference import PreferenceModel as preference
from reward_models.process import ProcessModel as process

__all__ = ["ensemble", "implicit", "judge", "outcome", "pairwise_judge", "preference", "process"]
