"""A chat as a document: its messages as the model's chat template has them, each a stretch of the text."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

from ..collect import SEGMENTS
from ..errors import InfeasibleError
from .segments import table
from .text import Encoded, around, lost, parsed_ids, plain_ids

Message = Mapping[str, str]
ROLE = re.compile(r"[\w .-]+")  # it stands among the template's special tokens, and must not hold any
FILES = (".json", ".jsonl")  # how the names of chats end
TURN, SYSTEM = (SEGMENTS.index(name) for name in ("turn", "system"))


def is_chat(found: Any) -> TypeGuard[list[Message]]:
    """Whether this is a list of messages, {"role", "content"} each."""
    return isinstance(found, list) and bool(found) and all(map(_is_message, found))


def _is_message(found: Any) -> bool:
    if not isinstance(found, Mapping) or not all(isinstance(found.get(key), str) for key in ("role", "content")):
        return False
    return ROLE.fullmatch(found["role"]) is not None


def messages(text: str) -> list[Message] | None:
    """Those of a JSON list, or of JSON lines; None for any other text."""
    for read in (json.loads, lambda text: [json.loads(line) for line in text.split("\n") if line.strip()]):
        try:
            found = read(text)
        except (ValueError, RecursionError):
            continue
        if is_chat(found):
            return found
    return None


def encoded_chat(tokenizer: Any, chat: Sequence[Message], warn: Callable[[str], None]) -> Encoded:
    """Ids of a chat, up to where the user asks next; special-token text in a message stays text.

    Each message is a stretch from where its turn is opened, the first one's opening being the template's, and the
    group is its number. Raises InfeasibleError where the model has no chat template that takes these roles.
    """
    if not tokenizer.chat_template:
        raise InfeasibleError("the model has no chat template to read a chat by", fix="--raw reads the file as text")
    *opened, asks, tail = around(tokenizer, [*(each["role"] for each in chat), "user"])
    ids, stretches = parsed_ids(tokenizer, opened[0]), list[tuple[int, int, int, int]]()
    lead = len(ids)
    for i, each in enumerate(chat):
        begin, own = len(ids), plain_ids(tokenizer, each["content"])
        ids += (parsed_ids(tokenizer, opened[i]) if i else []) + own
        if missing := lost(tokenizer, each["content"], own):
            warn(f"message {i + 1}: {missing}")
        if begin < len(ids):
            stretches.append((begin, len(ids), SYSTEM if each["role"] == "system" else TURN, i))
    ids += parsed_ids(tokenizer, asks)
    return Encoded(ids, (lead, tail, True), table(stretches))
