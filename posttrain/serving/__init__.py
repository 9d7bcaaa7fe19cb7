"""An OpenAI-compatible server for an engine and a decoder on it. Read ``app.py`` first.

Other rooms take ``server.run_serve`` and ``recipe.ServeRecipe`` from here. May import from decoding, engines, models
and the rooms to their left.

``protocol`` defines the request bodies, ``prompts`` turns them into token ids, ``worker`` samples in its own thread,
``text`` turns tokens into text as they arrive, ``replies`` writes the answers, and ``app`` has the endpoints.
"""
