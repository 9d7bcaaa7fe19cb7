"""Training: everything that changes weights. Read ``loop.py`` first, then ``recipe.py``.

``train``, ``Recipe`` and ``load_recipe`` are for other rooms; reports also use ``value_metrics``. May import from
all rooms to its left: output, rollout, decoding, reward_models, data, engines, verify, models, parts, recipe.
"""
