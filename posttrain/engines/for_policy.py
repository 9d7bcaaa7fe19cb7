"""Makes the engine of a policy, long enough for the prompts and completions of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from posttrain.engines import make_engine, uses_vllm
from posttrain.engines.base import Engine
from posttrain.engines.ends import say_ends, stop_tokens
from posttrain.errors import UserError
from posttrain.models.load import check_checkpoint, context_length
from posttrain.recipe import sections


class LengthBudget(NamedTuple):
    """The positions that a call of the engine needs, in tokens."""

    prompt: int
    """Length of the longest prompt."""
    completion: int
    """Most tokens of a completion."""
    setting: str = "sampling.max_tokens"
    """Name of the setting that limits the completion."""
    place: str = ""
    """Place of the row with the longest prompt."""
    branches: int = 0
    """Further positions for a call with several branches."""

    @property
    def positions(self) -> int:
        """Positions that the context window must have: prompt, completion and branches."""
        return self.prompt + self.completion + self.branches

    def __str__(self) -> str:
        where = f", {self.place}" if self.place else ""
        parts = [f"the longest prompt ({self.prompt} tokens{where})", f"{self.setting} ({self.completion})"]
        parts += [f"further positions for branches ({self.branches})"] if self.branches else []
        return f"{', '.join(parts[:-1])} and {parts[-1]}"


def policy_engine(
    policy: sections.PolicySection,
    engine: sections.EngineSection,
    needed: Sequence[LengthBudget],
    *,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> Engine:
    """Makes the engine of a policy, as long as ``engine.max_model_len`` says or the largest budget needs.

    Args:
        tokenizer: the policy's, which names ends of a turn beside the model.

    Raises:
        UserError: if the largest budget exceeds ``engine.max_model_len`` or the model's positions.
    """
    largest = max(needed, key=lambda budget: budget.positions)
    length, limit = engine.max_model_len or largest.positions, context_length(policy)
    for positions, name in ((length, "engine.max_model_len"), (limit, policy.model)):
        if positions is not None and largest.positions > positions:
            raise UserError(
                f"{largest} need {largest.positions} positions; {name} has {positions}. Lower {largest.setting} or set "
                "data.max_prompt_tokens."
            )
    return engine_of_length(policy, engine, length, tokenizer=tokenizer, seed=seed)


def engine_of_length(
    policy: sections.PolicySection,
    engine: sections.EngineSection,
    length: int,
    *,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> Engine:
    """Makes the engine of a policy for prompts and completions of at most ``length`` tokens together.

    It stops at the ends of a turn that the recipe, or else the chat template, the tokenizer or the model names. If
    these differ, it says so.

    Raises:
        UserError: if the model has fewer positions, or if weights are missing in its checkpoint.
    """
    limit = context_length(policy)
    if limit is not None and length > limit:
        raise UserError(f"engine.max_model_len: {length} is more than the {limit} positions of {policy.model}")
    if uses_vllm(engine):
        check_checkpoint(policy)
    say_ends(policy, tokenizer)
    return make_engine(
        policy.model,
        engine,
        dtype=policy.dtype,
        max_model_len=length,
        seed=seed,
        revision=policy.revision,
        trust_remote_code=policy.trust_remote_code,
        ends=stop_tokens(policy, tokenizer),
    )
