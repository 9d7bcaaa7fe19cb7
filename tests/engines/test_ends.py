"""Tests of what ends a turn: named in several places, taught, waited for, and saved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from posttrain.batch import Finish
from posttrain.data.examples import demonstrations
from posttrain.engines.base import Sampling
from posttrain.engines.ends import ends_message, stop_tokens
from posttrain.engines.for_policy import engine_of_length
from posttrain.errors import RecipeError
from posttrain.models.ends import name_ends
from posttrain.models.load import load_tokenizer
from posttrain.models.policy import build_policy, save_model
from posttrain.models.token_ids import continuations, ended, prompt_ids
from posttrain.recipe.sections import DataSection, EngineSection, PolicySection

PAD, END = 0, 1  # <|pad|> and <|end|> of the tests' tokenizer, whose chat template ends a turn with <|end|>


@pytest.fixture
def model_that_names(tiny_model_folder: Path, tmp_path: Path):
    """A function that makes a copy of the tiny model which names other ends; None: it names none."""

    def make(config: Any, generation: Any, tokenizer: str) -> str:
        folder = tmp_path / "model"
        shutil.copytree(tiny_model_folder, folder)
        for file, key, value in (
            ("config.json", "eos_token_id", config),
            ("generation_config.json", "eos_token_id", generation),
            ("tokenizer_config.json", "eos_token", tokenizer),
        ):
            settings = json.loads((folder / file).read_text())
            (folder / file).write_text(json.dumps({**settings, key: value}))
        return str(folder)

    return make


@pytest.mark.parametrize(
    ("named", "expected", "said"),
    [
        ((END, END, "<|end|>"), {END}, None),
        ((PAD, PAD, "<|pad|>"), {PAD, END}, "<|pad|> (model), <|pad|> (tokenizer), <|end|> (chat template)"),
        ((None, None, "<|end|>"), {END}, "the model's configuration names none"),
        ((END, [END, 5], "<|end|>"), {END, 5}, None),
    ],
)
def test_sampling_stops_at_every_end_that_is_named(model_that_names, named, expected, said: str | None, capsys) -> None:
    policy = PolicySection(model=model_that_names(*named))
    tokenizer = load_tokenizer(policy)
    stops = stop_tokens(policy, tokenizer)
    assert set(stops) == expected
    message = ends_message(policy, tokenizer)
    assert message is None if said is None else said in str(message)
    capsys.readouterr()
    engine = engine_of_length(policy, EngineSection(use="transformers"), 200, tokenizer=tokenizer, seed=0)
    printed = capsys.readouterr().err  # as before decoding, serving, labelling and evaluating
    assert ("sampling stops at" in printed) == (said is not None) and (said or "") in printed
    prompts = [[token] for token in range(5, 65)]
    groups = engine.generate(prompts, Sampling(max_tokens=150), seeds=range(60))
    last = {group[0].tokens[-1] for group in groups if group[0].finish == Finish.STOPPED}
    inside = {token for group in groups for token in group[0].tokens[:-1]}
    assert last and last <= expected and not inside & expected
    engine.close()


def test_the_end_that_is_taught_is_saved_and_waited_for(model_that_names, tmp_path: Path) -> None:
    """A base model whose tokenizer and configuration say <|pad|>, with a template that says <|end|>."""
    policy = PolicySection(model=model_that_names(PAD, PAD, "<|pad|>"))
    tokenizer = load_tokenizer(policy)
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": messages}, {"prompt": messages[:1], "completion": "a"}, {"prompt": "q", "completion": "a"}]
    taught = []
    for row, chat in zip(rows, (None, None, False), strict=True):
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        batch = demonstrations(DataSection(path=str(tmp_path / "rows.jsonl"), chat=chat), tokenizer, None).batch([0])
        taught.append(batch.tokens[0][batch.mask[0]].tolist()[1:])
    assert taught == [[END], [END], [PAD]]
    model = build_policy(policy)
    name_ends(model.base, stop_tokens(policy, tokenizer))
    save_model(model, tokenizer, tmp_path / "saved", model.base.dtype)
    assert set(GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id) == {PAD, END}


def test_a_recipe_chooses_the_ends(model_that_names, tmp_path: Path) -> None:
    folder = model_that_names(PAD, PAD, "<|pad|>")
    policy = PolicySection(model=folder, end="<|end|>")
    tokenizer = load_tokenizer(policy)
    assert tokenizer.eos_token == "<|end|>" and stop_tokens(policy, tokenizer) == (END,)
    assert ends_message(policy, tokenizer) is None
    tokenizer.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").eos_token_id == END
    several = PolicySection(model=folder, end=("<|end|>", 7))
    assert stop_tokens(several, load_tokenizer(several)) == (END, 7)


@pytest.mark.parametrize(
    ("end", "problem"),
    [
        ("<|eot|>", r"policy.end: '<\|eot\|>' is no token of the tokenizer"),
        (9999, "policy.end: 9999 is no token of the tokenizer, which has 26"),
        ((), "policy.end: is empty"),
        ("<|pad|>", r"policy.end: the chat template ends a turn with <\|end\|>, which is not among <\|pad\|>"),
    ],
)
def test_ends_that_cannot_be_used_are_refused(tiny_model_folder: Path, end: Any, problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        load_tokenizer(PolicySection(model=str(tiny_model_folder), end=end))


def test_a_template_whose_end_is_no_token_is_taught_with_the_tokenizers_end(tokenizer, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "<|stop|>\n")
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    batch = demonstrations(DataSection(path=str(tmp_path / "rows.jsonl")), tokenizer, None).batch([0])
    assert tokenizer.decode(batch.tokens[0][batch.mask[0]].tolist()) == "a<|stop|><|end|>"
    assert stop_tokens(PolicySection(model=str(tokenizer.name_or_path)), tokenizer) == (END,)


# --- texts as token ids -------------------------------------------------------------------------------------------


def special_around(tokenizer, single: str) -> Any:
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    specials: Mapping[str, int] = {"<|system|>": 4, "<|end|>": END}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[*specials.items()])
    return tokenizer


@pytest.mark.parametrize("single", ["<|system|> $A", "<|system|> $A <|end|>"])
def test_a_prompt_begins_once_and_does_not_end(tokenizer, single: str) -> None:
    around = special_around(tokenizer, single)
    plain, rendered = prompt_ids(["hi", "<|system|>hi"], around)
    assert around.convert_ids_to_tokens(plain.ids) == ["<|system|>", "h", "i"] and not plain.begun
    assert rendered.ids == plain.ids and rendered.begun


def sentencepiece_tokenizer() -> Any:
    """A tokenizer of Llama 2's kind, which puts a space before every text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=350, special_tokens=specials, show_progress=False)
    backend.train_from_iterator(["the sky is blue", "hello world"] * 50, trainer)
    strip = decoders.Strip(" ", 1, 0)
    replace = decoders.Replace("▁", " ")
    backend.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("text", [" blue", "blue", "\nblue sky", "  é", " hello\n\nworld "])
def test_continuations_read_as_their_text_whatever_the_tokenizer_puts_before_texts(tokenizer, text: str) -> None:
    for each in (tokenizer, sentencepiece_tokenizer()):
        before = each("the sky is", add_special_tokens=False)["input_ids"]
        (continuation,) = continuations([text], each)
        whole = each.decode([*before, *continuation.ids], clean_up_tokenization_spaces=False)
        assert whole == "the sky is" + text
        assert continuation.starts == sorted(continuation.starts) and continuation.starts[0] == 0
        assert ended(continuation.ids, each, chat=False)[-1] == each.eos_token_id
