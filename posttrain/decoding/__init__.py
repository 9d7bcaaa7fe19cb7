"""Decoders: a decoder wraps an engine and a prefix score and has the same interface as an engine.

Read ``base.py`` first. May import from reward_models, data, engines, verify, models, parts and the rooms to their left.

``Shaped`` tilts the distribution of every token, ``Population`` grows particles and picks survivors, ``Rejection``
draws from the distribution that a population aims at, ``TreeSearch`` searches, ``Edited`` moves hidden states. All have
the interface of :class:`posttrain.engines.base.Engine`.

Log-probs of a completion refer to the distribution that its tokens were drawn from: the shaped or edited one. Samples
of populations, rejection and trees have no log-probs in closed form; there they are those of the engine's own
distribution. Decoders write into ``Completion.measured``:

* ``generated``: tokens sampled for this completion, including those that were discarded
* ``scored``: prefixes scored for it; a vocabulary vector counts as one
* ``base_logp``: log-prob of the completion under the base distribution, at the sampling temperature
* ``kl``: nats; exact KL of each step's shaped distribution to the base distribution, summed along the completion. Its
  mean over completions is the sequence KL
* ``kl_bound``: nats; the mean over completions is an upper bound of the KL of a blockwise best-of-n
* ``log_weight``, ``log_z``: log weight of the answer's particle, and log of the population's unbiased estimate of Z
* ``accepted``, ``log_z_upper``: for rejection sampling, 1 if the completion is an exact draw of the tilted
  distribution, and then an estimate of log Z that is too high on average, as ``log_z`` is too low
"""
