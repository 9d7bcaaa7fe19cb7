"""Verifiers, and the worker processes that run them on completions with time limits. Read ``functions.py`` first.

Other rooms take ``VerifierPool`` and ``signature_of`` from here. May import from parts, recipe, system and the modules
to their left.
"""

from __future__ import annotations

from posttrain.verify.pool import Verdict, VerifierPool
from posttrain.verify.signature import Signature, signature_of

__all__ = ["Signature", "Verdict", "VerifierPool", "signature_of"]
