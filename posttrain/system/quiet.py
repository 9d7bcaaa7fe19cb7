"""Silences messages of libraries that users cannot act on."""

from __future__ import annotations

import os
import sys
import warnings


def quiet() -> None:
    """Sets the libraries' own switches. Must be called before any of them is imported.

    * Progress bars of downloads and of loading and saving weights are shown only in a terminal.
    * On a machine without a GPU DeepSpeed is set to CPU; otherwise every process that imports it warns.
    * TRL's warning about vLLM versions is off: it is about TRL's trainers, which are not used here.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM versions", category=UserWarning)
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
