"""Text to ids: pieces are encoded apart, and what a user writes never becomes a special token."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, PreTrainedTokenizerFast

from kvcli.errors import InfeasibleError, UsageError
from kvcli.model.text import (
    appended_ids,
    context_length,
    document_ids,
    lost,
    question_ids,
    readable,
    stop_ids,
    template,
    truncate,
)

START, END = 1, 2
BYTES = tiny_tokenizer()
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


@given(st.text())
def test_a_document_reads_back_whatever_it_holds(text: str) -> None:
    if text.strip():
        ids = appended_ids(BYTES, text)
        assert BYTES.decode(ids) == text.rstrip() + "\n" and lost(BYTES, text, ids) == ""


@pytest.mark.parametrize(
    ("model", "text", "says"),
    [
        (models.BPE({"a": 0, "b": 1}, []), "ab☃", "(☃): the model does not see it"),
        (models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>"), "a☃☕a", "(☃ ☕): unknown tokens, 2 in all"),
        (models.WordPiece({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"), "ab", "text: unknown tokens, 1 in all"),
        (models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0), "a☃☃a", "(☃): unknown tokens, 1 in all"),
    ],
)
def test_what_a_tokenizer_loses_is_said(model: Any, text: str, says: str) -> None:
    unknown = None if "the model does not" in says else "<unk>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), unk_token=unknown)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert says in lost(tokenizer, text, ids)
    assert lost(tokenizer, "a", tokenizer.encode("a", add_special_tokens=False)) == ""


def test_what_cannot_be_encoded_at_all() -> None:
    with pytest.raises(InfeasibleError, match="cannot encode"):
        appended_ids(BYTES, "half a pair: \ud800")
    nothing = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
    with pytest.raises(InfeasibleError, match="anything"):
        appended_ids(nothing, "xyz")


@pytest.mark.parametrize("room", [12, 13, 40, 100])
def test_a_document_is_cut_behind_its_first_tokens(tokenizer: Any, room: int) -> None:
    ids, lead, _ = document_ids(tokenizer, "the tin " * 40, True)
    kept, cut = truncate(tokenizer, ids, room, 2)
    assert len(kept) == room and kept[:-1] + cut == ids and tokenizer.decode(kept[-1:]) == "\n"
    assert truncate(tokenizer, ids, len(ids), lead) == (ids, [])
    with pytest.raises(InfeasibleError, match="no room"):
        truncate(tokenizer, ids, lead + 1, lead)


@pytest.mark.parametrize(("length", "tokens"), [(8192, 7680), (512, 448), (2, 2)])
def test_room_is_left_for_a_question(length: int, tokens: int) -> None:
    assert readable(LlamaConfig(max_position_embeddings=length)) == tokens
