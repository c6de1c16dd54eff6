"""Text to token ids: template, document and question are each encoded once, on their own, and their ids joined."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

from ..errors import InfeasibleError, UsageError

SENTINEL = "kvcli0document0here"
ROOM = 512  # tokens left for question and answer when a document is cut, an eighth of a small context at most


def template(tokenizer: Any, chat: bool) -> tuple[str, str]:
    """The text before the document and the text between a question and its answer.

    Raises InfeasibleError for a chat template that does not pass its content on as it is.
    """
    if not (chat and tokenizer.chat_template):
        return "", "\n"
    head, tail = _around(tokenizer, ["user"])
    return head, tail


def closing_ids(tokenizer: Any, chat: bool) -> list[int]:
    """Ids of the text between an answer and the next question; raises InfeasibleError as `template` does."""
    if not (chat and tokenizer.chat_template):
        return _plain(tokenizer, "\n")
    return _parsed(tokenizer, _around(tokenizer, ["user", "assistant", "user"])[2])


def _around(tokenizer: Any, roles: list[str]) -> list[str]:
    """What the chat template writes before, between and behind turns of these roles."""
    from jinja2 import TemplateError

    turns = [{"role": role, "content": SENTINEL} for role in roles]
    try:
        whole: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError as cause:
        raise InfeasibleError("the model's chat template failed", str(cause), "leave it out with --raw") from cause
    pieces = whole.split(SENTINEL)
    if len(pieces) != len(turns) + 1:
        why = "it must hold the text of each turn once and unchanged"
        raise InfeasibleError("the model's chat template cannot be used", why, "leave it out with --raw")
    return pieces


def document_ids(tokenizer: Any, text: str, chat: bool) -> tuple[list[int], int, str]:
    """Ids of template and document, how many of them are the template's, and the text that closes a question.

    Raises UsageError for an empty document.
    """
    ids = appended_ids(tokenizer, text)
    lead, tail = opening_ids(tokenizer, chat)
    return lead + ids, len(lead), tail


def opening_ids(tokenizer: Any, chat: bool) -> tuple[list[int], str]:
    """Ids before the document, and the text that closes a question."""
    head, tail = template(tokenizer, chat)
    return _parsed(tokenizer, head) if head else _opening(tokenizer), tail


def appended_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a document alone, stripped at its right end and closed by a newline; raises UsageError if it is empty."""
    text = text.rstrip()
    if not text:
        raise UsageError("the document is empty, or nothing but white space")
    if ids := _plain(tokenizer, text + "\n"):
        return ids
    raise InfeasibleError("the model's tokenizer has no token for anything in the document")


def lost(tokenizer: Any, text: str, ids: Sequence[int]) -> str:
    """What the tokenizer could not put into the document's `ids`, in words; empty when every character is there."""
    unknown = tokenizer.unk_token_id
    coded = ((char, _plain(tokenizer, char)) for char in sorted(set(text)) if not char.isspace())
    missing = [char for char, own in coded if not own or unknown in own]
    count = list(ids).count(unknown)
    if not (missing or count):
        return ""
    which = f" ({' '.join(missing[:8])}{' ...' * (len(missing) > 8)})" if missing else ""
    instead = f"unknown tokens, {count} in all, stand in its place" if count else "the model does not see it"
    return f"the tokenizer has no token for some of the text{which}: {instead}"


def encoded(
    tokenizer: Any, text: str, warn: Callable[[str], None], *, raw: bool = False, appended: bool = False
) -> tuple[list[int], tuple[int, str, bool]]:
    """Ids of a document and the `seq` that `observe.prefill` takes; `warn` is told what the model will not see.

    raw: without the chat template. appended: behind what was read before, so that nothing opens it.
    """
    lead, tail, chat = 0, "\n", not raw and bool(tokenizer.chat_template)
    if appended:
        ids = appended_ids(tokenizer, text)
    else:
        ids, lead, tail = document_ids(tokenizer, text, chat)
    if missing := lost(tokenizer, text, ids[lead:]):
        warn(missing)
    return ids, (lead, tail, chat)


def truncate(tokenizer: Any, ids: Sequence[int], room: int, lead: int) -> tuple[list[int], list[int]]:
    """The first of a document's ids, closed by a newline, and those cut off: at most `room` stay.

    Raises InfeasibleError where that leaves nothing behind the `lead` tokens of the template.
    """
    if len(ids) <= room:
        return list(ids), []
    close = _plain(tokenizer, "\n")
    kept = room - len(close)
    if kept <= lead:
        raise InfeasibleError("the model's context has no room left for the document")
    return [*ids[:kept], *close], list(ids[kept:])


def readable(config: Any) -> int:
    """Tokens of a document that leave room for a question and its answer."""
    length = context_length(config)
    return length - min(ROOM, length // 8)


def question_ids(tokenizer: Any, prompt: str, prefix: str, tail: str) -> list[int]:
    """Ids of a question, of the text that closes it, and of the words its answer is to start with."""
    return _plain(tokenizer, prompt) + _parsed(tokenizer, tail) + _plain(tokenizer, prefix)


def context_length(config: Any) -> int:
    """Tokens the model can attend to, by its config: tokenizers often do not know.

    Where the RoPE changes its frequencies with the length of the text, this is the length at which it does: keys that
    were cached before the switch do not fit queries that come after it.
    """
    text = config.get_text_config()
    length = getattr(text, "max_position_embeddings", None)
    if not length:
        raise InfeasibleError("the model's config names no context length", "max_position_embeddings is missing")
    return min([int(length), *rope_switch(text).values()])


def rope_switch(text: Any) -> dict[str, int]:
    """By kind of RoPE in a text config, the tokens read before its frequencies change; empty where they never do."""
    rope = getattr(text, "rope_parameters", None) or {}
    tables = {str(part.get("rope_type")): part for part in (rope, *rope.values()) if isinstance(part, dict)}
    reach = {"longrope": "original_max_position_embeddings", "dynamic": "max_position_embeddings"}
    found = {kind: tables[kind].get(name) or getattr(text, name, 0) for kind, name in reach.items() if kind in tables}
    return {kind: int(tokens) for kind, tokens in found.items() if tokens}


def need_room(config: Any, end: int, what: str, fix: str) -> None:
    """Raise InfeasibleError where `end` tokens are more than the model attends to; `what` says whose they are."""
    if end > context_length(config):
        raise too_long(config, what, fix)


def too_long(config: Any, what: str, fix: str) -> InfeasibleError:
    """The error for more tokens than `context_length`; `what` says how many there are."""
    limit = context_length(config)
    kind = next((kind for kind, tokens in rope_switch(config.get_text_config()).items() if tokens == limit), None)
    why = f"beyond, its positions ({kind} RoPE) would change for all tokens" if kind else ""
    return InfeasibleError(f"{what}, the model reads {limit:,}", why, fix)


def stop_ids(net: Any, tokenizer: Any, tail: str) -> list[int]:
    """Tokens that end an answer: those of the generation config and the tokenizer, and the one that ends a turn."""
    ends = net.generation_config.eos_token_id
    turn = [token for token in _parsed(tokenizer, tail)[:1] if token in tokenizer.all_special_ids]
    found = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id, *turn}
    return sorted(found - {None})


def _parsed(tokenizer: Any, text: str) -> list[int]:
    """Text of a template, in which special tokens mean what they say."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False, verbose=False)
    return ids


def _plain(tokenizer: Any, text: str) -> list[int]:
    """Text of a user, in which the names of special tokens are only text."""
    with _blaming():
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
    return ids


@contextmanager
def _blaming() -> Iterator[None]:
    try:
        yield
    except Exception as cause:  # tokenizers raises no narrower one; for halves of surrogate pairs a TypeError
        raise InfeasibleError("the model's tokenizer cannot encode the text", f"{cause!s:.80}") from cause


def _opening(tokenizer: Any) -> list[int]:
    """Special tokens the tokenizer puts before any text, such as BOS."""
    with _blaming():
        coded = tokenizer("a", return_special_tokens_mask=True)
    pairs = zip(coded["input_ids"], coded["special_tokens_mask"], strict=True)
    return [token for token, _ in takewhile(lambda pair: pair[1], pairs)]
