"""Preference models: language models that are trained to name the better of two completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from posttrain.batch import pad
from posttrain.errors import UserError
from posttrain.micro_batches import length_groups
from posttrain.parts.preference.games import Rivals
from reward_models.comparing import Comparer
from reward_models.implicit import language_model
from reward_models.judge import as_text, check_template, filled
from reward_models.loading import Dtype, check_model, device, tokenizer_of

QUESTION = (
    "Which of the two answers is better? Say A or B.\n\n[What was asked]\n{prompt}\n\n[Answer A]\n{a}\n\n"
    "[Answer B]\n{b}"
)
ANSWERS = ("A", "B")


def question(prompt: Any, a: str, b: str, template: str = QUESTION) -> str:
    """The question to a preference model. ``recipes/data/comparisons.py`` trains on the same words."""
    return filled(template, prompt=as_text(prompt), a=a, b=b)


class PreferenceModel(Comparer):
    """Win rates by a language model that was trained to say which of two answers is better.

    P(i first, i wins) = p(A | question) / (p(A | question) + p(B | question)), at the first token of the answer

    Dong et al. 2024 (RLHF workflow, pairwise preference model), arXiv:2405.07863; trained by
    ``recipes/preference/preference_model.yaml``.

    Args:
        model: folder or hub name. The question goes through its chat template, if it has one.
        template: template of the question; ``{prompt}``, ``{a}`` and ``{b}`` are filled in.
        against: see :class:`reward_models.comparing.Comparer`.
        itself: see :class:`reward_models.comparing.Comparer`.
        center: see :class:`reward_models.comparing.Comparer`.
        dtype: dtype of the weights.
        micro_batch_tokens: padded tokens in one forward pass.

    Raises:
        RecipeError: if a placeholder is missing in the template.
    """

    def __init__(
        self,
        *,
        model: str,
        template: str = QUESTION,
        against: Rivals = "group",
        itself: bool = False,
        center: float = 0.0,
        dtype: Dtype = "float32",
        micro_batch_tokens: int = 16384,
    ) -> None:
        check_template(template, ("prompt", "a", "b"))
        super().__init__(against=against, itself=itself, center=center)
        self.model, self.template, self.dtype, self.micro_batch_tokens = model, template, dtype, micro_batch_tokens

    def needs(self) -> set[str]:
        """Fields of the batch that the model reads. Fails if the model does not exist."""
        check_model(self.model)
        return {"rows", "texts", "group"}

    @torch.inference_mode()
    def first_wins(self, ordered: Sequence[tuple[Any, str, str]]) -> Float[Tensor, " Q"]:
        """Implements :meth:`reward_models.comparing.Comparer.first_wins`."""
        model, tokenizer = language_model(self.model, self.dtype), tokenizer_of(self.model)
        ids = [_ids(question(prompt, a, b, self.template), tokenizer) for prompt, a, b in ordered]
        lengths = torch.tensor([len(row) for row in ids])
        answers = torch.tensor(_first_tokens(tokenizer), device=device())
        probabilities = torch.zeros(len(ids))
        for rows in length_groups(lengths, self.micro_batch_tokens):
            tokens = pad([ids[row] for row in rows], dtype=torch.long)
            hidden = model.hidden_states(tokens.to(device()))[torch.arange(len(rows)), lengths[rows] - 1]
            probabilities[rows] = model.next_logits(hidden)[:, answers].softmax(-1)[:, 0].cpu()
        return probabilities


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a question, through the chat template if there is one."""
    if tokenizer.chat_template is None:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]
    messages = [{"role": "user", "content": text}]
    encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def _first_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """First tokens of the two answers.

    Raises:
        UserError: if both answers begin with the same token.
    """
    first = [tokenizer(answer, add_special_tokens=False)["input_ids"][0] for answer in ANSWERS]  # type: ignore[index]
    if len(set(first)) < len(ANSWERS):
        raise UserError(
            f"preference model: its tokenizer encodes the answers {ANSWERS} with the same first token, so that they "
            "cannot be distinguished. Use a model with another tokenizer"
        )
    return first
