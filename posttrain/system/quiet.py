"""Silences messages of libraries on which nobody who trains a model can act."""

from __future__ import annotations

import os
import sys
import warnings


def quiet() -> None:
    """Sets the libraries' own switches. Must be called before any of them is imported.

    * Progress bars of downloads and of loading and saving weights: only where somebody watches a terminal.
    * DeepSpeed is told that there is no GPU, or every process that imports it warns of having found none.
    * TRL warns of vLLM versions that its trainers were not tested with; its reward functions and data tools need none.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM versions", category=UserWarning)
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
