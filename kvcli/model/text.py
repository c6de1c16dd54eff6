"""Text to token ids: template, document and question are each encoded once, on their own, and their ids joined."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from torch import Tensor

from ..errors import InfeasibleError, UsageError
from .segments import Span, in_tokens, paragraphs

SENTINEL = "kvcli0document0here"
CLOSING = 4  # tokens at most of the newline that closes a document
ROOM = 512  # tokens left for question and answer when a document is cut, an eighth of a small context at most


def template(tokenizer: Any, chat: bool) -> tuple[str, str]:
    """The text before the document and the text between a question and its answer.

    Raises InfeasibleError for a chat template that does not pass its content on as it is.
    """
    if not (chat and tokenizer.chat_template):
        return "", "\n"
    head, tail = around(tokenizer, ["user"])
    return head, tail


def closing_ids(tokenizer: Any, chat: bool) -> list[int]:
    """Ids of the text between an answer and the next question; raises InfeasibleError as `template` does."""
    if not (chat and tokenizer.chat_template):
        return plain_ids(tokenizer, "\n")
    return parsed_ids(tokenizer, around(tokenizer, ["user", "assistant", "user"])[2])


def around(tokenizer: Any, roles: list[str]) -> list[str]:
    """What the chat template writes before, between and behind turns of these roles.

    Raises InfeasibleError for a template that does not take them, or that changes what they say.
    """
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
    return parsed_ids(tokenizer, head) if head else _opening(tokenizer), tail


def appended_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a document alone, stripped at its right end and closed by a newline; raises UsageError if it is empty."""
    return _document(tokenizer, text)[0]


def _document(tokenizer: Any, text: str) -> tuple[list[int], list[int] | None]:
    """The same, and of each token the last of its characters, where the tokenizer says so."""
    text = text.rstrip()
    if not text:
        raise UsageError("the document is empty, or nothing but white space")
    if not tokenizer.is_fast:
        ids, last = plain_ids(tokenizer, text + "\n"), None
    else:
        with _blaming():
            how = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
            coded = tokenizer(text + "\n", return_offsets_mapping=True, **how)
        ids, last = coded["input_ids"], [max(start, end - 1) for start, end in coded["offset_mapping"]]
    if not ids:
        raise InfeasibleError("the model's tokenizer has no token for anything in the document")
    return ids, last


def lost(tokenizer: Any, text: str, ids: Sequence[int]) -> str:
    """What the tokenizer could not put into the document's `ids`, in words; empty when every character is there."""
    unknown = tokenizer.unk_token_id
    coded = ((char, plain_ids(tokenizer, char)) for char in sorted(set(text)) if not char.isspace())
    missing = [char for char, own in coded if not own or unknown in own]
    count = list(ids).count(unknown)
    if not (missing or count):
        return ""
    which = f" ({' '.join(missing[:8])}{' ...' * (len(missing) > 8)})" if missing else ""
    instead = f"unknown tokens, {count} in all, stand in its place" if count else "the model does not see it"
    return f"the tokenizer has no token for some of the text{which}: {instead}"


@dataclass(frozen=True)
class Encoded:
    """A document as ids, with those of the template."""

    ids: list[int]
    seq: tuple[int, str, bool]  # lead, tail, and whether the chat template is used, as `observe.prefill` takes them
    segments: Tensor | None = None  # [S, 4] int32 stretches of the text; None where they are not known

    def segments_of(self, ids: Sequence[int]) -> Tensor | None:  # -> [S, 4] int32
        """The stretches of the first of these ids, which a newline may close; None for any other part of them."""
        pairs = zip(ids, self.ids, strict=False)
        same = next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(ids), len(self.ids)))
        if self.segments is None or len(ids) - same > CLOSING:
            return None
        kept = self.segments[self.segments[:, 0] < len(ids)].clone()
        kept[:, 1].clamp_(max=len(ids))
        return kept


def encoded(
    tokenizer: Any,
    text: str,
    warn: Callable[[str], None],
    *,
    raw: bool = False,
    appended: bool = False,
    spans: Sequence[Span] | None = None,
) -> Encoded:
    """A document as ids; `warn` is told what the model will not see.

    raw: without the chat template. appended: behind what was read before, so that nothing opens it.
    spans: stretches of the text, by default its paragraphs.
    """
    ids, last = _document(tokenizer, text)
    if missing := lost(tokenizer, text, ids):
        warn(missing)
    chat = not raw and bool(tokenizer.chat_template)
    lead, tail = ([], "\n") if appended else opening_ids(tokenizer, chat)
    if spans is not None and last is None:
        raise InfeasibleError("stretches of the text cannot be told", "the model's tokenizer does not count characters")
    where = paragraphs(text.rstrip() + "\n") if spans is None else spans
    segments = None if last is None else in_tokens(where, last, len(lead))
    return Encoded([*lead, *ids], (len(lead), tail, chat), segments)


def truncate(tokenizer: Any, ids: Sequence[int], room: int, lead: int) -> tuple[list[int], list[int]]:
    """The first of a document's ids, closed by a newline, and those cut off: at most `room` stay.

    Raises InfeasibleError where that leaves nothing behind the `lead` tokens of the template.
    """
    if len(ids) <= room:
        return list(ids), []
    close = plain_ids(tokenizer, "\n")
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
    return plain_ids(tokenizer, prompt) + parsed_ids(tokenizer, tail) + plain_ids(tokenizer, prefix)


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
    turn = [token for token in parsed_ids(tokenizer, tail)[:1] if token in tokenizer.all_special_ids]
    found = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id, *turn}
    return sorted(found - {None})


def parsed_ids(tokenizer: Any, text: str) -> list[int]:
    """Text of a template, in which special tokens mean what they say."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False, verbose=False)
    return ids


def plain_ids(tokenizer: Any, text: str) -> list[int]:
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
