"""Decoders: an engine and a score of prefixes make an engine.

``Shaped`` tilts the law of every token, ``Population`` lets particles grow and picks survivors, ``Rejection`` draws
from the law that a population aims at, ``TreeSearch`` searches, ``Edited`` moves hidden states. All have the interface
of :class:`posttrain.engines.base.Engine`.

Log-probs of a completion are those of the law its tokens were drawn from where that law is known: the shaped or edited
one, or the engine's own for populations, rejection and trees, whose samples follow no law with log-probs in closed
form. What decoders write into ``Completion.measured``:

* ``generated``: tokens sampled for this completion, discarded ones included
* ``scored``: prefixes scored for it; a vocabulary vector counts as one
* ``base_logp``: log-prob of the completion under the base law, at the sampling temperature
* ``kl``: nats; exact KL of each step's shaped law to the base law, summed along the completion. Its mean over
  completions is the sequence KL
* ``kl_bound``: nats; the mean over completions is an upper bound of the KL of a blockwise best-of-n
* ``log_weight``, ``log_z``: of the answer's particle, and of its population's unbiased estimate of Z
* ``accepted``, ``log_z_upper``: by rejection sampling: whether the completion is an exact draw of the tilted law, and
  then an estimate of log Z that is too high on average, as ``log_z`` is too low
"""
