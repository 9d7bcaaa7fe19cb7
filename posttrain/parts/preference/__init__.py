"""Preference optimisation as an algebra: loss terms over pairs, completions and lists, and what they are made of.

The arithmetic of a method is a term (:mod:`terms`) with a score of each completion (:mod:`scores`), a link from scores
to a loss (:mod:`links`), what the annotator said (:mod:`targets`) and what is subtracted from or multiplied into a pair
(:mod:`margins`, :mod:`pair_weights`); regularisers (:mod:`regularisers`) are loss terms beside it.
"""
