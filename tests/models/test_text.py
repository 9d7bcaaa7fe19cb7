"""Tests of token ids as text: special tokens, ends, and ids that the tokenizer does not know."""

from __future__ import annotations

from pathlib import Path

from tiny_model import make_tokenizer

from posttrain.models.text import text_of, written_text


def test_special_tokens_are_kept_but_for_the_end(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    ids = tokenizer("a<|user|>b<|end|>")["input_ids"]
    assert text_of(tokenizer)(ids) == "ab"
    assert text_of(tokenizer, special=True)(ids) == "a<|user|>b<|end|>"
    assert written_text(tokenizer)(ids) == "a<|user|>b"
    assert written_text(tokenizer)(ids[:-1]) == "a<|user|>b"
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    assert written_text(tokenizer, ends=[user])(ids[:2]) == "a", "an end that the model alone names"
    assert written_text(tokenizer)([]) == ""


def test_ids_that_the_tokenizer_does_not_know_are_not_lost(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    euro = tokenizer("€")["input_ids"]
    ids = [*tokenizer("7")["input_ids"], 300, 301, *euro, tokenizer.eos_token_id]
    assert text_of(tokenizer)(ids) == "7<|id 300|><|id 301|>€"
    assert written_text(tokenizer)(ids) == "7<|id 300|><|id 301|>€"
    assert written_text(tokenizer)([*euro[:2], 400]) == "\ufffd<|id 400|>"
    tokenizer.add_tokens(["<new>"])
    assert text_of(tokenizer)([len(tokenizer) - 1]) == "<new>"
    assert text_of(tokenizer)([len(tokenizer)]) == f"<|id {len(tokenizer)}|>"


def test_spaces_stay_where_they_were_written(tmp_path: Path) -> None:
    """A tokenizer may be set to drop spaces before punctuation, as Llama 3's is."""
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.clean_up_tokenization_spaces = True
    assert text_of(tokenizer)(tokenizer("f(x) , 1 .")["input_ids"]) == "f(x) , 1 ."
