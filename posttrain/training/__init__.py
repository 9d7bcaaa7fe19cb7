"""Training: everything that changes weights. Read ``loop.py`` first, then ``recipe.py``.

``train``, ``Recipe`` and ``load_recipe`` are what other rooms take from here; reports also use ``value_metrics``. May
import from all rooms to its left: output, rollout, decoding, reward_models, data, engines, verify, models, parts, recipe.
"""
