"""Reference cache: log-probs of dataset completions under a frozen reference, computed once and kept on disk.

::

    <folder>/<key>/
      about.json                    everything that the key is a hash of
      shard-5f0c….safetensors       log-probs of some of the groups

The key is a hash of the reference's weights, of how it is run, and of the completions' token ids: another model
or other data have another key. Groups are scored in the order and in the batches in which the run will draw them,
so that the log-probs of the first pass over the data equal, bit for bit, those of a run without the cache. Shards are
written atomically, and a run that was stopped continues with the shards that it left.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from posttrain.batch import Batch
from posttrain.data.examples.dataset_examples import Examples
from posttrain.data.left_out import LeftOut
from posttrain.errors import UserError
from posttrain.output.progress import Progress
from posttrain.system.files import atomic_write, sync, writing
from posttrain.system.places import expanded
from posttrain.training.learner import Learner, reference_logp
from posttrain.training.recipe import Recipe
from posttrain.training.required_passes import RequiredPasses

SHARD_SECONDS = 30.0  # seconds of work between shards, which a run that is stopped may lose
FORMAT = 1  # version of the format of shards and key


@dataclass(frozen=True)
class ReferencedExamples:
    """Examples whose batches hold the reference's log-probs.

    See :class:`posttrain.data.examples.dataset_examples.Examples`.
    """

    examples: Examples
    logp: Mapping[
        int, np.ndarray
    ]  # log-probs of each group: float32, the chosen tokens of its completions one after another

    @property
    def dropped(self) -> tuple[LeftOut, ...]:
        return self.examples.dropped

    def __len__(self) -> int:
        return len(self.examples)

    def fingerprint(self) -> str:
        return self.examples.fingerprint()

    @property
    def extent(self) -> tuple[int, int]:
        return self.examples.extent

    def with_ids_from(self, size: int) -> Iterator[tuple[str, int]]:
        return self.examples.with_ids_from(size)

    def batch(self, index: Sequence[int]) -> Batch:
        """The completions of some groups, with ``logp_ref``."""
        batch = self.examples.batch(index)
        values = torch.from_numpy(np.concatenate([self.logp[i] for i in index]))
        return batch.set(logp_ref=torch.zeros(batch.mask.shape).masked_scatter(batch.mask, values))


def uses_cache(recipe: Recipe, required: RequiredPasses) -> bool:
    """True if the reference is needed only for log-probs of dataset completions.

    These can be computed before training.
    """
    frozen = recipe.reference.every is None
    whole_model = required.kl_ref or required.value_next  # needs the distribution over every next token
    nothing_sampled = recipe.examples is not None and recipe.opponent is None
    return nothing_sampled and frozen and required.logp_ref and not whole_model and recipe.reference.cache is not False


def with_reference(learner: Learner, examples: Examples, schedule: Sequence[Sequence[int]]) -> ReferencedExamples:
    """Adds the reference's log-probs to the examples: from the cache where it has them, else computed now.

    Called before the first step, on all ranks. A policy that is its own reference still has its initial weights then.

    Args:
        schedule: the groups that each step of the run draws, over all ranks.
    """
    processes = learner.processes
    about = processes.from_main(lambda: describe_key(learner, examples))
    folder = cache_folder(learner.recipe) / key_of(about)
    processes.from_main(lambda: _open(folder, about))
    known = processes.from_main(lambda: sorted(read_shards(folder)))
    missing = first_draws(schedule, set(known))
    if missing:
        processes.together(lambda: compute(learner, examples, missing, folder))
        processes.barrier()
    return ReferencedExamples(examples, read_shards(folder))


def schedule_of(recipe: Recipe, size: int) -> list[list[int]]:
    """The groups that each step of a run draws. They are known before: samplers do not learn from the dataset."""
    sampler = recipe.prompts.call(size=size, seed=recipe.seed)
    return [sampler.draw(recipe.prompts_per_step) for _ in range(recipe.steps)]


def first_draws(schedule: Sequence[Sequence[int]], known: set[int]) -> list[tuple[list[int], set[int]]]:
    """The steps that draw a group for the first time: all groups that they draw, and the new ones among them."""
    seen, steps = set(known), []
    for index in schedule:
        if new := set(index) - seen:
            steps.append((list(index), new))
            seen |= new
    return steps


def compute(learner: Learner, examples: Examples, steps: Sequence[tuple[list[int], set[int]]], folder: Path) -> None:
    """Scores this rank's share of each step as the run will draw it, and writes shards of the new groups."""
    processes, results = learner.processes, {}
    last_shard = time.monotonic()
    with Progress(len(steps), active=processes.is_main, columns=(), unit="reference log-probs, batch") as progress:
        for number, (index, new) in enumerate(steps, start=1):
            if own_index := processes.share_of(index):
                batch = examples.batch(own_index)
                logp = reference_logp(learner, batch)
                results |= {i: values for i, values in zip(own_index, by_group(batch, logp), strict=True) if i in new}
            if results and (number == len(steps) or time.monotonic() - last_shard > SHARD_SECONDS):
                write_shard(folder, results)
                results, last_shard = {}, time.monotonic()
            progress.update(number, {})


def by_group(batch: Batch, logp: Float[Tensor, "N L"]) -> Iterator[np.ndarray]:
    """Log-probs of the chosen tokens of each group, in the order of the groups."""
    for group in batch.group.unique().tolist():
        rows = batch.group == group
        yield logp[rows][batch.mask[rows]].float().numpy()


def write_shard(folder: Path, results: Mapping[int, np.ndarray]) -> None:
    """Writes a shard durably and atomically; its name is a hash of its groups."""
    groups = sorted(results)
    path = folder / f"shard-{hashlib.blake2b(repr(groups).encode(), digest_size=8).hexdigest()}.safetensors"
    tensors = {
        "group": np.array(groups, np.int64),
        "tokens": np.array([len(results[i]) for i in groups], np.int64),
        "logp": np.concatenate([results[i] for i in groups]),
    }
    with atomic_write(path, durable=True) as temporary:
        save_file(tensors, temporary)
    sync(path.parent)


def read_shards(folder: Path) -> dict[int, np.ndarray]:
    """Reads the log-probs of all groups from the shards of a folder.

    Raises:
        UserError: if a file is damaged, with its name.
    """
    logp: dict[int, np.ndarray] = {}
    for path in sorted(folder.glob("shard-*.safetensors")):
        try:
            shard = load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path}: a damaged shard of reference log-probs ({error}); remove it to have it made again"
            ) from error
        pieces = np.split(shard["logp"], shard["tokens"].cumsum()[:-1])
        logp |= dict(zip(shard["group"].tolist(), pieces, strict=True))
    return logp


# -------------------------------------------------------------------------------------------------------------- key


def describe_key(learner: Learner, examples: Examples) -> dict[str, Any]:
    """Everything that the log-probs depend on, as plain data."""
    recipe, model = learner.recipe, learner.reference or learner.policy
    policy = recipe.policy
    return {
        "format": FORMAT,
        "reference": recipe.reference.model or policy.model,
        "revision": None if recipe.reference.model else policy.revision,
        "weights": fingerprint(model),
        "dtype": policy.dtype,
        "attention": policy.attention,
        "temperature": recipe.sampling.temperature,
        "completions": examples.fingerprint(),
        "torch": torch.__version__,
    }


def fingerprint(model: Any) -> str:
    """Hash of a policy's configuration and weights, without adapters, which the reference does not use."""
    made = hashlib.blake2b(digest_size=16)
    configuration = model.base.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype"):
        configuration.pop(name, None)
    made.update(json.dumps(configuration, sort_keys=True, default=str).encode())
    for name, weight in model.base.state_dict().items():
        if ".lora_" in name:
            continue
        made.update(f"{name.replace('.base_layer.', '.')} {weight.dtype} {tuple(weight.shape)}".encode())
        made.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return made.hexdigest()


def key_of(about: Mapping[str, Any]) -> str:
    """Name of the cache folder, from the result of :func:`describe_key`."""
    return hashlib.blake2b(json.dumps(dict(about), sort_keys=True).encode(), digest_size=10).hexdigest()


def cache_folder(recipe: Recipe) -> Path:
    """The folder in which the recipe keeps reference log-probs."""
    folder = recipe.reference.cache
    if isinstance(folder, str):
        return Path(folder)
    if home := os.environ.get("POSTTRAIN_CACHE"):
        return expanded(home) / "reference"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "posttrain" / "reference"


def _open(folder: Path, about: Mapping[str, Any]) -> None:
    with writing(folder, "reference.cache"):
        folder.mkdir(parents=True, exist_ok=True)
    path = folder / "about.json"
    if not path.exists():
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(dict(about), indent=1) + "\n", encoding="utf-8")
