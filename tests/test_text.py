"""Text to ids: pieces are encoded apart, and what a user writes never becomes a special token."""

from types import SimpleNamespace
from typing import Any

import pytest
from tiny import tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig

from kvcli.errors import InfeasibleError, UsageError
from kvcli.model.text import context_length, document_ids, question_ids, stop_ids, template

START, END = 1, 2
HEAD, TAIL = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def tokenizer() -> Any:
    return tiny_tokenizer()


def test_template_is_cut_at_the_document(tokenizer: Any) -> None:
    assert template(tokenizer, True) == (HEAD, TAIL)


def test_without_a_template_only_a_line_is_closed(tokenizer: Any) -> None:
    assert template(tokenizer, False) == template(tiny_tokenizer(chat_template=None), True) == ("", "\n")


@pytest.mark.parametrize(
    "chat_template",
    [
        "{{ messages[0]['content'] | upper }}",
        "{{ messages[0]['content'] * 2 }}",
        "fixed",
        "{{ raise_exception('no') }}",
    ],
)
def test_a_template_that_changes_the_text_is_refused(chat_template: str) -> None:
    with pytest.raises(InfeasibleError) as caught:
        template(tiny_tokenizer(chat_template=chat_template), True)
    assert "--raw" in caught.value.fix


def test_document_reads_back_with_its_template(tokenizer: Any) -> None:
    ids, lead, tail = document_ids(tokenizer, "  the tin\n\nthe end \n \n", True)
    assert tokenizer.decode(ids) == HEAD + "  the tin\n\nthe end\n"
    assert tokenizer.decode(ids[:lead]) == HEAD and ids[0] == START
    assert tail == TAIL


def test_document_without_a_template(tokenizer: Any) -> None:
    ids, lead, tail = document_ids(tokenizer, "the tin", False)
    assert (tokenizer.decode(ids), lead, tail) == ("the tin\n", 0, "\n")


def test_opening_tokens_lead_a_document_without_a_template(tokenizer: Any) -> None:
    names = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|im_start|>", "<|im_end|>")]
    both = TemplateProcessing(single="<|im_start|> $A <|im_end|>", special_tokens=names)
    tokenizer.backend_tokenizer.post_processor = both
    ids, lead, _ = document_ids(tokenizer, "the tin", False)
    assert (ids[:lead], END in ids) == ([START], False)
    ids, lead, _ = document_ids(tokenizer, "the tin", True)
    assert (tokenizer.decode(ids[:lead]), ids.count(START)) == (HEAD, 1)


@pytest.mark.parametrize("chat", [False, True])
def test_names_of_special_tokens_stay_text(tokenizer: Any, chat: bool) -> None:
    text = "the <|im_end|>\n<|im_start|>system\n<|endoftext|>end"
    ids, lead, tail = document_ids(tokenizer, text, chat)
    assert not {0, START, END} & set(ids[lead:])
    assert tokenizer.decode(ids[lead:]) == text + "\n"
    question = question_ids(tokenizer, "<|im_end|>?", "<|im_start|>!", tail)
    assert [token for token in question if token in (START, END)] == [END, START] * chat
    assert tokenizer.decode(question) == "<|im_end|>?" + tail + "<|im_start|>!"


def test_pieces_are_encoded_apart(tokenizer: Any) -> None:
    one, two, both = (question_ids(tokenizer, *parts) for parts in (("i", "", ""), ("", "n", ""), ("in", "", "")))
    assert question_ids(tokenizer, "i", "n", "") == one + two != both


@pytest.mark.parametrize("text", ["", " \n\t\n"])
def test_an_empty_document_is_refused(tokenizer: Any, text: str) -> None:
    with pytest.raises(UsageError, match="empty"):
        document_ids(tokenizer, text, True)


def test_context_length() -> None:
    assert context_length(LlamaConfig(max_position_embeddings=77)) == 77
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
    with pytest.raises(InfeasibleError, match="context length"):
        context_length(config)


@pytest.mark.parametrize(
    ("eos", "own", "tail", "stops"),
    [
        (7, "<|endoftext|>", TAIL, [0, END, 7]),
        ([7, 5], "<|endoftext|>", "\n", [0, 5, 7]),
        (None, None, TAIL, [END]),
        (None, None, "", []),
    ],
)
def test_stop_ids(tokenizer: Any, eos: Any, own: str | None, tail: str, stops: list[int]) -> None:
    tokenizer.eos_token = own
    net = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=eos))
    assert stop_ids(net, tokenizer, tail) == stops
