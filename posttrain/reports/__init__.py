"""Reports: how good a model or a decoder is, in numbers, pictures and a page.

A suite (``value_suite.py``, ``reward_suite.py``, ``decoding_suite.py``) says what to measure; the module without
``_suite`` in its name measures it. ``rounds.py`` sums up an outer loop. Read ``value_suite.py`` first. May import from
all rooms to its left.
"""
