"""Speed, memory and quality of offline preference learning, beside TRL's DPOTrainer.

    python benchmarks/preference.py --json benchmarks/results/preference_cpu.json

All sides train the same Qwen2-shaped model with a vocabulary of 151,936 on the same pairs in the same order, with the
same loss, optimiser, batch and dtype. Completions have heavy-tailed lengths. Each side runs in its own process, and
they take steps in turns, so that all see the same machine. The memory of a side is the peak of its process, from its
start until the trained model is saved. The reference's pass over the data, which posttrain makes before the first step
and DPOTrainer in every step, counts as part of the steps. Afterwards one more process samples from each trained model.
The reward is the share of early letters, by which chosen and rejected completions differ too.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import workload
from alternating import Timed, Turns, Worker
from online_step import write_result

WORDS = 2048  # tokens that occur in the texts; the model's vocabulary is larger, as in real models
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
        """Folder of the model that a side trained."""
        return Path(self.folder, side, "model")

    def worker(self, name: str) -> Worker:
        """Starts the worker process of a side, or that of the judge."""
        return Worker(WORKERS[name], self, Path(self.folder, f"{name}.log"))


# ------------------------------------------------------------------------------------------------------------- workload


def words(generator: random.Random, count: int, share: float) -> str:
    """Made-up words; each has early letters with probability ``share``."""
    drawn = []
    for _ in range(count):
        letters = EARLY if generator.random() < share else LATE
        drawn.append("".join(generator.choice(letters) + generator.choice("aeiou") for _ in range(2)))
    return " ".join(drawn)


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
    """Writes model, tokenizer and pairs to the folder; returns the number of parameters."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from posttrain.system.files import write_rows

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
        write_rows(path, (pair(seed, settings.median, settings.longest) for seed in seeds))
    return sum(parameter.numel() for parameter in model.parameters())


def tokens_of_steps(settings: Settings) -> list[list[int]]:
    """Numbers of prompt + completion tokens of both sides of every pair, step by step."""
    from transformers import AutoTokenizer

    from posttrain.system.files import read_rows

    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    rows = read_rows(settings.data)
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
    """Runs a recipe by ``posttrain.train``, whose prompt sampler waits for the go-ahead."""
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

    def save_in_turn(*arguments: Any) -> None:
        report()
        turns.wait()
        save(*arguments)

    save, training.save_checkpoint = training.save_checkpoint, save_in_turn  # called after the last step only

    def waiting(**arguments: Any) -> Any:
        sampler = build_sampler(**arguments)
        samplers.append(sampler)
        if len(samplers) == 1:
            return sampler  # the first one shows the cache which rows the run will draw
        draw = sampler.draw

        def draw_in_turn(n: int) -> list[int]:
            report()
            turns.wait()
            return draw(n)

        sampler.draw = draw_in_turn
        return sampler

    train(dataclasses.replace(loaded, prompts=dataclasses.replace(loaded.prompts, call=waiting)))
    report()


def work_trl(settings: Settings, turns: Turns, *, precompute: bool = False) -> None:
    """Runs TRL's DPOTrainer; a callback waits for the go-ahead."""
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
    DPOTrainer._precompute_ref_logps = lambda self, *args: precomputing(self, *args)
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
    """Measures one model in each turn: first the start model, then the trained ones."""
    import torch

    from posttrain.models.policy import build_policy
    from posttrain.recipe.sections import PolicySection

    reference = build_policy(PolicySection(model=str(settings.model))).eval()
    for side in (None, *SIDES):
        turns.wait()
        policy = reference if side is None else build_policy(PolicySection(model=str(settings.trained(side)))).eval()
        with torch.no_grad():
            turns.done(**quality(settings, policy, reference))


def quality(settings: Settings, policy: Any, reference: Any) -> dict[str, float]:
    """Accuracy and margin on held-out pairs; reward of samples of 32 tokens and their divergence from the reference."""
    import torch
    from transformers import AutoTokenizer

    from posttrain.data.examples import pairs
    from posttrain.models.text import text_of
    from posttrain.recipe.sections import DataSection
    from posttrain.system.files import read_rows

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
    for row in read_rows(settings.held_out)[:4]:
        prompt = torch.tensor([tokenizer(row["prompt"]).input_ids] * 8)
        length = prompt.shape[1]
        tokens = policy.base.generate(
            prompt, do_sample=True, max_new_tokens=32, min_new_tokens=32, top_k=0, top_p=1.0, use_cache=True
        )
        mask = (torch.arange(tokens.shape[1]) >= length).expand(tokens.shape)
        divergences += (policy(tokens, mask)[0] - reference(tokens, mask)[0]).sum(-1).tolist()
        rewards += [early_letters(text_of(tokenizer, special=True)(ids[length:].tolist())) for ids in tokens]
    means = {"held_out_accuracy": statistics.mean(0.5 + 0.5 * ((gap > 0) - (gap < 0)) for gap in gaps)}
    means |= {"held_out_margin": statistics.mean(gaps), "reward": statistics.mean(rewards)}
    return means | {"kl_from_reference": statistics.mean(divergences)}


def early_letters(text: str) -> float:
    """Share of early ones among the text's consonants; 0 for a text without consonants."""
    early, late = (sum(letter in letters for letter in text) for letters in (EARLY, LATE))
    return early / max(1, early + late)


SIDES = ("trl", "trl_precomputed", "posttrain")
WORKERS = {"posttrain": work_posttrain, "trl": work_trl, "trl_precomputed": work_trl_precomputed, "judge": work_judge}


# -------------------------------------------------------------------------------------------------------------- results


def measure(settings: Settings) -> dict[str, list[dict[str, Any]]]:
    """Lets the sides take turns, step by step; returns the turns of each, including the warm-up."""
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
    """Tokens a second of the measured steps, with their share of an earlier reference pass; peak memory."""
    measured = turns[settings.warmup : -1]
    tokens = sum(turn["tokens"] for turn in measured)
    share = tokens / sum(turn["tokens"] for turn in turns)
    figures: dict[str, float] = {}
    for name, kind in (("seconds", ""), ("cpu_seconds", "cpu_")):
        steps, reference = sum(turn[name] for turn in measured), turns[-1][f"reference_{name}"] * share
        figures |= {f"tokens_per_{kind}second": tokens / (steps + reference), f"{kind}seconds": steps + reference}
        figures |= {f"reference_{kind}seconds": reference}
    return figures | {"peak_memory_mb": turns[-1]["peak_memory_mb"]}


def ratios(sides: dict[str, dict[str, float]], other: str) -> dict[str, float]:
    """Ratios of posttrain's numbers to those of another side."""
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
    """Prints the main results."""
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
    for other, by_name in result["ratio"].items():
        numbers = ", ".join(f"{name} {value:.2f}" for name, value in by_name.items())
        print(f"posttrain over {other}: {numbers}")


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
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # the command line sets it too; here it is for all sides
    with tempfile.TemporaryDirectory(prefix="preference-") as folder:
        settings = Settings(**arguments, folder=folder)
        parameters = build(settings)
        print(f"{parameters / 1e6:.1f}M parameters, float32, {settings.pairs} pairs a step", flush=True)
        turns = measure(settings)
        qualities = judge(settings)
    sides = {side: summary(side_turns, settings) for side, side_turns in turns.items()}
    result: dict[str, Any] = {"ratio": {other: ratios(sides, other) for other in ("trl", "trl_precomputed")}}
    result |= {"sides": sides, "quality": qualities, "parameters": parameters, "vocabulary": SIZE.vocabulary}
    result |= {"settings": arguments}
    print_table(result)
    write_result(path, result)


if __name__ == "__main__":
    main()
