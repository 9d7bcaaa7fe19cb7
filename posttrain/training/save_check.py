"""Tries to save the models of a run before its first step, so that no run ends without its result.

What cannot be saved, such as a chat template or a configuration that does not read back, is otherwise found after the
last step. A small model is written whole to a temporary folder and read back to the same log-probs; of a large one,
whose weights would take minutes, everything but the weights, whose names are compared.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from posttrain.errors import CannotWrite, RecipeError
from posttrain.models.load import load_model
from posttrain.models.policy import Policy, save_model, save_text_files, saved_shell
from posttrain.models.self_check import Rows, random_states_kept
from posttrain.models.value import ValueModel
from posttrain.models.value_files import load_value, save_value
from posttrain.recipe.sections import PolicySection
from posttrain.system.files import writing
from posttrain.training.learner import Learner

SMALL = 20_000_000
"""Most parameters of a model that is written whole: 80 MB, a part of a second."""

LARGEST = 1e-3
"""Largest difference of a log-prob or value after saving and loading in float32, in nats or reward units."""


def check_saving(learner: Learner, tokenizer: Any) -> None:
    """Tries to save the models that the run trains. Called on all ranks; the main process writes.

    Raises:
        RecipeError: if one cannot be saved, or reads back as another model.
        CannotWrite: if there is no room in the folder for temporary files.
    """
    learner.processes.from_main(lambda: _check_saving(learner, tokenizer))


def _check_saving(learner: Learner, tokenizer: Any) -> None:
    recipe = learner.recipe
    with tempfile.TemporaryDirectory(prefix="posttrain-") as folder, random_states_kept():
        for place, model in (("policy.model", learner.policy), ("value.model", learner.value)):
            trained = recipe.loss if model is learner.policy else recipe.value_loss
            if model is None or not trained:
                continue
            path = Path(folder) / place
            try:
                difference = _saved_difference(model, tokenizer, path, recipe.policy)
            except CannotWrite:  # no fault of the model: the folder for temporary files has no room
                raise
            except Exception as error:
                raise RecipeError(
                    f"{place}: the trained model could not be saved and read again at the end of the run: "
                    f"{type(error).__name__}: {error}. Mend the files of {recipe.policy.model!r} that this names"
                ) from error
            if not difference <= LARGEST:  # NaN too
                raise RecipeError(
                    f"{place}: the model that the run would save differs from the trained one by up to "
                    f"{difference:.2g} on a short batch: this family cannot be saved and read again by Transformers"
                )


def _saved_difference(model: Any, tokenizer: Any, folder: Path, section: PolicySection) -> float:
    """Writes what the run will write, reads it, and returns how far log-probs or values are from the model's own."""
    small = sum(parameter.numel() for parameter in model.parameters()) <= SMALL
    if isinstance(model, ValueModel):
        if not small:
            print("save check: value.model is too large to be written and read again now: it is saved untried")
            return 0.0
        return _value_difference(model, tokenizer, folder, section)
    if not small:
        with writing(folder):
            folder.mkdir()
            saved_shell(model, torch.float32).config.save_pretrained(folder)
            save_text_files(model, tokenizer, folder)
        AutoConfig.from_pretrained(folder, trust_remote_code=section.trust_remote_code)
        _check_text_files(tokenizer, folder)
        return 0.0
    with writing(folder):
        save_model(model, tokenizer, folder, torch.float32)
    _check_text_files(tokenizer, folder)
    again = _source(folder, section)
    saved = Policy(load_model(again, dtype=torch.float32)).eval()
    return _difference(model, saved, lambda one, rows: one(rows.tokens, rows.mask)[0])


def _source(folder: Path, section: PolicySection) -> PolicySection:
    return PolicySection(model=str(folder), attention=section.attention, trust_remote_code=section.trust_remote_code)


def _value_difference(model: ValueModel, tokenizer: Any, folder: Path, section: PolicySection) -> float:
    with writing(folder):
        save_value(model, tokenizer, folder)
    _check_text_files(tokenizer, folder)
    saved = load_value(folder, attention=section.attention, trust_remote_code=section.trust_remote_code)
    return _difference(model, saved, lambda one, rows: one(rows.tokens, rows.mask)[0])


@torch.no_grad()
def _difference(model: Any, saved: Any, outputs: Any) -> float:
    """Largest difference of outputs between a model, whose modes are kept, and the saved one; both in float32."""
    device = next(model.parameters()).device
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        return 0.0  # products in bfloat16 differ by their rounding; that the files could be read is what counts
    base = model.base if isinstance(model, Policy) else model.decoder
    rows, modes = Rows(base.config, device), [(module, module.training) for module in model.modules()]
    model.eval()
    own = outputs(model, rows).cpu()
    for module, mode in modes:
        module.training = mode
    read = outputs(saved.to(device), rows).cpu()
    return float((own - read).abs().max())


def _check_text_files(tokenizer: Any, folder: Path) -> None:
    """Reads tokenizer, chat template and generation configuration again.

    Raises:
        ValueError: if the tokenizer reads back with another template or other tokens.
    """
    again = AutoTokenizer.from_pretrained(folder)
    if again.chat_template != tokenizer.chat_template:
        raise ValueError("the tokenizer reads back with another chat template")
    if again.get_vocab() != tokenizer.get_vocab():
        raise ValueError("the tokenizer reads back with other tokens")
    if (folder / "generation_config.json").exists():
        GenerationConfig.from_pretrained(folder)
