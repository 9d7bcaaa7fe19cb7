"""Renders conversations with a tokenizer's chat template, and finds by rendering what the template can take.

Templates differ in the contents that they read (text, or a list of parts) and in the tokens with which they end a
message. Both are found with short conversations that are rendered once for each template.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jinja2
from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
Form = Literal["text", "parts", "both", "none"]
"""Contents of messages that a template writes: texts, lists of one text part, texts and lists of parts, or neither."""

FIRST, SECOND = "zqfirst", "zqsecond"  # contents of test messages, which no template contains
REFUSALS = (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError, IndexError)
"""Errors with which a chat template, or Python code that it calls, refuses a conversation."""


class UnreadMessage(ValueError):
    """The error for something in a conversation that the chat template does not write."""


def refusal(error: Exception) -> str:
    """The message for a conversation that could not be rendered."""
    return str(error) if isinstance(error, UnreadMessage) else f"the chat template rejects it: {error}"


def syntax_error(tokenizer: PreTrainedTokenizerBase) -> str:
    """Says what is wrong with a chat template that cannot be read at all; empty if it can, or if there is none."""
    template = tokenizer.chat_template
    for text in (template,) if isinstance(template, str) else (template or {}).values():
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "a"}], chat_template=text, tokenize=False)
        except jinja2.TemplateSyntaxError as error:
            return f"line {error.lineno}: {error.message}"
        except REFUSALS:
            continue  # it can be read, and wants another conversation
    return ""


def render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    arguments: Mapping[str, Any] | None = None,
    *,
    generate: bool = False,
) -> str:
    """Renders a conversation with the tokenizer's chat template.

    Args:
        messages: contents are texts, or lists of text parts, which are joined for a template that reads texts alone.
        arguments: further arguments of the template, such as ``tools`` (a list of JSON schemas).
        generate: end with the beginning of an answer of the assistant, or with the last message if that is the
            assistant's, without its end.

    Raises:
        UnreadMessage: if the template leaves out a content, tool calls, or the tools.
        jinja2.TemplateError: if the template refuses the conversation; other kinds are in ``REFUSALS``.
    """
    arguments = dict(arguments or {})
    fitting = fitted(messages, tokenizer)
    text = _apply(tokenizer, fitting, arguments, generate)
    if arguments.get("tools") and text == _apply(tokenizer, fitting, {**arguments, "tools": None}, generate):
        raise UnreadMessage("the chat template does not describe `tools` to the model")
    for name in _called(messages):
        if name not in text:
            raise UnreadMessage(f"the chat template leaves out the call of the tool {name!r}")
    return text


def _called(messages: Sequence[Message]) -> list[str]:
    """Names of the tools that are called."""
    functions = [call.get("function") or {} for message in messages for call in message.get("tool_calls") or ()]
    return [str(function["name"]) for function in functions if "name" in function]


def fitted(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, template: str | None = None
) -> list[dict[str, Any]]:
    """Puts the contents of messages into the form that the chat template reads.

    Args:
        template: another chat template than the tokenizer's own.

    Raises:
        UnreadMessage: if the template does not write the content or the tool calls of a message.
    """
    template = template or template_text(tokenizer)
    return [_fitted(number, message, tokenizer, template) for number, message in enumerate(messages, 1)]


def template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of the chat template for conversations without tools, if the tokenizer has several."""
    template: Any = tokenizer.chat_template
    return template["default"] if isinstance(template, dict) else template


def _fitted(number: int, message: Message, tokenizer: PreTrainedTokenizerBase, template: str) -> dict[str, Any]:
    # A weight concerns the loss and no template.
    kept = {key: value for key, value in message.items() if key != "weight"}
    for key in ("tool_calls", "reasoning_content", "thinking"):
        if kept.get(key) and key not in template:
            raise UnreadMessage(f"message {number} has {key!r}, which the chat template does not read; take it out")
    content = kept.get("content")
    if not content:
        return {**kept, "content": ""} if isinstance(content, list) else kept
    form = content_form(tokenizer, template, str(kept.get("role")))
    if form == "none":
        raise UnreadMessage(f"the chat template writes nothing of message {number}, of role {kept.get('role')!r}")
    joined = content if isinstance(content, str) else "".join(part["text"] for part in content)
    if form == "parts":
        return {**kept, "content": [{"type": "text", "text": joined}]}
    return {**kept, "content": joined} if form == "text" else kept


@functools.lru_cache(maxsize=256)
def content_form(tokenizer: PreTrainedTokenizerBase, template: str, role: str) -> Form:
    """Finds the contents that a template writes in messages of a role; ``text`` if it refuses the role itself."""
    both = [{"type": "text", "text": FIRST}, {"type": "text", "text": SECOND}]
    as_text = _attempt(tokenizer, template, _conversation(role, FIRST))

    def reads(parts: list[dict[str, str]]) -> bool:
        text = _attempt(tokenizer, template, _conversation(role, parts)) or ""
        printed = any(text.count(word) > (as_text or "").count(word) for word in ("'type'", '"type"'))
        return all(part["text"] in text for part in parts) and not printed

    if as_text is not None and FIRST in as_text:
        return "both" if reads(both) else "text"
    if reads(both[:1]):
        return "parts"
    return "text" if as_text is None else "none"


def _conversation(role: str, content: Any) -> list[dict[str, Any]]:
    """A conversation that ends with a message of this role, if templates allow that."""
    empty = [] if isinstance(content, list) else ""
    question = {"role": "user", "content": _like(content, "question")}
    if role == "user":
        return [{"role": "user", "content": content}]
    if role == "assistant":
        return [question, {"role": "assistant", "content": content}]
    if role == "tool":
        call = {"id": "call00001", "type": "function", "function": {"name": "tool", "arguments": {"x": "y"}}}
        asks = {"role": "assistant", "content": empty, "tool_calls": [call]}
        answer = {"role": "tool", "name": "tool", "tool_call_id": "call00001", "content": content}
        return [question, asks, answer]
    return [{"role": role, "content": content}, question]


def _like(content: Any, text: str) -> Any:
    return [{"type": "text", "text": text}] if isinstance(content, list) else text


@functools.lru_cache(maxsize=64)
def turn_ends(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[int, ...]:
    """Finds the tokens that a chat template writes at the end of an assistant's message: of a text, and of tool calls.

    The end of a text is the last special token of those that follow it both at the end of a conversation and within
    one; if they have none in common, the last one at the end of a conversation; and if nothing is written there, the
    special token with which the next message begins. The end of tool calls is the last special token behind them.
    """
    user = {"role": "user", "content": "question"}
    texts = [
        _after(tokenizer, template, [user, {"role": "assistant", "content": FIRST}, *more])
        for more in ([], [{"role": "user", "content": "next"}])
    ]
    last, within = (special_tokens(tokenizer, text) for text in texts)
    common = [a for a, b in zip(last, within, strict=False) if a == b]
    call = {"id": "call00001", "type": "function", "function": {"name": "tool", "arguments": {"x": FIRST}}}
    calls = [user, {"role": "assistant", "content": "", "tool_calls": [call]}]
    of_calls = special_tokens(tokenizer, _after(tokenizer, template, calls)) if "tool_calls" in template else []
    of_text = (common or last)[-1:] or (within[:1] if not texts[0].strip() else [])
    return tuple(dict.fromkeys([*of_text, *(token for token in of_calls[-1:] if last)]))


def _after(tokenizer: PreTrainedTokenizerBase, template: str, messages: list[dict[str, Any]]) -> str:
    """The text that a template writes behind the last ``FIRST``; none if it refuses the messages."""
    try:
        text = _attempt(tokenizer, template, fitted(messages, tokenizer, template))
    except UnreadMessage:
        return ""
    return text.rpartition(FIRST)[2] if text and FIRST in text else ""


def special_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The special tokens in a text, in order."""
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special.update(tokenizer.all_special_ids)
    ids: Any = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    return [token for token in ids if token in special]


def _apply(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], arguments: Mapping[str, Any], generate: bool
) -> str:
    continues = generate and bool(messages) and messages[-1].get("role") == "assistant"
    ending = {"add_generation_prompt": generate and not continues, "continue_final_message": continues}
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **{**ending, **arguments}))


def _attempt(tokenizer: PreTrainedTokenizerBase, template: str, messages: list[dict[str, Any]]) -> str | None:
    """The messages as the template renders them; None if it refuses them."""
    try:
        return _apply(tokenizer, messages, {"chat_template": template}, False)
    except REFUSALS:
        return None
