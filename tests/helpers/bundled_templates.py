"""The chat templates that TRL bundles, with a tokenizer that has the special tokens of all of them."""

from __future__ import annotations

import re
from pathlib import Path

import trl
from tiny_model import make_tokenizer

TEMPLATES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
}
SPECIAL = re.compile(r"<[|｜][A-Za-z_▁0-9]+[|｜]?>|<[A-Za-z_0-9]+[|｜]>|</?(?:s|eos|start_of_turn|end_of_\w+)>")


def tokenizer_of_templates(folder: Path):
    """A byte-level tokenizer whose special tokens are those that the templates write."""
    tokenizer = make_tokenizer(folder)
    names = {name for template in TEMPLATES.values() for name in SPECIAL.findall(template)}
    tokenizer.add_special_tokens(
        {"bos_token": "<bos>", "unk_token": "<unk>", "additional_special_tokens": sorted(names)}
    )
    return tokenizer
