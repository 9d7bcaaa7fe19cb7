"""Speed, memory and quality of offline preference learning, beside TRL's DPOTrainer.

    python benchmarks/preference.py --json benchmarks/results/preference_cpu.json

All sides train the same Qwen2-shaped model with a vocabulary of 151,936 on the same pairs in the same order, with
the same loss, optimiser, batch and dtype. Completions have heavy-tailed lengths. Each side lives in a process of its
own and takes one step at a time, in turns, so that all see the same machine; its memory is the most that the process
has held, from its start until the trained model is saved. The reference's pass over the data, which posttrain makes
before the first step and DPOTrainer in every step, is counted as part of the steps. Afterwards one more process samples
from each trained model: its reward is the share of early letters, which is also what makes a completion the chosen one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import workload
from online_step import write_result
from alternating import Timed, Turns, Worker

WORDS = 2048  # tokens that the texts are made of; the model's vocabulary is larger, as it would be
SIZE = workload.Size(hidden=256, layers=6, heads=4, kv_heads=2, intermediate=768, vocabulary=151936)
EARLY, LATE = "bcdfghjklm", "nprstvwz"
HELD_OUT = 32


@dataclass(frozen=True)
class Settings:
    """The settings of the measurement; every process gets a copy."""

    folder: str
    pairs: int  # a step
    micro_batch: int  # pairs in a forward pass of TRL
    micro_batch_tokens: int  # padded tokens in a forward pass of posttrain
    steps: int
    warmup: int
    median: int  # words of a completion
    longest: int
    beta: float
    learning_rate: float
    threads: int

    @property
    def model(self) -> Path:
        return Path(self.folder, "model")

    @property
    def data(self) -> Path:
        return Path(self.folder, "pairs.jsonl")

    @property
    def held_out(self) -> Path:
        return Path(self.folder, "held_out.jsonl")

    def trained(self, side: str) -> Path:
        """Where a side puts its model."""
        return Path(self.folder, side, "model")

    def worker(self, name: str) -> Worker:
        """The worker process of a side, or the judge's."""
        return Worker(WORKERS[name], self, Path(self.folder, f"{name}.log"))


# ------------------------------------------------------------------------------------------------------------- workload


def words(generator: random.Random, count: int, share: float) -> str:
    """Made-up words; each begins with an early letter with a probability of ``share``."""
    made = []
    for _ in range(count):
        letters = EARLY if generator.random() < share else LATE
        made.append("".join(generator.choice(letters) + generator.choice("aeiou") for _ in range(2)))
    return " ".join(made)


def pair(seed: int, median: int, longest: int) -> dict[str, str]:
    """A prompt of 24 to 40 words, and two completions with log-normal lengths, sigma 1, that are cut at ``longest``."""
    generator = random.Random(seed)
    lengths = [min(longest, max(1, round(median * generator.lognormvariate(0, 1.0)))) for _ in range(2)]
    chosen, rejected = (words(generator, n, share) for n, share in zip(lengths, (0.8, 0.2), strict=True))
    return {
        "prompt": words(generator, generator.randint(24, 40), 0.5) + ":",
        "chosen": " " + chosen,
        "rejected": " " + rejected,
    }


def build(settings: Settings) -> int:
    """Model, tokenizer and pairs in the folder; the number of parameters."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = {field.name: getattr(SIZE, field.name) for field in dataclasses.fields(SIZE)}
    config = Qwen2Config(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=workload.EOS,
        pad_token_id=workload.SPECIALS.index("<pad>"),
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(settings.model)
    workload.save_tokenizer(settings.model, WORDS)
    count = settings.pairs * (settings.warmup + settings.steps)
    for path, seeds in ((settings.data, range(count)), (settings.held_out, range(10**6, 10**6 + HELD_OUT))):
        rows = (json.dumps(pair(seed, settings.median, settings.longest)) + "\n" for seed in seeds)
        path.write_text("".join(rows), encoding="utf-8")
    return sum(parameter.numel() for parameter in model.parameters())


def tokens_of_steps(settings: Settings) -> list[list[int]]:
    """Prompt + completion tokens of both sides of every pair, step by step."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    rows = [json.loads(line) for line in settings.data.read_text().splitlines()]
    lengths = [
        [
            len(tokenizer(row["prompt"]).input_ids) + len(tokenizer(row[side]).input_ids) + 1
            for side in ("chosen", "rejected")
        ]
        for row in rows
    ]
    return [sum(lengths[i : i + settings.pairs], []) for i in range(0, len(rows), settings.pairs)]


# ---------------------------------------------------------------------------------------------------------------- sides


def work_posttrain(settings: Settings, turns: Turns) -> None:
    """posttrain's side: a recipe run by ``posttrain.train``, whose prompt sampler waits for the go-ahead."""
    import yaml

    from posttrain import load_recipe, train
    from posttrain.training import loop as training
    from posttrain.training import reference_cache

    recipe = {
        "policy": {"model": str(settings.model), "dtype": "float32"},
        "reference": {"cache": str(Path(settings.folder, "cache"))},
        "data": {"path": str(settings.data)},
        "examples": {"use": "pairs"},
        "prompts": {"use": "sequential"},
        "loss": [{"use": "pairwise", "beta": settings.beta}],
        "normaliser": {"use": "group_mean_of_token_sum"},
        "optimizer": {"learning_rate": settings.learning_rate},
        "steps": settings.warmup + settings.steps,
        "prompts_per_step": settings.pairs,
        "micro_batch_tokens": settings.micro_batch_tokens,
        "run": {"folder": str(Path(settings.folder, "posttrain")), "save_every": 10**6, "rollouts_every": 0},
    }
    path = Path(settings.folder, "posttrain.yaml")
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    loaded = load_recipe(path)
    build_sampler = loaded.prompts.call
    reference = Timed(reference_cache.compute)
    reference_cache.compute = reference
    samplers: list[Any] = []

    def report() -> None:
        turns.done(reference_seconds=reference.seconds, reference_cpu_seconds=reference.cpu_seconds)

    def save_when_told(*arguments: Any) -> None:
        report()
        turns.wait()
        save(*arguments)

    save, training.save_checkpoint = training.save_checkpoint, save_when_told  # after the last step alone

    def waiting(**arguments: Any) -> Any:
        sampler = build_sampler(**arguments)
        samplers.append(sampler)
        if len(samplers) == 1:
            return sampler  # tells the cache what the run will draw
        draw = sampler.draw

        def draw_when_told(n: int) -> list[int]:
            report()
            turns.wait()
            return draw(n)

        sampler.draw = draw_when_told
        return sampler

    train(dataclasses.replace(loaded, prompts=dataclasses.replace(loaded.prompts, call=waiting)))
    report()


def work_trl(settings: Settings, turns: Turns, *, precompute: bool = False) -> None:
    """TRL's side: DPOTrainer, whose callback waits for the go-ahead."""
    from datasets import load_dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Waiting(TrainerCallback):
        def on_step_begin(self, *arguments: Any, **keywords: Any) -> None:
            turns.wait()

        def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
            turns.done(**before)

    side = "trl_precomputed" if precompute else "trl"
    arguments = DPOConfig(
        output_dir=str(Path(settings.folder, side)),
        model_init_kwargs={"dtype": "float32"},
        bf16=False,
        use_cpu=True,
        beta=settings.beta,
        per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=settings.pairs // settings.micro_batch,
        max_steps=settings.warmup + settings.steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        max_length=None,
        gradient_checkpointing=False,
        precompute_ref_log_probs=precompute,
        train_sampling_strategy="sequential",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    precomputing = Timed(DPOTrainer._precompute_ref_logps)
    DPOTrainer._precompute_ref_logps = lambda self, *given: precomputing(self, *given)
    trainer = DPOTrainer(
        model=str(settings.model),
        args=arguments,
        train_dataset=load_dataset(
            "json", data_files=str(settings.data), split="train", cache_dir=str(Path(settings.folder, side, "data"))
        ),
        processing_class=AutoTokenizer.from_pretrained(settings.model),
        callbacks=[Waiting()],
    )
    before = {"reference_seconds": precomputing.seconds, "reference_cpu_seconds": precomputing.cpu_seconds}
    trainer.train()
    turns.wait()
    trainer.save_model(str(settings.trained(side)))
    turns.done(**before)


def work_trl_precomputed(settings: Settings, turns: Turns) -> None:
    """TRL's trainer with ``precompute_ref_log_probs``."""
    work_trl(settings, turns, precompute=True)


def work_judge(settings: Settings, turns: Turns) -> None:
    """Each turn: what one more of the trained models has become, beside the one that they all began as."""
    import torch

    from posttrain.models.policy import build_policy
    from posttrain.recipe.sections import PolicySection

    reference = build_policy(PolicySection(model=str(settings.model))).eval()
    for side in (None, *SIDES):
        turns.wait()
        policy = reference if side is None else build_policy(PolicySection(model=str(settings.trained(side)))).eval()
        with torch.no_grad():
            turns.done(**judged(settings, policy, reference))


def judged(settings: Settings, policy: Any, reference: Any) -> dict[str, float]:
    """Accuracy and margin on held-out pairs; reward of samples of 32 tokens and their divergence from the reference."""
    import torch
    from transformers import AutoTokenizer

    from posttrain.data.examples import pairs
    from posttrain.recipe.sections import DataSection

    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    examples = pairs(DataSection(path=str(settings.held_out)), tokenizer, None)
    gaps = []
    for i in range(len(examples)):
        batch = examples.batch([i])
        chosen, rejected = (
            (policy(batch.tokens, batch.mask)[0] - reference(batch.tokens, batch.mask)[0]).sum(-1).tolist()
        )
        gaps.append(settings.beta * (chosen - rejected))
    torch.manual_seed(0)
    rewards, divergences = [], []
    for line in settings.held_out.read_text().splitlines()[:4]:
        prompt = torch.tensor([tokenizer(json.loads(line)["prompt"]).input_ids] * 8)
        length = prompt.shape[1]
        tokens = policy.base.generate(
            prompt, do_sample=True, max_new_tokens=32, min_new_tokens=32, top_k=0, top_p=1.0, use_cache=True
        )
        mask = (torch.arange(tokens.shape[1]) >= length).expand(tokens.shape)
        divergences += (policy(tokens, mask)[0] - reference(tokens, mask)[0]).sum(-1).tolist()
        rewards += [early_words(tokenizer.decode(row[length:].tolist())) for row in tokens]
    sums = {"held_out_accuracy": statistics.mean(0.5 + 0.5 * ((gap > 0) - (gap < 0)) for gap in gaps)}
    sums |= {"held_out_margin": statistics.mean(gaps), "reward": statistics.mean(rewards)}
    return sums | {"kl_from_reference": statistics.mean(divergences)}


def early_words(text: str) -> float:
    """Share of the text's consonants that are early ones; 0 without any."""
    early, late = (sum(letter in letters for letter in text) for letters in (EARLY, LATE))
    return early / max(1, early + late)


SIDES = ("trl", "trl_precomputed", "posttrain")
WORKERS = {"posttrain": work_posttrain, "trl": work_trl, "trl_precomputed": work_trl_precomputed, "judge": work_judge}


# -------------------------------------------------------------------------------------------------------------- results


def measure(settings: Settings) -> dict[str, list[dict[str, Any]]]:
    """The turns of each side, the warm-up too, step by step after each other."""
    tokens = tokens_of_steps(settings)
    workers = {name: settings.worker(name) for name in SIDES}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
    try:
        for number, lengths in enumerate(tokens):
            order = list(SIDES)[number % len(SIDES) :] + list(SIDES)[: number % len(SIDES)]
            for name in order:
                turn = workers[name].turn() | {"tokens": sum(lengths)}
                turns[name].append(turn)
                warm = "" if number >= settings.warmup else "  (warm-up)"
                print(
                    f"  {name:16s}{turn['seconds']:8.2f} s{sum(lengths) / turn['seconds']:8.0f} tokens/s{warm}",
                    flush=True,
                )
        for name in SIDES:  # one more turn, to save the model
            turns[name].append(workers[name].turn() | {"tokens": 0})
    finally:
        for worker in workers.values():
            worker.stop()
    return turns


def summary(turns: Sequence[dict[str, Any]], settings: Settings) -> dict[str, float]:
    """Tokens a second of the measured steps, with their share of a reference pass made before; peak memory."""
    measured = turns[settings.warmup : -1]
    tokens = sum(turn["tokens"] for turn in measured)
    part = tokens / sum(turn["tokens"] for turn in turns)
    found: dict[str, float] = {}
    for name, kind in (("seconds", ""), ("cpu_seconds", "cpu_")):
        steps, before = sum(turn[name] for turn in measured), turns[-1][f"reference_{name}"] * part
        found |= {f"tokens_per_{kind}second": tokens / (steps + before), f"{kind}seconds": steps + before}
        found |= {f"reference_{kind}seconds": before}
    return found | {"peak_memory_mb": turns[-1]["peak_memory_mb"]}


def ratios(sides: dict[str, dict[str, float]], other: str) -> dict[str, float]:
    """posttrain's figures over those of another side."""
    ours, theirs = sides["posttrain"], sides[other]
    return {
        name: ours[name] / theirs[name] for name in ("tokens_per_second", "tokens_per_cpu_second", "peak_memory_mb")
    }


def judge(settings: Settings) -> dict[str, dict[str, float]]:
    """Quality of the model that each contender trained; ``start`` is the model that all of them began with."""
    worker = settings.worker("judge")
    names = ("held_out_accuracy", "held_out_margin", "reward", "kl_from_reference")
    try:
        turns = {side: worker.turn() for side in ("start", *SIDES)}
    finally:
        worker.stop()
    return {side: {name: turn[name] for name in names} for side, turn in turns.items()}


def print_table(result: dict[str, Any]) -> None:
    """The figures a reader wants first."""
    columns = ("tokens/s", "s", "peak MB", "held-out accuracy", "margin", "reward", "KL")
    print("\n" + f"{'':16s}" + "".join(f"{name:>19s}" for name in columns))
    for side in ("start", *SIDES):
        speed, quality = result["sides"].get(side, {}), result["quality"][side]
        numbers = [speed.get("tokens_per_second"), speed.get("seconds"), speed.get("peak_memory_mb"), *quality.values()]
        print(
            f"{side:16s}"
            + "".join(
                f"{'' if number is None else format(number, '.3g' if number < 100 else '.0f'):>19s}"
                for number in numbers
            )
        )
    for other, its in result["ratio"].items():
        found = ", ".join(f"{name} {value:.2f}" for name, value in its.items())
        print(f"posttrain over {other}: {found}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--pairs", type=int, default=8, help="pairs a step")
    parser.add_argument("--micro-batch", type=int, default=4, help="pairs in a forward pass of TRL")
    parser.add_argument("--micro-batch-tokens", type=int, default=2048, help="tokens in a forward pass of posttrain")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each side")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--median", type=int, default=20, help="words of a completion, about 2 tokens each")
    parser.add_argument("--longest", type=int, default=128)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser.parse_args()


def main() -> None:
    arguments = vars(parse_arguments())
    path = arguments.pop("json")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, here for all sides
    with tempfile.TemporaryDirectory(prefix="preference-") as folder:
        settings = Settings(**arguments, folder=folder)
        parameters = build(settings)
        print(f"{parameters / 1e6:.1f}M parameters, float32, {settings.pairs} pairs a step", flush=True)
        turns = measure(settings)
        quality = judge(settings)
    sides = {side: summary(its, settings) for side, its in turns.items()}
    result: dict[str, Any] = {"ratio": {other: ratios(sides, other) for other in ("trl", "trl_precomputed")}}
    result |= {"sides": sides, "quality": quality, "parameters": parameters, "vocabulary": SIZE.vocabulary}
    result |= {"settings": arguments}
    print_table(result)
    write_result(path, result)


if __name__ == "__main__":
    main()
