"""Parts of the slot ``examples``: dataset completions to learn from instead of sampling.

``part(data, tokenizer, base, *, ...) -> Examples``. An index of the examples is a group of completions of one prompt;
``examples.batch(index)`` is a batch in the form of a rollout's, with its rewards. Read ``dataset_examples.py`` first.
"""

from __future__ import annotations

from posttrain.data.examples.preferences import lists, pairs
from posttrain.data.examples.rated import demonstrations, rated, stepwise
from posttrain.data.examples.stored import rollouts

__all__ = ["demonstrations", "lists", "pairs", "rated", "rollouts", "stepwise"]
