"""The contenders: posttrain and TRL on a training step, posttrain's engine and bare vLLM.

Each contender runs in its own process and takes a turn at each go-ahead: one step of training, or one round of
generation. Both contenders of a pair get the same model, prompts, reward, batch, loss and optimiser.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import workload
from alternating import Timed, Turns

SHARES = ("generate", "verify", "score", "update", "load", "other")
"""Stages of a step whose time posttrain's loop reports."""


@dataclass(frozen=True)
class Settings:
    """The settings of the measurement; every process gets a copy."""

    size: str
    dtype: str
    engine: str
    prompts: int
    completions: int
    even_length: int
    max_length: int
    micro_batch: int  # completions in a forward pass of TRL
    micro_batch_tokens: int  # padded tokens in a forward pass of posttrain
    trl_continuous_batching: bool
    steps: int
    warmup: int
    threads: int
    folder: str
    cases: tuple[workload.Lengths, ...]
    lengths: workload.Lengths = "even"

    @property
    def batch(self) -> int:
        return self.prompts * self.completions

    @property
    def limit(self) -> int:
        """Most tokens of a completion."""
        return self.even_length if self.lengths == "even" else self.max_length

    @property
    def model(self) -> Path:
        return Path(self.folder, f"model-{self.lengths}")

    @property
    def data(self) -> Path:
        return Path(self.folder, "prompts.jsonl")


def work_posttrain(settings: Settings, turns: Turns) -> None:
    """Runs a recipe by ``posttrain.train``, whose prompt sampler waits for the go-ahead."""
    from posttrain import load_recipe, train
    from posttrain.batch import Batch
    from posttrain.output.tracking import read_metrics

    run_folder = Path(settings.folder, f"posttrain-{settings.lengths}")
    recipe = load_recipe(write_recipe(settings, run_folder))
    build = recipe.prompts.call
    generated: list[int] = []

    def waiting(**arguments: Any) -> Any:
        sampler = build(**arguments)
        draw = sampler.draw

        def draw_in_turn(n: int) -> list[int]:
            if generated:
                turns.done(lengths=list(generated), times=times(read_metrics(run_folder)[-1]))
                generated.clear()
            turns.wait()
            return draw(n)

        sampler.draw = draw_in_turn
        return sampler

    def noting(engine: Any, *arguments: Any) -> Batch:
        batch = recipe.rollout(engine, *arguments)
        generated.extend(batch.tokens_chosen.tolist())
        return batch

    train(
        dataclasses.replace(
            recipe,
            prompts=dataclasses.replace(recipe.prompts, call=waiting),
            rollout=dataclasses.replace(recipe.rollout, call=noting),
        )
    )


def write_recipe(settings: Settings, run_folder: Path) -> Path:
    """Writes a recipe for GRPO with the token-level loss, like TRL's default, and returns its path."""
    import yaml

    recipe = {
        "policy": {"model": str(settings.model), "dtype": settings.dtype},
        "data": {"path": str(settings.data)},
        "verify": [{"use": f"{Path(workload.__file__).resolve()}:early_letters"}],
        "advantage": {"use": "outcome", "center": "group", "scale": "group"},
        "loss": [{"use": "clip", "low": 0.2, "high": 0.2}],
        "normaliser": {"use": "token_mean"},
        "sampling": {"temperature": 1.0, "max_tokens": settings.limit},
        "engine": {"use": settings.engine, "max_concurrent": settings.batch},
        "optimizer": {"learning_rate": 1.0e-6},
        "steps": settings.warmup + settings.steps + 1,
        "prompts_per_step": settings.prompts,
        "completions": settings.completions,
        "micro_batch_tokens": settings.micro_batch_tokens,
        "run": {"folder": str(run_folder), "save_every": 10**6},
    }
    path = Path(settings.folder, f"posttrain-{settings.lengths}.yaml")
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def times(metrics: dict[str, Any]) -> dict[str, float]:
    """Times of a step as the loop measures them, in seconds."""
    return {name: metrics[f"time/{name}"] or 0.0 for name in (*SHARES, "step")}


def work_trl(settings: Settings, turns: Turns) -> None:
    """Runs TRL's GRPOTrainer with its `generate`; a callback waits for the go-ahead."""
    from datasets import load_dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    lengths: list[int] = []

    def reward(completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        lengths.extend(len(ids) for ids in completion_ids)
        return workload.early_letters(completions)

    class Waiting(TrainerCallback):
        def on_step_begin(self, *arguments: Any, **keywords: Any) -> None:
            turns.wait()  # TRL generates after this

        def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
            turns.done(lengths=list(lengths), times={"generate": generate.seconds, "step": 0.0})
            lengths.clear()
            generate.seconds = 0.0

    arguments = GRPOConfig(
        output_dir=str(Path(settings.folder, f"trl-{settings.lengths}")),
        model_init_kwargs={"dtype": "float32"},
        bf16=settings.dtype == "bfloat16",
        use_cpu=settings.engine == "vllm" or not _has_gpu(),
        per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=settings.batch // settings.micro_batch,
        num_generations=settings.completions,
        max_completion_length=settings.limit,
        max_steps=settings.warmup + settings.steps,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        temperature=1.0,
        beta=0.0,
        epsilon=0.2,
        loss_type="dapo",  # the mean over all tokens of the batch
        scale_rewards="group",
        gradient_checkpointing=False,
        use_transformers_continuous_batching=settings.trl_continuous_batching,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    trainer = GRPOTrainer(
        model=str(settings.model),
        reward_funcs=reward,
        args=arguments,
        train_dataset=load_dataset("json", data_files=str(settings.data), split="train"),
        processing_class=AutoTokenizer.from_pretrained(settings.model, padding_side="left"),
        callbacks=[Waiting()],
    )
    generate = Timed(trainer._generate_single_turn)
    trainer._generate_single_turn = generate
    trainer.train()


def work_engine(settings: Settings, turns: Turns) -> None:
    """Runs posttrain's vLLM engine on the requests of one step."""
    from posttrain.engines.base import Sampling
    from posttrain.engines.vllm import VllmEngine

    ids, seeds = requests(settings)
    engine = VllmEngine(
        settings.model, dtype=settings.dtype, max_model_len=_context(ids, settings), max_concurrent=settings.batch
    )
    sampling = Sampling(max_tokens=settings.limit)
    for _ in range(settings.warmup + settings.steps):
        turns.wait()
        completions = engine.generate(ids, sampling, n=settings.completions, seeds=seeds)
        turns.done(lengths=[len(completion.tokens) for group in completions for completion in group])
    engine.close()


def work_bare_vllm(settings: Settings, turns: Turns) -> None:
    """Runs ``vllm.LLM`` without posttrain's changes on the same requests: prompts, seeds and requested log-probs."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams

    from posttrain.seeds import sample_seed

    ids, seeds = requests(settings)
    llm = LLM(
        str(settings.model),
        dtype=settings.dtype,
        max_model_len=_context(ids, settings),
        max_num_seqs=settings.batch,
        logprobs_mode="processed_logprobs",
        enable_prefix_caching=True,
        enforce_eager=True,
        kv_cache_memory_bytes=512 << 20,
        block_size=32,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in ids for _ in range(settings.completions)]
    parameters = [
        SamplingParams(max_tokens=settings.limit, seed=sample_seed(seed, j), logprobs=0, detokenize=False)
        for seed in seeds
        for j in range(settings.completions)
    ]
    for _ in range(settings.warmup + settings.steps):
        turns.wait()
        llm.reset_prefix_cache()  # a step begins with new weights
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        turns.done(lengths=[len(output.outputs[0].token_ids) for output in outputs])


def requests(settings: Settings) -> tuple[list[list[int]], list[int]]:
    """Token ids and a seed for each prompt."""
    from transformers import AutoTokenizer

    from posttrain.system.files import read_rows

    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    texts = [row["prompt"] for row in read_rows(settings.data)]
    return [tokenizer(text).input_ids for text in texts], list(range(len(texts)))


def _context(ids: Sequence[Sequence[int]], settings: Settings) -> int:
    """Length of the longest prompt and completion."""
    return max(map(len, ids)) + settings.limit


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


WORKERS = {"posttrain": work_posttrain, "trl": work_trl, "engine": work_engine, "bare_vllm": work_bare_vllm}
