"""Checks of what a model's folder holds: all of the weights, no adapter alone, no tokens without weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME, find_adapter_config_file

from posttrain.errors import RecipeError
from posttrain.recipe.sections import PolicySection
from posttrain.system.places import is_there, no_plain_file, obstacle

BUFFERS = re.compile(r"(rotary_emb\.inv_freq|attn\.(masked_)?bias)$")
"""Tables that older versions of Transformers saved with the weights, and that are computed now."""


def check_weights(model: Any, report: Mapping[str, Any], name: str, *, headless: bool = False) -> None:
    """Checks that a checkpoint has every weight of the model, in its shape, and no others.

    Transformers draws missing weights at random and goes on. Tied weights, which are saved once, do not count as
    missing.

    Args:
        report: the loading information of ``from_pretrained``.
        name: beginning of the message, with the key of the recipe and the model.
        headless: the output layer is not used, and may be missing.

    Raises:
        RecipeError: if not; names some of the weights.
    """
    head = _name_of_head(model) if headless else None
    missing = [key for key in sorted(report["missing_keys"]) if head is None or not key.startswith(f"{head}.")]
    unexpected = [key for key in sorted(report["unexpected_keys"]) if not BUFFERS.search(key)]
    shapes = [f"{key} {list(saved)} for {list(wanted)}" for key, saved, wanted in sorted(report["mismatched_keys"])]
    named = {"are missing": missing, "have no place in it": unexpected, "have another shape": shapes}
    problems = [f"{len(keys)} {problem} ({_some(keys)})" for problem, keys in named.items() if keys]
    if problems:
        saved_as = ", ".join(getattr(model.config, "architectures", None) or ["an unknown class"])
        raise RecipeError(
            f"{name}: its weights are not those of a {type(model).__name__}: {'; '.join(problems)}. Missing weights "
            f"would be random numbers. The folder says that it was saved as {saved_as}. Save the whole model with its "
            "own class by `save_pretrained`, with the names that it has without a wrapper"
        )


def _name_of_head(model: Any) -> str | None:
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if head is not None and module is head), None)


def _some(keys: Sequence[str], limit: int = 3) -> str:
    return ", ".join(keys[:limit]) + (", ..." if len(keys) > limit else "")


def no_model(model: str) -> str:
    """Says why there can be no model at a place, as far as names and files tell; empty for names on the hub."""
    folder = Path(model)
    if not is_there(folder):
        looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1
        return obstacle(folder) or (f"there is no folder {model!r}" if looks_local else "")
    if not folder.is_dir():
        return f"{model!r} is {no_plain_file(folder) or 'a file'}; a model is a folder, or has a name on the hub"
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        return ""
    if not is_there(folder / "config.json"):
        problem = obstacle(folder / "config.json") or f"the folder {model!r} has no config.json, so it holds no model"
        return problem + (
            f"; did you mean {str(folder / 'model')!r}?" if is_there(folder / "model/config.json") else ""
        )
    return next(filter(None, (_damage(folder / name) for name in ("config.json", "generation_config.json"))), "")


def _damage(path: Path) -> str:
    """Says what is wrong with a file that should hold a JSON object; empty if it is right or not there."""
    if not is_there(path):
        return obstacle(path)
    if not path.is_file():
        return f"{str(path)!r} is {no_plain_file(path) or 'a folder'} where a file is expected"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        return f"{str(path)!r} is damaged: no JSON ({error})"
    return "" if isinstance(value, dict) else f"{str(path)!r} is damaged: it holds no JSON object"


def refuse_adapter_folder(source: PolicySection, place: str) -> None:
    """Checks that a folder holds a model and not an adapter alone.

    Raises:
        RecipeError: if it holds an adapter; names its base, and how to merge the two.
    """
    try:
        found = find_adapter_config_file(source.model, revision=source.revision)
    except OSError:
        return  # there is no such model or no connection, of which the load that follows tells more
    if found is not None:
        base = json.loads(Path(found).read_text(encoding="utf-8")).get("base_model_name_or_path")
        raise RecipeError(
            f"{place}: {source.model!r} is a LoRA adapter of {base!r} and not a model. Merge the two first, in Python: "
            f"AutoPeftModelForCausalLM.from_pretrained({source.model!r}).merge_and_unload().save_pretrained('merged'), "
            "save the tokenizer there too, and name that folder"
        )


def refuse_tokens_without_weights(tokenizer: PreTrainedTokenizerBase, rows: int, model: str) -> None:
    """Checks that the embedding has a row for every token that texts may be split into.

    Special tokens that neither end nor pad a text are let through: some models have one for images, which a text
    never holds.

    Args:
        rows: number of rows of the model's embedding.

    Raises:
        RecipeError: if a token has none.
    """
    used = [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id]
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if i >= rows}
    added = tokenizer.added_tokens_decoder
    lost = sorted(i for i in beyond if i in used or not (i in added and added[i].special))
    if lost:
        raise RecipeError(
            f"policy.model: the tokenizer of {model!r} has {len(lost)} tokens without a row in the model's embedding "
            f"of {rows} rows, such as {beyond[lost[0]]!r} (id {lost[0]}). Give the model rows for them by "
            f"`model.resize_token_embeddings({max(lost) + 1})` and save it, or take the tokenizer that it was trained "
            "with"
        )


def refuse_other_tokens(
    ours: Mapping[str, int], theirs: Mapping[str, int], name: str, *, kind: str = "value model"
) -> None:
    """Checks that token ids mean the same to another model and to the policy, whose ids the other model reads.

    A token that only one of them knows is allowed if the other does not use its id for another token.

    Args:
        ours: the policy's ids by token.
        theirs: the other model's.
        name: beginning of the message.
        kind: kind of the other model, for the message.

    Raises:
        RecipeError: if the two vocabularies differ.
    """
    token_of = {i: token for token, i in theirs.items()}
    differing = [token for token, i in ours.items() if theirs.get(token, i) != i or token_of.get(i, token) != token]
    if differing:
        first = differing[0]
        raise RecipeError(
            f"{name} has another tokenizer than the policy: {len(differing)} of {len(ours)} tokens differ, such as "
            f"{first!r} (id {ours[first]} in the policy, {theirs.get(first, 'unknown')} in the {kind}). Use a {kind} "
            "with the policy's tokenizer"
        )
