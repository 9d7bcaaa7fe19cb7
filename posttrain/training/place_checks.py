"""Checks of the places that a recipe names, before anything large is loaded."""

from __future__ import annotations

import torch

from posttrain.decoding.build import check_models
from posttrain.engines import uses_vllm
from posttrain.engines.vllm_cpu import check_cache
from posttrain.models.load import configuration_of
from posttrain.system.files import check_output_folder
from posttrain.training.recipe import Recipe
from posttrain.training.reference_cache import cache_folder, uses_cache
from posttrain.training.required_passes import RequiredPasses


def check_places(recipe: Recipe, required: RequiredPasses) -> None:
    """Checks that the models beside the policy are there, that vLLM's cache fits, and the other cache can be written.

    Raises:
        UserError: if not; begins with the setting.
    """
    trust = recipe.policy.trust_remote_code
    named = {"reference.model": recipe.reference.model, "value.model": recipe.value.model if recipe.value else None}
    for place, model in named.items():
        if model is not None:
            configuration_of(place, model, trust_remote_code=trust)
    check_models(recipe.decoder)
    samples = recipe.examples is None or (recipe.evaluate is not None and recipe.evaluate.data is not None)
    if samples and uses_vllm(recipe.engine) and not torch.cuda.is_available():
        check_cache(recipe.engine.cache_mb)
    if uses_cache(recipe, required):
        check_output_folder(cache_folder(recipe), "reference.cache")
