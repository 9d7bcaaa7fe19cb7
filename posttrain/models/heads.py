"""Heads: linear layers that turn a hidden state into a value, or into a distribution over values.

Sizes in the shape annotations: ``H`` hidden size, ``K`` outputs of a member (bins, quantiles, the vocabulary), ``M``
members; ``...`` is any number of states.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from posttrain.recipe import sections


def output_count(head: sections.HeadSection, vocabulary: int) -> int:
    """Number of outputs that a member of the head has for a state."""
    if head.type in ("categorical", "quantile"):
        return head.bins
    return vocabulary if head.type == "per_token" else 1


def bin_centres(head: sections.HeadSection) -> Float[Tensor, " K"]:
    """The centres of a categorical head's bins: equally spaced from ``low`` to ``high``, ends included."""
    return torch.linspace(head.low, head.high, head.bins)


class Head(nn.Module):
    """A linear layer for each member, all of them stored as one layer, on float32 copies of the hidden states.

    There is no dropout. A head of one member starts with zero outputs, so that it claims nothing. Several members
    start with different random weights of standard deviation 1 / sqrt(H + 1) (Stiennon et al. 2020, arXiv:2009.01325),
    so that they stay different. The random weights are the same in every process.
    """

    def __init__(self, head: sections.HeadSection, hidden: int, vocabulary: int, members: int = 1) -> None:
        super().__init__()
        self.options, self.members = head, members
        if head.type == "implicit":  # computed from log-probs: its head is the language model's own output layer
            return
        self.outputs = output_count(head, vocabulary)
        # no bias in a per-token head, as in the output layer of a language model
        self.linear = nn.Linear(hidden, members * self.outputs, bias=head.type != "per_token")
        nn.init.zeros_(self.linear.weight)
        if self.linear.bias is not None:
            nn.init.zeros_(self.linear.bias)
        if members > 1:
            generator = torch.Generator().manual_seed(0)
            nn.init.normal_(self.linear.weight, std=1 / math.sqrt(hidden + 1), generator=generator)

    def forward(self, hidden: Float[Tensor, "... H"]) -> Float[Tensor, "... M K"]:
        """Outputs of every member, in float32 even under autocast."""
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if self.linear.bias is None else self.linear.bias.float()
            outputs = nn.functional.linear(hidden.float(), self.linear.weight.float(), bias)
        return outputs.unflatten(-1, (self.members, self.outputs))

    def of_tokens(self, hidden: Float[Tensor, "m H"], token: Int[Tensor, " m"]) -> Float[Tensor, "m M"]:
        """A per-token head's output for one next token of each state; the other tokens are not computed."""
        with torch.autocast(hidden.device.type, enabled=False):
            rows = self.linear.weight.unflatten(0, (self.members, self.outputs))[:, token].float()
            return torch.einsum("mh,kmh->mk", hidden.float(), rows)

    def decode(self, outputs: Float[Tensor, "... K"]) -> Float[Tensor, " ..."]:
        """Converts a member's outputs to a value.

        scalar: the output. categorical: sum_k softmax(outputs)_k centre_k. quantile: the mean. bernoulli:
        sigmoid(output), the probability of reward 1.

        Raises:
            ValueError: if the head is a per-token head, which has one value for each next token.
        """
        if self.options.type == "categorical":
            return outputs.softmax(-1) @ bin_centres(self.options).to(outputs)
        if self.options.type == "quantile":
            return outputs.mean(-1)
        if self.options.type == "bernoulli":
            return outputs.squeeze(-1).sigmoid()
        if self.options.type == "scalar":
            return outputs.squeeze(-1)
        raise ValueError("a per-token head has a value for each next token, not one")
