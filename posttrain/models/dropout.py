"""Dropout of a model's configuration, switched off while the model is loaded.

Passes that are compared (policy and reference, before and after the update) must run alike. Dropout works in the pass
with gradients alone, so that a ratio of the same policy to itself would not be 1. Stiennon et al. 2020
(arXiv:2009.01325) and TRL switch it off too.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

RATES = re.compile(r"drop|jitter")
"""Names of rates of random changes in the pass with gradients: dropout, dropped layers, jitter of expert routers."""

NOTE = "dropout_of_config"
"""Name of the attribute in which a loaded model keeps the rates of its configuration."""


def switch_off(config: Any) -> dict[str, float]:
    """Sets every rate of a configuration, and of the configurations within it, to 0; returns what they were."""
    rates: dict[str, float] = {}
    for name, value in list(vars(config).items()):
        if isinstance(value, float | int) and not isinstance(value, bool) and value > 0 and RATES.search(name):
            setattr(config, name, type(value)(0))
            rates[name] = value
        elif hasattr(value, "to_dict"):
            rates |= {f"{name}.{inner}": rate for inner, rate in switch_off(value).items()}
    return rates


def keep_rates(model: Any, rates: dict[str, float]) -> None:
    """Notes on a loaded model, and on its decoder, which rates a saved copy of its configuration must have."""
    setattr(model, NOTE, rates)
    setattr(model.get_decoder(), NOTE, rates)


def restore(config: Any, model: nn.Module) -> None:
    """Gives a copy of a model's configuration the rates that its checkpoint had, for saving."""
    for path, rate in getattr(model, NOTE, {}).items():
        *holders, name = path.split(".")
        holder = config
        for inner in holders:
            holder = getattr(holder, inner)
        setattr(holder, name, rate)
