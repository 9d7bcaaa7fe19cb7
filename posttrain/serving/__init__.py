"""An OpenAI-compatible server for an engine and a decoder on it. Read ``app.py`` first.

Other rooms take ``server.run_serve`` and ``recipe.ServeRecipe`` from here. May import from decoding, engines, models
and the rooms to their left.

``protocol`` says what may be asked, ``prompts`` turns it into token ids, ``worker`` samples in a thread of its own,
``text`` turns tokens into text as they come, ``replies`` writes the answers, and ``app`` holds them together.
"""
