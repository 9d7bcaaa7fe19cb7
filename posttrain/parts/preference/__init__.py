"""Preference optimisation as an algebra: loss terms over pairs, completions and lists, and what they are made of.

Read :mod:`terms` first: a term has a score of each completion (:mod:`scores`), a link from scores to a loss
(:mod:`pair_links`, :mod:`point_links`, :mod:`list_links`) and a target made from the labels (:mod:`pair_targets`,
:mod:`list_targets`). Margins are subtracted from a pair (:mod:`margins`), weights multiply its loss
(:mod:`pair_weights`), and :mod:`regularisers` are further loss terms. The slots `baseline` and `regroup` take
:mod:`baselines`, the slot `compare` takes :mod:`games`.
"""
