"""Regularisers ``(outputs, batch) -> [N, L]``: loss terms that are added to a preference term.

Each is a mean over some completions of a group, of sums over a completion's tokens unless it says otherwise. With the
normaliser ``group_mean_of_token_sum`` it is a mean over groups.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from posttrain.batch import Batch, Outputs, seq_sum
from posttrain.option_types import Positive, facts
from posttrain.parts.preference.groups import Rows, at_first_token, column, labelled, present, rows_of, share
from posttrain.parts.ratio import needed


@facts(learns_without_advantage=True)
def nll(
    outputs: Outputs, batch: Batch, *, rows: Rows = "best", level: Literal["sum", "mean"] = "sum"
) -> Float[Tensor, "N L"]:
    """Negative log-likelihood of some completions of each group, such as the chosen one of a pair.

    loss_group = -mean_i Σ_t log π(y_it), or -mean_i mean_t log π(y_it)

    Sum: Liu et al. 2024 (RPO), arXiv:2405.16436; Cen et al. 2024 (VPO offline, calibrated on the chosen),
    arXiv:2405.19320. Mean: Pang et al. 2024 (iterative reasoning preference optimisation), arXiv:2404.19733.

    Args:
        rows: the ``best``, ``worst``, all ``labelled``, the ``unlabelled`` or the ``opponent``'s completions.
        level: sum or mean over the tokens of a completion.
    """
    weight = share(batch, rows_of(batch, rows))
    if level == "mean":
        weight = weight / batch.tokens_chosen.clamp(min=1)
    return (-outputs.logp * weight[:, None]).where(batch.mask, 0.0)


@facts(learns_without_advantage=True)
def optimism(
    outputs: Outputs,
    batch: Batch,
    *,
    rows: Rows = "unlabelled",
    name: str | None = None,
    bound: Positive = 10.0,
) -> Float[Tensor, "N L"]:
    """Log-ratio of calibration samples: lowering it moves the policy to completions that it has not tried yet.

    loss_group = mean_i max(s_i, -bound)

    Cen et al. 2024 (VPO online), arXiv:2405.19320; Xie et al. 2024 (XPO), arXiv:2405.21046, with ``coef`` α:
    samples of the reference. With a negative ``coef`` it is VPO's pessimism offline.

    The unbounded term has no minimum, so a completion that is ``bound`` nats below the reference has no gradient. The
    reference's log-probs, which the papers leave out, change only the value.

    Args:
        rows: kind of the completions that are calibration samples.
        name: column that is true at calibration samples, in place of ``rows``: for samples that are also compared.
        bound: largest drop of the log-ratio, in nats.
    """
    calibration = rows_of(batch, rows)
    if name is not None:
        calibration = present(batch) & (column(batch, range(len(batch)), name) > 0)
    s = seq_sum(outputs.logp - needed(batch, "logp_ref"), batch.mask)
    return at_first_token(s.clamp(min=-bound) * share(batch, calibration), batch.mask)


@facts(learns_without_advantage=True)
def reference_kl(outputs: Outputs, batch: Batch) -> Float[Tensor, "N L"]:
    """KL divergence from the reference along the labelled completions, exact over the vocabulary.

    loss_group = mean_i Σ_t KL(π_ref(· | y_<t) ‖ π(· | y_<t))

    Abdolmaleki et al. 2024 (PMPO), arXiv:2410.04166, with ``coef`` β.

    Raises:
        ValueError: if the forward pass has not computed the divergences.
    """
    if outputs.kl_ref is None:
        raise ValueError("the loss term reference_kl needs outputs.kl_ref, which the forward pass did not compute")
    weight = share(batch, labelled(batch))
    return (outputs.kl_ref * weight[:, None]).where(batch.mask, 0.0)
