"""Runs verifiers on completions as they end, in worker processes with time limits."""

from __future__ import annotations

from posttrain.verification.pool import Verdict, VerifierPool
from posttrain.verification.signature import Signature, signature_of

__all__ = ["Signature", "Verdict", "VerifierPool", "signature_of"]
