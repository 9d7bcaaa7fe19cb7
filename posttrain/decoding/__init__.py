"""Decoders: an engine and a score of prefixes make an engine.

``Shaped`` tilts the law of every token, ``Population`` lets particles grow and picks survivors, ``TreeSearch``
searches, ``Edited`` moves hidden states. All have the interface of :class:`posttrain.engines.base.Engine`.
"""
