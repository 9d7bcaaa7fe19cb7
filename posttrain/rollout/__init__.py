"""Rollouts: prompts and an engine become a scored batch. Read ``rollouts.py`` first, then ``collect.py``.

``collect``, ``CompletionSource`` and ``session`` are for other rooms; recipes find the parts of the slot ``rollout`` in
``rollouts``. May import from all rooms to its left: decoding, reward_models, data, engines, verify, models, parts,
recipe, system.
"""
