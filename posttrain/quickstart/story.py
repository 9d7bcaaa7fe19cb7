"""Chapters of the quickstart. Each prints what it does and how long it took."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from posttrain.output.run_folder import RunFolder
from posttrain.output.tracking import read_metrics
from posttrain.quickstart.model import make_model, make_tokenizer
from posttrain.quickstart.start import (
    HELD_OUT,
    SHARE_WORKED_OUT,
    WARM_UP_STEPS,
    Start,
    prompt_ids,
    warm_up,
    write_problems,
)
from posttrain.system.files import read_rows
from posttrain.training import loop as training
from posttrain.training.recipe import load_recipe
from posttrain.verify.mathematics import math

MOST_THREADS = 4  # threads; more of them slow down a model of this size
SAMPLES = 4  # completions shown before and after
MAX_TOKENS = 48


def prepare(path: Path, seed: int) -> Start:
    """Makes problems and a warmed-up model."""
    start = Start(path)
    path.mkdir(parents=True)
    disable_progress_bar()  # loading and saving take no time here
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")  # vLLM looks at old names of torch
    torch.set_num_threads(min(torch.get_num_threads(), MOST_THREADS))
    with chapter("1. Problems: additions of three-digit numbers, generated here"):
        write_problems(start, seed)
        print(f"{SHARE_WORKED_OUT:.0%} of the demonstrations add up column by column. The others round to hundreds and")
        print(f"are nearly always wrong. {HELD_OUT} problems are held out from everything that follows.")
        show("demonstration", read_rows(start.demonstrations)[:SAMPLES], None)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed)
    size = f"{model.num_parameters() / 1e6:.2f}M parameters"
    with chapter(f"2. Warm-up: {WARM_UP_STEPS} supervised steps on a Qwen3 model of {size} with random weights"):
        warm_up(model, tokenizer, read_rows(start.demonstrations), seed=seed)
        model.save_pretrained(start.model)
        tokenizer.save_pretrained(start.model)
        print("The model has taken over both habits: now it works a problem out, now it estimates.")
    return start


def train(recipe: Path, start: Start, folder: Path, engine: str, seed: int) -> None:
    """Trains by the recipe, as ``posttrain train`` does."""
    overrides = [
        f"--policy.model={start.model}",
        f"--data.path={start.train}",
        f"--evaluate.data.path={start.held_out}",
        f"--run.folder={folder}",
        f"--engine.use={engine}",
        f"--seed={seed}",
    ]
    if engine == "vllm":
        overrides.append("--engine.options.use_tqdm_on_load=false")
    with chapter(f"3. GRPO by {recipe.name}: the math verifier rewards right answers to completions of the engine"):
        training.train(load_recipe(recipe, overrides))


def compare(start: Start, folder: Path, seed: int) -> tuple[float, float]:
    """Prints completions before and after training, and uses the saved model.

    Returns:
        Held-out accuracy before and after, as the run measured it.
    """
    lines = [line for line in read_metrics(folder) if "eval/accuracy" in line]
    before, after = (float(line["eval/accuracy"] or 0) for line in (lines[0], lines[-1]))
    rows = read_rows(start.held_out)[:SAMPLES]
    with chapter("4. Before and after, on held-out problems"):
        print("Accuracy is the share of right answers among samples at temperature 1.0, the same before and after.")
        for name, path in (("before", start.model), ("after", RunFolder(folder).model)):
            show(name, rows, answers(path, [row["prompt"] for row in rows], seed=seed))
        print("The saved model, loaded with AutoModelForCausalLM.from_pretrained and decoded greedily:")
        show("saved model", rows[:1], answers(RunFolder(folder).model, [rows[0]["prompt"]]))
    return before, after


def where_things_are(recipe: Path, start: Start, folder: Path) -> None:
    """Prints the paths and commands for a closer look."""
    run = RunFolder(folder)
    print(f"""
Recipe       {recipe}, with all its defaults in {run.recipe}
Start        {start.path}: problems and the warmed-up model
Run folder   {run.path}: rollouts, checkpoints, metrics in {run.metrics}
Curves       tensorboard --logdir {run.path / "tensorboard"}
Once more    posttrain train {run.recipe} --run.folder=runs/again --optimizer.learning_rate=1e-4
Model        {run.model}:
             AutoModelForCausalLM.from_pretrained("{run.model}"), AutoTokenizer.from_pretrained("{run.model}")
""")


@torch.no_grad()
def answers(folder: Path, prompts: Sequence[str], *, seed: int | None = None) -> list[str]:
    """Completes each prompt with a saved model: sampled at temperature 1 with ``seed``, greedily without."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([prompt_ids(tokenizer, prompt) for prompt in prompts])  # all problems are equally long
    options = (
        {"do_sample": False} if seed is None else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed or 0)
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, **options)
    return tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)


def show(title: str, rows: Sequence[dict[str, str]], completions: Sequence[str] | None) -> None:
    """Prints problems with their completions, one on each line, with the verifier's verdict on ``completions``."""
    for row, text in zip(rows, completions or [row["completion"] for row in rows], strict=True):
        verdict = ""
        if completions is not None:
            verdict = "  right" if math(text, answer=row["answer"]) else f"  wrong, it is {row['answer']}"
        print(f"  {title}: {row['prompt']}  {text.replace(chr(10), '  ')}{verdict}")


@contextmanager
def chapter(title: str) -> Iterator[None]:
    """Prints a heading before the block, and the seconds it took after it."""
    print(f"\n{title}", flush=True)
    began = time.monotonic()
    yield
    print(f"  ({time.monotonic() - began:.0f} s)", flush=True)
