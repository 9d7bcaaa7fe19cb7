"""The workload of the benchmarks: prompts, and a random model whose response lengths have a known distribution.

The vocabulary is cut into classes. A word of class k is followed only by words of class k, so the last word of a prompt
sets the class of all tokens that are sampled after it. The probability of stopping after a word depends only on its
class. The lengths are therefore geometric, with a mean that depends on the prompt, and every engine that samples from
the model gets the same distribution: no length option of any engine is used. If the means are log-normal over the
prompts, the lengths are heavy-tailed like those of reasoning models. If the probability of stopping is zero, all
lengths equal the limit.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import torch
from torch import Tensor

Lengths = Literal["even", "heavy_tailed"]

CLASSES = 16
SPECIALS = ("<pad>", "<eos>", "<unk>")
EOS = SPECIALS.index("<eos>")
MEDIAN_OF_MEANS = 58 / 256  # share of the limit; the median of a geometric distribution is 0.69 times its mean
SIGMA = 0.8  # standard deviation of the log of the prompts' means


@dataclass(frozen=True)
class Size:
    """The shape of a Qwen2 model whose embedding is tied to its output layer, as in the small models of that family."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int


SIZES = {
    "tiny": Size(hidden=64, layers=2, heads=2, kv_heads=1, intermediate=128, vocabulary=1024),
    "20m": Size(hidden=384, layers=8, heads=6, kv_heads=2, intermediate=1152, vocabulary=16384),
    "0.5b": Size(hidden=896, layers=24, heads=14, kv_heads=2, intermediate=4864, vocabulary=151936),
}


def class_of(token: int) -> int:
    """The class of a word; -1 for a special token."""
    return (token - len(SPECIALS)) % CLASSES if token >= len(SPECIALS) else -1


def mean_lengths(limit: int) -> list[float]:
    """Mean response length of each class in tokens, before the cut: quantiles of a log-normal distribution."""
    normal = NormalDist()
    return [MEDIAN_OF_MEANS * limit * math.exp(SIGMA * normal.inv_cdf((k + 0.5) / CLASSES)) for k in range(CLASSES)]


def build_model(folder: Path, size: Size, lengths: Lengths, limit: int) -> int:
    """Saves the model and its tokenizer; returns the number of parameters.

    Args:
        limit: longest response in tokens; the distribution of heavy-tailed lengths scales with it.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=SPECIALS.index("<pad>"),
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        _separate_classes(model)
        _set_hazards(model, [0.0] * CLASSES if lengths == "even" else [1 / mean for mean in mean_lengths(limit)])
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(folder)
    save_tokenizer(folder, size.vocabulary)
    return sum(parameter.numel() for parameter in model.parameters())


def _separate_classes(model: Any) -> None:
    """Reserves the first ``CLASSES`` hidden dimensions for the classes.

    A word sets the dimension of its class, and no layer reads or writes these dimensions. They hold four fifths of a
    hidden state's energy, so the final norm hardly changes them. The random signs in the final norm prevent that the
    tied embedding makes every word its own most likely successor.
    """
    embedding: Tensor = model.model.embed_tokens.weight
    vocabulary, hidden = embedding.shape
    scale = 1.2 / (0.447 * math.sqrt(hidden))  # logits within a class then have a standard deviation of about 1.2
    embedding.normal_(std=scale)
    embedding[:, :CLASSES] = 0.0
    words = torch.arange(len(SPECIALS), vocabulary)
    embedding[words, (words - len(SPECIALS)) % CLASSES] = 2 * math.sqrt(hidden) * scale
    embedding[: len(SPECIALS)] = 0.0
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            reader.weight[:, :CLASSES] = 0.0
        for writer in (attention.o_proj, mlp.down_proj):
            writer.weight[:CLASSES] = 0.0
    signs = model.model.norm.weight[CLASSES:]
    signs.copy_(torch.randint(0, 2, signs.shape) * 2.0 - 1.0)


def _set_hazards(model: Any, hazards: Sequence[float]) -> None:
    """Sets the output row of <eos> so that a word of class k is the last one with probability ``hazards[k]``."""
    embedding: Tensor = model.model.embed_tokens.weight
    for k, hazard in enumerate(hazards):
        words = torch.arange(len(SPECIALS) + k, len(embedding), CLASSES)
        samples = words[torch.randint(0, len(words), (8, 32))]
        hidden = model.model(input_ids=samples).last_hidden_state.flatten(0, 1)
        level = hidden[:, k].mean()
        rest = torch.logsumexp(hidden @ embedding[words].T, dim=-1).mean()
        odds = math.log(hazard / (1 - hazard)) if hazard > 0 else -100.0
        embedding[EOS, k] = (rest + odds) / level


def save_tokenizer(folder: Path, vocabulary: int) -> None:
    """Trains a byte-level BPE tokenizer of exactly ``vocabulary`` tokens on made-up words, and saves it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        show_progress=False,
    )
    backend.train_from_iterator([text(0, 4 * vocabulary)], trainer)
    if backend.get_vocab_size() != vocabulary:
        raise RuntimeError(f"the tokenizer has {backend.get_vocab_size()} tokens, not {vocabulary}: too little text")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)


def text(seed: int, words: int) -> str:
    """Made-up words of two to four syllables."""
    generator = random.Random(seed)
    syllables = [first + vowel for first in "bcdfghjklmnprstvwz" for vowel in "aeiou"]
    return " ".join("".join(generator.choices(syllables, k=generator.randint(2, 4))) for _ in range(words))


def prompts(count: int, tokenizer: Any, *, shortest: int = 24, longest: int = 40) -> list[str]:
    """Makes prompts of ``shortest`` to ``longest`` made-up words; equally many end in each class."""
    texts = []
    for i in range(count):
        seed = i << 20
        while not texts or len(texts) == i:
            candidate = text(seed, shortest + (longest - shortest) * i // max(1, count - 1))
            if class_of(tokenizer(candidate).input_ids[-1]) == i % CLASSES:
                texts.append(candidate)
            seed += 1
    return texts


def write_prompts(path: Path, texts: Sequence[str]) -> None:
    """Writes JSON lines with the column ``prompt``."""
    from posttrain.system.files import write_rows

    write_rows(path, ({"prompt": text} for text in texts))


def early_letters(completions: Sequence[str], **columns: Any) -> list[float]:
    """Reward for both sides: the share of letters in the first half of the alphabet. Both accept this signature."""
    return [sum(letter in "abcdefghijklm" for letter in text) / max(1, len(text)) for text in completions]


def describe_lengths(lengths: Sequence[int]) -> dict[str, float]:
    """Mean, quartiles, 90th percentile and maximum of response lengths, in tokens."""
    tensor = torch.tensor(lengths, dtype=torch.float64)
    quantiles = torch.quantile(tensor, torch.tensor([0.25, 0.5, 0.75, 0.9], dtype=torch.float64)).tolist()
    numbers = dict(zip(["p25", "median", "p75", "p90"], quantiles, strict=True))
    return {"mean": tensor.mean().item(), **numbers, "max": tensor.max().item()}
