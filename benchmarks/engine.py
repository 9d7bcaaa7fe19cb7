"""Measures the engines: start-up, weight loads, agreement of log-probs, and tokens a second beside plain libraries.

    python benchmarks/engine.py [--engine vllm] [--engine transformers] [--size 20M] [--json FILE]

vLLM's engine is compared with ``vllm.LLM.generate`` in a separate process that runs without posttrain's engine. The
transformers engine is compared with ``model.generate`` on left-padded prompts. Both get the same requests, in turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from posttrain.engines import make_engine
from posttrain.engines.base import Completion, Engine, Sampling
from posttrain.recipe.sections import EngineSection
from posttrain.seeds import sample_seed

SIZES = {  # parameters: hidden size, layers, vocabulary
    "0.1M": {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 261},
    "20M": {"hidden_size": 512, "num_hidden_layers": 6, "vocab_size": 2048},
    "100M": {"hidden_size": 768, "num_hidden_layers": 12, "vocab_size": 16384},
}
LENGTHS = {  # even: all have the maximum; heavy-tailed: geometric, with a maximum of 16 times the mean
    "even": Sampling(max_tokens=64, ignore_eos=True),
    "heavy_tailed": Sampling(max_tokens=384, ignore_eos=True),
}
MEAN_LENGTH = 24  # mean of the heavy-tailed lengths


@dataclasses.dataclass(frozen=True)
class Setting:
    """The settings of a measurement, and the memory that it may use."""

    model: str
    dtype: str = "float32"
    max_model_len: int = 448
    cache_mb: int = 512
    max_concurrent: int = 64


def build_model(folder: str | Path, size: str) -> None:
    """Saves a Qwen2-shaped model with random weights under ``folder``."""
    shape = SIZES[size]
    heads = shape["hidden_size"] // 32
    config = Qwen2Config(
        **shape,
        intermediate_size=4 * shape["hidden_size"],
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 4, 1),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=1,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)


def draw_prompts(count: int, vocabulary: int, longest: int = 48) -> list[list[int]]:
    """Draws prompts of 8 to ``longest`` random tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(8, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(2, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def with_mean_length(sampling: Sampling, vocabulary: int, mean: int) -> Sampling:
    """Makes a share of 1 / ``mean`` of the vocabulary stop tokens: lengths of an untrained model are then geometric."""
    return dataclasses.replace(sampling, stop_token_ids=tuple(range(2, 2 + round(vocabulary / mean))))


def count_tokens(outputs: Sequence[Sequence[Completion]]) -> int:
    return sum(len(completion.tokens) for row in outputs for completion in row)


def engine_over_bare_vllm(
    engine: Engine, setting: Setting, prompts: list[list[int]], sampling: Sampling, *, n: int = 4, repeats: int = 5
) -> dict[str, float]:
    """Tokens a second of a vLLM engine and of ``vllm.LLM.generate`` with the same requests, and the median ratio.

    They take turns, and each goes first in every second turn, so that a machine that slows down slows both.
    """
    context = multiprocessing.get_context("spawn")
    connection, child = context.Pipe()
    process = context.Process(target=_serve_bare_vllm, args=(child, setting), daemon=True)
    process.start()

    def bare(seeds: list[int]) -> float:
        connection.send((prompts, n, seeds, sampling))
        tokens, seconds = connection.recv()
        return tokens / seconds

    def ours(seeds: list[int]) -> float:
        begin = time.perf_counter()
        outputs = engine.generate(prompts, sampling, n, seeds=seeds)
        return count_tokens(outputs) / (time.perf_counter() - begin)

    figures = _take_turns(ours, bare, len(prompts), repeats)
    connection.send(None)
    process.join()
    return {"engine": figures[0], "bare_vllm": figures[1], "ratio": figures[2]}


def _serve_bare_vllm(connection: Connection, setting: Setting) -> None:
    """Entry point of the bare vLLM process: answers requests with the number of sampled tokens and the seconds."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    from vllm import LLM

    from posttrain.engines.vllm import sampling_params

    memory = {} if torch.cuda.is_available() else {"kv_cache_memory_bytes": setting.cache_mb << 20, "block_size": 32}
    llm = LLM(
        setting.model,
        dtype=setting.dtype,
        max_model_len=setting.max_model_len,
        max_num_seqs=setting.max_concurrent,
        enforce_eager=not torch.cuda.is_available(),
        logprobs_mode="processed_logprobs",
        skip_tokenizer_init=True,
        disable_log_stats=True,
        **({"gpu_memory_utilization": 0.4} if torch.cuda.is_available() else memory),
    )
    while (task := connection.recv()) is not None:
        prompts, n, seeds, sampling = task
        requests = [{"prompt_token_ids": prompt} for prompt in prompts for _ in range(n)]
        params = [sampling_params(sampling, ()) for _ in requests]
        for k, param in enumerate(params):
            param.seed = sample_seed(seeds[k // n], k % n)
        begin = time.perf_counter()
        outputs = llm.generate(requests, params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        connection.send((sum(len(output.outputs[0].token_ids) for output in outputs), seconds))


def engine_over_generate(
    engine: Engine, setting: Setting, prompts: list[list[int]], sampling: Sampling, *, n: int = 4, repeats: int = 5
) -> dict[str, float]:
    """Tokens a second of a transformers engine and of ``model.generate`` on left-padded prompts; the median ratio."""
    model = AutoModelForCausalLM.from_pretrained(setting.model, dtype=getattr(torch, setting.dtype)).eval()
    if torch.cuda.is_available():
        model = model.cuda()
    rows = [prompt for prompt in prompts for _ in range(n)]

    def generate(seeds: list[int]) -> float:
        torch.manual_seed(seeds[0])
        begin, tokens = time.perf_counter(), 0
        for start in range(0, len(rows), setting.max_concurrent):
            tokens += _generate(model, rows[start : start + setting.max_concurrent], sampling)
        return tokens / (time.perf_counter() - begin)

    def ours(seeds: list[int]) -> float:
        begin = time.perf_counter()
        outputs = engine.generate(prompts, sampling, n, seeds=seeds)
        return count_tokens(outputs) / (time.perf_counter() - begin)

    figures = _take_turns(ours, generate, len(prompts), repeats)
    return {"engine": figures[0], "generate": figures[1], "ratio": figures[2]}


def _generate(model: Any, prompts: list[list[int]], sampling: Sampling) -> int:
    """Samples with ``model.generate``; returns the number of tokens before the padding."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    stops = list(sampling.stop_token_ids) or None
    output = model.generate(
        tokens,
        attention_mask=mask,
        do_sample=True,
        temperature=sampling.temperature,
        top_k=0,
        max_new_tokens=sampling.max_tokens,
        min_new_tokens=None if stops else sampling.max_tokens,
        eos_token_id=stops,
        pad_token_id=0,
    )[:, width:]
    if stops is None:
        return output.numel()
    ended = torch.isin(output, torch.tensor(stops, device=output.device))
    return int((ended.cumsum(-1) - ended.int() == 0).sum())


def _take_turns(
    ours: Callable[[list[int]], float], other: Callable[[list[int]], float], prompts: int, repeats: int
) -> tuple[float, float, float]:
    """Medians of both, and of their ratio within a turn; the first turn is a warm-up."""
    figures = []
    for turn in range(repeats + 1):
        seeds = [turn * prompts + i for i in range(prompts)]
        if turn % 2:
            our_rate, other_rate = ours(seeds), other(seeds)
        else:
            other_rate, our_rate = other(seeds), ours(seeds)
        figures.append((our_rate, other_rate, our_rate / other_rate))
    return tuple(statistics.median(column) for column in zip(*figures[1:], strict=True))  # type: ignore[return-value]


def measure_loads(engine: Engine, setting: Setting, prompts: list[list[int]], *, loads: int = 20) -> dict[str, float]:
    """Milliseconds of a verified load and of a plain copy of the same tensors; the largest error of the log-probs."""
    model = AutoModelForCausalLM.from_pretrained(setting.model, dtype=getattr(torch, setting.dtype)).eval()
    copies = [torch.empty_like(parameter) for parameter in model.parameters()]
    load_ms, copy_ms, error = [], [], 0.0
    sampling = Sampling(max_tokens=32, temperature=0.7)
    with torch.no_grad():
        for version in range(1, loads + 1):
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.002)
            load_ms.append(_milliseconds(lambda: engine.load(model.named_parameters(), version)))  # noqa: B023
            copy_ms.append(_milliseconds(lambda: torch._foreach_copy_(copies, list(model.parameters()))))
            outputs = engine.generate(prompts[:4], sampling, seeds=range(4))
            error = max(error, _largest_error(model, prompts[:4], outputs, sampling.temperature))
    return {
        "load_ms": statistics.median(load_ms),
        "copy_ms": statistics.median(copy_ms),
        "largest_log_prob_error": error,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _milliseconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - begin)


def _largest_error(model: Any, prompts: list[list[int]], outputs: list[list[Completion]], temperature: float) -> float:
    errors = []
    for prompt, (completion,) in zip(prompts, outputs, strict=True):
        logits = model(torch.tensor([prompt + completion.tokens])).logits[0, len(prompt) - 1 : -1]
        expected = (logits.float() / temperature).log_softmax(-1)
        expected = expected.gather(-1, torch.tensor(completion.tokens)[:, None])[:, 0]
        errors.append((expected - torch.tensor(completion.logps)).abs().max())
    return float(max(errors))


def measure(name: str, size: str, setting: Setting, *, count: int, n: int, repeats: int) -> dict[str, Any]:
    """Measures one engine on one model."""
    options = EngineSection(use=name, cache_mb=setting.cache_mb, max_concurrent=setting.max_concurrent)  # type: ignore[arg-type]
    begin = time.perf_counter()
    engine = make_engine(setting.model, options, dtype=setting.dtype, max_model_len=setting.max_model_len)
    result: dict[str, Any] = {"start_seconds": time.perf_counter() - begin}
    vocabulary = SIZES[size]["vocab_size"]
    prompts = draw_prompts(count, vocabulary)
    result["first_tokens_seconds"] = _milliseconds(lambda: engine.generate(prompts[:1], Sampling(max_tokens=2))) / 1000
    compare = engine_over_bare_vllm if name == "vllm" else engine_over_generate
    for kind, sampling in LENGTHS.items():
        if kind == "heavy_tailed":
            sampling = with_mean_length(sampling, vocabulary, MEAN_LENGTH)
        result[kind] = compare(engine, setting, prompts, sampling, n=n, repeats=repeats)
    result |= measure_loads(engine, setting, prompts)  # comes last, because it changes the weights
    engine.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", action="append", choices=["vllm", "transformers"])
    parser.add_argument("--size", action="append", choices=list(SIZES))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--n", type=int, default=4, help="completions a prompt")
    parser.add_argument("--concurrent", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for size in arguments.size or ["0.1M", "20M"]:
        with tempfile.TemporaryDirectory() as folder:
            build_model(folder, size)
            setting = Setting(folder, dtype=arguments.dtype, max_concurrent=arguments.concurrent)
            for name in arguments.engine or ["vllm", "transformers"]:
                figures = measure(
                    name, size, setting, count=arguments.prompts, n=arguments.n, repeats=arguments.repeats
                )
                results.setdefault(name, {})[size] = figures
                print(name, size, json.dumps(figures, indent=2), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
