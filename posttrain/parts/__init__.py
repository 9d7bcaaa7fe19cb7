"""Parts that a recipe names with ``use:``: rewards, selections, advantages, targets, normalisers and losses.

Each module is one slot and its first lines give the signature; read ``advantages.py`` and ``losses.py`` first. Every
part is a function of a :class:`~posttrain.batch.Batch` and a public name. Parts import only ``posttrain.batch`` and
``posttrain.option_types``, and each other.
"""
