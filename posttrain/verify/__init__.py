"""Runs verifiers on completions as they end, in worker processes with time limits."""

from __future__ import annotations

from posttrain.verify.pool import Verdict, VerifierPool
from posttrain.verify.signature import Signature, signature_of

__all__ = ["Signature", "Verdict", "VerifierPool", "signature_of"]
