"""Peak memory and time of a training step with policy, reference and value model on one copy of the weights or three.

    python benchmarks/shared_backbone.py [--size 20m] [--json FILE]

Three set-ups run, each in its own process: ``shared`` (one copy of the weights with adapters of the policy and of the
value model; the reference is the model without adapters), ``three_with_adapters`` (adapters of the same rank, each on
its own copy of the weights) and ``three_full`` (all weights of policy and value model are trained). A step is a pass of
the reference, a joint backward pass through policy and value model, and an AdamW step. All set-ups get the same tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import workload
from online_step import write_result
from torch import Tensor

from posttrain.models.joint import JointModel
from posttrain.models.load import load_model
from posttrain.models.policy import Policy, build_policy
from posttrain.models.value_files import build_value
from posttrain.recipe import sections
from posttrain.system.memory import peak_bytes

SETUPS = ("shared", "three_with_adapters", "three_full")


@dataclass(frozen=True)
class Settings:
    """The settings of the measurement."""

    model: str
    setup: str = SETUPS[0]
    checkpointing: bool = False
    rank: int = 16
    rows: int = 2
    columns: int = 256
    warmup: int = 1
    steps: int = 4
    threads: int = 1
    seed: int = 0


def build_models(settings: Settings) -> tuple[JointModel, Policy]:
    """Builds policy and value model, and the reference, which is the policy itself if weights are shared."""
    lora = None if settings.setup == "three_full" else sections.LoraSection(rank=settings.rank, alpha=2 * settings.rank)
    section = sections.PolicySection(model=settings.model, lora=lora, gradient_checkpointing=settings.checkpointing)
    policy = build_policy(section)
    if settings.setup == "shared":
        return JointModel(policy, build_value(sections.ValueSection(share=True), section, policy)), policy
    value = build_value(sections.ValueSection(lora=lora), section, policy)
    reference = Policy(load_model(section, dtype=torch.float32)).requires_grad_(False).eval()
    return JointModel(policy, value), reference


def draw_tokens(settings: Settings, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, the mask of chosen ones (all but the first eighth), and the states."""
    generator = torch.Generator().manual_seed(settings.seed)
    tokens = torch.randint(3, vocabulary, (settings.rows, settings.columns), generator=generator)
    mask = (torch.arange(settings.columns) >= settings.columns // 8).expand_as(tokens)
    return tokens, mask, mask | torch.nn.functional.pad(mask[:, 1:], (0, 1))


def take_step(
    trained: JointModel, reference: Policy, optimizer: torch.optim.Optimizer, inputs: tuple[Tensor, Tensor, Tensor]
) -> float:
    """Takes one step; returns the loss before it. The advantage is arbitrary, which does not change the costs."""
    tokens, mask, states = inputs
    with torch.no_grad():
        logp_ref, _ = reference(tokens, mask, reference=reference.has_adapters)
    passes = trained.train()(tokens, mask, states, temperature=1.0, entropy=False)
    advantage = torch.linspace(-1, 1, len(tokens))[:, None]
    loss = (-advantage * (passes.logp - logp_ref) + 0.1 * (passes.logp - logp_ref).square())[mask].mean()
    loss = loss + (passes.value[0] - advantage)[states].square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def peak_mib() -> float:
    """Peak memory of this process in MiB: of the GPU if there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_bytes() / 2**20


def resident_mib() -> float:
    """Memory that this process holds now, in MiB."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 2**20
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def tensors_mib(trained: JointModel, reference: Policy, optimizer: torch.optim.Optimizer) -> float:
    """Memory of weights and optimiser moments in MiB; shared tensors count once."""
    moments = [item for state in optimizer.state.values() for item in state.values() if isinstance(item, Tensor)]
    tensors = [*trained.parameters(), *reference.parameters(), *moments]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values()) / 2**20


def measure(settings: Settings) -> dict[str, Any]:
    """Memory above that of a process that has imported everything but holds no model, and seconds a step.

    Compare processor seconds on a CPU that other programs use too.
    """
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    empty = resident_mib()
    trained, reference = build_models(settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained, reference = trained.to(device), reference.to(device)
    assert trained.policy is not None
    vocabulary = trained.policy.base.config.get_text_config().vocab_size
    tokens, mask, states = (tensor.to(device) for tensor in draw_tokens(settings, vocabulary))
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-4)
    walls, processors, losses = [], [], []
    for _ in range(settings.warmup + settings.steps):
        wall, processor = time.perf_counter(), time.process_time()
        losses.append(take_step(trained, reference, optimizer, (tokens, mask, states)))
        walls.append(time.perf_counter() - wall)
        processors.append(time.process_time() - processor)
    return {
        "peak_mib": round(peak_mib() - empty, 1),
        "weights_and_moments_mib": round(tensors_mib(trained, reference, optimizer), 1),
        "trained_parameters": sum(p.numel() for p in trained.parameters() if p.requires_grad),
        "step_seconds": spread(walls[settings.warmup :]),
        "step_processor_seconds": spread(processors[settings.warmup :]),
        "losses": losses,
    }


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, smallest and largest value."""
    return {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}


def measure_apart(settings: Settings) -> dict[str, Any]:
    """Runs :func:`measure` in a fresh process."""
    command = [sys.executable, __file__, "--child", json.dumps(asdict(settings))]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(answer.splitlines()[-1])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--size", choices=tuple(workload.SIZES), default="20m")
    for name in ("rank", "rows", "columns", "warmup", "steps", "threads", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Settings, name))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = vars(parse_arguments())
    path, size, child = (arguments.pop(name) for name in ("json", "size", "child"))
    if child is not None:
        print(json.dumps(measure(Settings(**json.loads(child)))))
        return
    results: dict[str, Any] = {"without_checkpointing": {}, "with_checkpointing": {}}
    with tempfile.TemporaryDirectory(prefix="shared-backbone-") as folder:
        parameters = workload.build_model(Path(folder), workload.SIZES[size], "even", limit=arguments["columns"])
        for name, checkpointing in (("without_checkpointing", False), ("with_checkpointing", True)):
            for setup in SETUPS:
                figures = measure_apart(Settings(model=folder, setup=setup, checkpointing=checkpointing, **arguments))
                results[name][setup] = figures
                seconds = figures["step_processor_seconds"]
                print(
                    f"{name:21} {setup:19} peak {figures['peak_mib']:7.0f} MiB, weights and moments "
                    f"{figures['weights_and_moments_mib']:6.0f} MiB, step {seconds['median']:.2f} s "
                    f"({seconds['least']:.2f} to {seconds['most']:.2f}) of processor time",
                    flush=True,
                )
    write_result(path, results | {"parameters": parameters, "settings": {"size": size, **arguments}})


if __name__ == "__main__":
    main()
