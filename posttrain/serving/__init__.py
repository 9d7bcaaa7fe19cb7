"""An OpenAI-compatible server for an engine and a decoder on it.

``protocol`` says what may be asked, ``prompts`` turns it into token ids, ``worker`` samples in a thread of its own,
``text`` turns tokens into text as they come, ``replies`` writes the answers, and ``app`` holds them together.
"""
