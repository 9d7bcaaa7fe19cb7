"""Decoders from recipes: ``decoder: {use: shaped, score: {use: value, model: runs/mc/value}, k: 20}``.

A decoder is a part that is called with an engine and a :class:`~posttrain.guided.context.DecoderContext`, and gives an
engine. Its options are plain, or parts themselves: scores, picks, finals, selects, keys. See :mod:`posttrain.decoding`.
"""
