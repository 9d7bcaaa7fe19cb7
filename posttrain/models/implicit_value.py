"""Implicit values: the log-ratio of a language model trained on outcomes to its base is the value of a prefix.

Sizes in the shape annotations: ``N`` completions, ``L`` columns.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from posttrain.models.adapters import POLICY_ADAPTER
from posttrain.models.heads import Head
from posttrain.models.policy import Policy
from posttrain.models.value import ValueModel, ValueSpec


class ImplicitValue(ValueModel):
    """A causal language model φ whose log-ratio to its frozen base is the value of a prefix, in log-odds.

        V_t = β Σ_s≤t log π_φ(y_s | y_<s) / π_base(y_s | y_<s), over the tokens s that the policy chose

    Trained such that σ(V) at the end is the probability that the answer is right: Yuan et al. 2024, arXiv:2412.01981;
    while the policy learns from V_t - V_t-1: Cui et al. 2025 (PRIME), arXiv:2502.01456.

    The chosen tokens are found from the states: a token counts as chosen if its column and the column before it are
    both states. So a single token of tool output between two chosen ones counts as chosen too.

    Args:
        backbone: the language model, or PEFT's wrapper of one, which may be the policy's.
        spec: the meaning of the values; its head holds β.
        base: the model that training started from; it is frozen here. Default: the backbone without its adapters.
        adapter: name of the language model's adapter on the backbone. Default: it has none.
    """

    def __init__(
        self, backbone: nn.Module, spec: ValueSpec, base: Policy | None = None, adapter: str | None = None
    ) -> None:
        super().__init__(backbone, Head(spec.head, hidden=0, vocabulary=0), spec, adapter)
        self.base = None if base is None else base.requires_grad_(False).eval()

    @property
    def language_model(self) -> Policy:
        """The language model as a policy, which gives its log-probs."""
        return Policy(self.backbone, self.adapter or POLICY_ADAPTER)

    def train(self, mode: bool = True) -> ImplicitValue:
        """Sets the mode. The base stays in evaluation mode, so that it has no dropout."""
        super().train(mode)
        if self.base is not None:
            self.base.eval()
        return self

    def on(self, backbone: nn.Module, adapter: str | None = None) -> ImplicitValue:
        """Moves to another backbone as :meth:`ValueModel.on` does; the base is kept."""
        return ImplicitValue(backbone, self.spec, self.base, adapter)

    def forward(
        self, tokens: Int[Tensor, "N L"], states: Bool[Tensor, "N L"], *, members: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Log-odds of the prefixes that end at ``states``, float32, 0 elsewhere and before the first chosen token.

        Gradients flow through φ only.

        Args:
            states: all states of each completion, because the value is a sum over them.
            members: adds a first dimension of 1 to the results, for the only member.

        Returns:
            ``value [N, L]`` and the same as ``logits [N, L, 1]``, the logit of the outcome that ``bce`` reads.

        Raises:
            ValueError: if a completion has only one state, in which no chosen token can be found.
        """
        if bool((states.sum(-1) == 1).any()):
            raise ValueError("an implicit value is a sum over the completion: `states` must mark all of its tokens")
        ratios = self.log_ratios(tokens, states & nn.functional.pad(states[:, :-1], (1, 0)))
        value = (self.spec.head.beta * ratios.cumsum(-1)).where(states, 0.0)
        value = value[None] if members else value
        return value, value[..., None]

    def log_ratios(self, tokens: Int[Tensor, "N L"], chosen: Bool[Tensor, "N L"]) -> Float[Tensor, "N L"]:
        """log π_φ / π_base at the chosen tokens, 0 elsewhere, float32."""
        model = self.language_model
        with torch.no_grad():
            base, _ = (self.base or model)(tokens, chosen, reference=self.base is None)
        logp, _ = model(tokens, chosen)
        return logp - base
