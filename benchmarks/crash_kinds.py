"""Small runs of every kind, which ``benchmarks/crashes.py`` kills: recipes, and what must come out of them again."""

from __future__ import annotations

import json
import re
import string
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from transformers import Qwen2Config, Qwen2ForCausalLM

from posttrain.models.value_files import build_value, save_value
from posttrain.quickstart.model import make_tokenizer
from posttrain.recipe import sections

ENGINE = {"use": "transformers", "max_concurrent": 8}
VERIFY = [{"use": "length", "unit": "characters", "maximum": 5, "margin": 12}]
RUN = {"folder": "run", "save_every": 1, "trackers": ["tensorboard"]}
TIMES = ("date", "seconds", "versions")
"""Keys of reports that differ between two runs of the same suite."""


class Kind(NamedTuple):
    """A kind of run."""

    command: str
    settings: dict[str, Any]  # of its YAML file
    arguments: tuple[str, ...] = ()


def kinds(folder: Path) -> dict[str, Kind]:
    """All kinds, on the models and data that :func:`prepare` puts into the folder."""
    policy = {"model": str(folder / "model")}
    data = {"path": str(folder / "data.jsonl")}
    sampled = {"policy": policy, "data": data, "engine": ENGINE, "verify": VERIFY, "sampling": {"max_tokens": 8}}
    training = {
        **sampled,
        "advantage": {"use": "outcome", "center": "group", "scale": "group"},
        "loss": [{"use": "clip"}],
        "steps": 2,
        "prompts_per_step": 2,
        "completions": 3,
        "optimizer": {"learning_rate": 0.003},
        "run": RUN,
    }
    value = {
        "value": {"optimizer": {"learning_rate": 0.003}},
        "advantage": {"use": "gae", "lambda_": 0.95},
        "target": {"use": "lambda_return", "lambda_": 0.95},
        "value_loss": [{"use": "mse"}],
    }
    evaluated = {"evaluate": {"data": {**data, "limit": 2}, "every": 1, "sampling": {"max_tokens": 8}}}
    decode = {
        **sampled,
        "data": {**data, "limit": 6},
        "completions": 2,
        "save_every": 2,
        "decoder": {"use": "population", "branch": 2, "score": {"use": "path_logp"}},
    }
    suite = {
        **sampled,
        "suite": "value",
        "data": {**data, "limit": 6},
        "value": {"model": str(folder / "value")},
        "completions": 2,
        "save_every": 2,
        "branches": {"prompts": 4, "prefixes": 1, "completions": 2},
        "report": {"folder": "report", "bins": 2, "shown": 2},
    }
    return {
        "train with value": Kind("train", training | value | evaluated),
        "train with LoRA": Kind("train", training | {"policy": {**policy, "lora": {"rank": 2}}}),
        "offline with cache": Kind("train", _offline(policy, str(folder / "pairs.jsonl"))),
        "decode": Kind("decode", decode | {"output": "out.jsonl"}),
        "label": Kind("label", _label(sampled) | {"data": {**data, "limit": 6}, "output": "labels.jsonl"}),
        "eval": Kind("eval", suite),
        "iterate": Kind("iterate", _iterate(folder, training | value, decode)),
    }


def _offline(policy: dict[str, Any], pairs: str) -> dict[str, Any]:
    return {
        "policy": policy,
        "reference": {"cache": "cache"},
        "data": {"path": pairs},
        "examples": {"use": "pairs"},
        "loss": [{"use": "pairwise", "beta": 0.1}],
        "normaliser": {"use": "group_mean_of_token_sum"},
        "optimizer": {"learning_rate": 0.001},
        "steps": 3,
        "prompts_per_step": 2,
        "run": RUN,
    }


def _label(sampled: dict[str, Any]) -> dict[str, Any]:
    return {
        **sampled,
        "policy": {**sampled["policy"], "end": ["<|end|>", *string.ascii_uppercase]},  # so that completions end
        "sampling": {"max_tokens": 16},
        "completions": 3,
        "save_every": 2,
        "label": {"separator": "e", "completions": 2},
    }


def _iterate(folder: Path, training: dict[str, Any], decode: dict[str, Any]) -> dict[str, Any]:
    """Writes the recipes of two stages, and returns the file that joins them."""
    values = {name: setting for name, setting in training.items() if name not in ("run", "advantage")}
    score = {"use": "value", "model": str(folder / "value")}
    stages = {
        "values": values | {"loss": [], "steps": 1},
        "held_out": decode
        | {"decoder": {"use": "shaped", "k": 2, "score": score}, "data": {**decode["data"], "limit": 4}},
    }
    for name, settings in stages.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return {
        "rounds": 2,
        "folder": "rounds",
        "stages": {
            "values": {"train": str(folder / "values.yaml"), "from": {"value.model": "values.value"}},
            "held_out": {
                "decode": str(folder / "held_out.yaml"),
                "from": {"decoder.score.model": "values.value"},
            },
        },
        "table": {"reward": "held_out.score"},
    }


def prepare(folder: Path) -> None:
    """Makes tiny models with random weights, and data."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=end,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)  # wide enough that distributions are far from uniform
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    value = build_value(sections.ValueSection(), sections.PolicySection(model=str(folder / "model")))
    torch.nn.init.normal_(value.head.linear.weight, std=0.3)
    save_value(value, tokenizer, folder / "value")
    rows = [{"prompt": f"{a}+{b}="} for a in range(4) for b in range(3)]
    pairs = [{"prompt": f"{a}+1=", "chosen": str(a + 1), "rejected": "no idea"} for a in range(8)]
    for name, lines in (("data", rows), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def contents(folder: Path) -> dict[str, bytes]:
    """Everything that a run leaves, by path: the bytes of each file without times of day and durations.

    Left out are TensorBoard's files, which hold times, and ``stopped-1``, which holds what an attempt without a
    checkpoint wrote. Files that a kill left half written would be there, and differ.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        is_left_out = parts[0] == "log.txt" or any(
            part == "tensorboard" or part.startswith("stopped-") for part in parts
        )
        if path.is_file() and not is_left_out:
            found["/".join(parts)] = _without_times(path)
        elif path.is_dir() and not is_left_out and not any(path.iterdir()):
            found["/".join(parts)] = b""
    return found


def _without_times(path: Path) -> bytes:
    data = path.read_bytes()
    if path.name in ("metrics.jsonl", "rounds.jsonl", "metrics.json"):
        lines = data.decode().splitlines() if path.suffix == ".jsonl" else [data.decode()]
        return "\n".join(json.dumps(_timeless(json.loads(line)), sort_keys=True) for line in lines).encode()
    if path.suffix in (".md", ".html"):
        return re.sub(rb"\d{4}-\d\d-\d\d", b"DATE", data)
    return data


def _timeless(value: Any) -> Any:
    if isinstance(value, list):
        return [_timeless(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {k: _timeless(v) for k, v in value.items() if not k.startswith("time/") and k not in TIMES}
