"""The decoders of the slot ``decoder``, by their bare names: ``(engine, context) -> engine``."""

from __future__ import annotations

from typing import Any

from posttrain.decoding.context import DecoderContext, ModelPath
from posttrain.decoding.from_recipe import decoder_part
from posttrain.decoding.model_scores import head_value
from posttrain.decoding.population import Population
from posttrain.decoding.rejection import Rejection
from posttrain.decoding.shaping import Shaped
from posttrain.decoding.tree import TreeSearch
from posttrain.engines.base import Engine
from posttrain.errors import RecipeError
from posttrain.models.value_files import load_value
from posttrain.option_types import Positive, PositiveCount, facts

shaped = decoder_part(Shaped, "shaped", __name__)
population = decoder_part(Population, "population", __name__)
rejection = decoder_part(Rejection, "rejection", __name__)
tree = decoder_part(TreeSearch, "tree", __name__)


@facts(exact_logp=True, needs_hidden_states=True)
def edited(
    engine: Engine,
    context: DecoderContext,
    *,
    model: ModelPath,
    step_size: Positive = 0.5,
    steps: PositiveCount = 30,
) -> Engine:
    """Edits the last hidden state before every token by gradient steps on a value.

    u <- u + step_size · ∇_h V(h + u)

    Kong et al. 2024 (RE-Control), arXiv:2406.05954. See :class:`posttrain.decoding.editing.Edited`.

    Args:
        model: a value model on the policy's own hidden states.
        step_size: the paper takes 0.2 to 1.
        steps: number of gradient steps for a token; the paper takes 30 to 200.

    Raises:
        RecipeError: if the engine does not give its hidden states, or if the value model reads hidden states of another
            size.
    """
    from posttrain.decoding.editing import Edited  # here: both import much that others do not need
    from posttrain.engines.transformers import TransformersEngine

    if not isinstance(engine, TransformersEngine):
        raise RecipeError("engine.use: edited needs hidden states, which vLLM does not give: set it to transformers")
    value: Any = context.loaded("value in float32", model, lambda: load_value(model))
    size, value_size = (each.config.get_text_config().hidden_size for each in (engine.model, value.decoder))
    if size != value_size:
        raise RecipeError(
            f"decoder: {model!r} was trained on hidden states of size {value_size}, but the policy's have size {size}"
        )
    return Edited(engine, head_value(value), step_size=step_size, steps=steps)
