"""Checks of the places that a recipe names, before anything large is loaded."""

from __future__ import annotations

from posttrain.decoding.build import check_models
from posttrain.models.load import configuration_of
from posttrain.system.files import check_output_folder
from posttrain.training.recipe import Recipe
from posttrain.training.reference_cache import cache_folder, uses_cache
from posttrain.training.required_passes import RequiredPasses


def check_places(recipe: Recipe, required: RequiredPasses) -> None:
    """Checks that the models beside the policy are there, and that the reference cache can be written.

    Raises:
        UserError: if not; begins with the setting.
    """
    trust = recipe.policy.trust_remote_code
    named = {"reference.model": recipe.reference.model, "value.model": recipe.value.model if recipe.value else None}
    for place, model in named.items():
        if model is not None:
            configuration_of(place, model, trust_remote_code=trust)
    check_models(recipe.decoder)
    if uses_cache(recipe, required):
        check_output_folder(cache_folder(recipe), "reference.cache")
