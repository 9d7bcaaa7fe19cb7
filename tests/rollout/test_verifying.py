"""Tests of what verifiers are given by the commands that sample: text, ending and prompt, in branches too."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from tabular_engine import TabularEngine

from posttrain.engines.base import Sampling
from posttrain.recipe.part import Part
from posttrain.recipe.resolve import resolve
from posttrain.rollout.branches import BranchPoint, branch_scores
from posttrain.rollout.collect import CompletionSource, generate_and_verify
from posttrain.rollout.rollouts import Prompts, single_turn
from posttrain.verify import VerifierPool

A, END, PROMPT = range(3)
VERIFIER = """
NAMES = ("stopped", "length", "aborted")

def told(completion, *, prompt_text, finish):
    return 100.0 * NAMES.index(finish) + 10 * len(completion) + (prompt_text == "Q")
"""


def decode(ids) -> str:
    return "".join("A.Q"[i] for i in ids if i != END)


def source(tmp_path: Path, pool_of) -> CompletionSource:
    never = math.log(1e-30)
    table = {(PROMPT, *[A] * n): [0.0 if n < 3 else never, never if n < 3 else 0.0, never] for n in range(6)}
    engine = TabularEngine(table, eos=[END], max_model_len=64)  # writes AAA and ends
    return CompletionSource(engine=engine, verifiers=pool_of, rollout=Part.of(single_turn), decode=decode)


def pool(tmp_path: Path) -> VerifierPool:
    (tmp_path / "told.py").write_text(VERIFIER)
    spec = f"{tmp_path / 'told.py'}:told"
    return VerifierPool([Part.of(resolve(spec), settings={"spec": spec})], workers=1)


def test_verifiers_are_told_the_ending_and_the_prompt(tmp_path: Path) -> None:
    prompts = Prompts(tokens=[[PROMPT]], rows=[{}], places=["x"], group=[0], seeds=[1])
    point = BranchPoint([PROMPT], [A], {}, seed=1, at=(0, 0))
    with pool(tmp_path) as verifiers:
        on = source(tmp_path, verifiers)
        batch, _ = generate_and_verify(on, prompts, 1, Sampling(max_tokens=8), {})
        assert batch.score.tolist() == [31.0], "stopped after AAA, with the prompt"
        batch, _ = generate_and_verify(on, prompts, 1, Sampling(max_tokens=2), {})
        assert batch.score.tolist() == [121.0], "cut off after AA"
        assert branch_scores(on, [point], 1, Sampling(max_tokens=8)).tolist() == [[31.0]]
        assert branch_scores(on, [point], 1, Sampling(max_tokens=2)).tolist() == [[121.0]]
        longer = BranchPoint([PROMPT], [A, A], {}, seed=1, at=(0, 0))  # shares a call, in which it may write too much
        scores = branch_scores(on, [point, longer], 1, Sampling(max_tokens=3))
        assert torch.equal(scores, torch.tensor([[131.0], [131.0]]))
