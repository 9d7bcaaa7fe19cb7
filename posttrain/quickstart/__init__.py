"""The quickstart: a tiny model, made and warmed up on the spot, learns by GRPO to write out its arithmetic.

Run it as ``python -m posttrain.quickstart``; read ``story.py`` first, which has its chapters. Benchmarks also use
``problems``, ``model``, ``start`` and ``imitation``. May import from all rooms to its left.
"""
