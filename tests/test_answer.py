"""Answers: drawn as generate draws, streamed whole, ended by stop texts, and a document that goes on by itself."""

from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer
from torch.nn.functional import cross_entropy
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
)

from kvcli.errors import FormatError, InfeasibleError, KvError
from kvcli.metrics import kl, top1
from kvcli.model.answer import Sampling, Speech, answer, cut, kept
from kvcli.model.load import Model, load
from kvcli.model.observe import prefill
from kvcli.model.prefix import CHUNK, Prefix, logits, opening, predict
from kvcli.model.resume import compare, expected, question

IDS = torch.randint(5, 290, (120,), generator=torch.Generator().manual_seed(1)).tolist()
LONG = torch.randint(5, 290, (300,), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.fixture
def eager(folder: Path) -> Any:
    return load(str(folder), dtype="float32", attention="eager").net


def remember(model: Model, chat: bool = False) -> Prefix:
    return Prefix.read(prefill(model, IDS, (0, "\n", chat)), model)


def own(net: Any, ids: list[int], n: int, **drawn: Any) -> list[int]:
    out = net.generate(torch.tensor([ids]), max_new_tokens=n, pad_token_id=0, **{"do_sample": False, **drawn})
    return out[0, len(ids) :].tolist()


def test_an_empty_prompt_lets_the_document_go_on(model: Model, eager: Any) -> None:
    assert question(model, remember(model), "") == []
    said = answer(model, remember(model), [], Sampling(n=12))
    assert said.ids == own(eager, IDS, 12) and said.computed == 0 and said.finish == "length"


def test_an_empty_prompt_in_a_chat_still_closes_the_turn(model: Model) -> None:
    assert model.tokenizer.decode(question(model, remember(model, chat=True), "")) == "\n"


@pytest.mark.parametrize(
    ("kind", "config", "odd"),
    [
        (CohereForCausalLM, CohereConfig, {"logit_scale": 0.3}),
        (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 4.0}),
        (Gemma2ForCausalLM, Gemma2Config, {"final_logit_softcapping": 0.1, "head_dim": 8}),
    ],
)
def test_the_head_of_models_that_scale_or_cap_their_logits(kind: Any, config: Any, odd: dict[str, float]) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 300}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    torch.manual_seed(0)
    net = kind._from_config(config(**sizes, **heads, **tokens, **odd), attn_implementation="kvcli").eval()
    model = as_model(net)
    prefix = remember(model)
    net.set_attn_implementation("eager")
    with torch.no_grad():
        expected = net(torch.tensor([IDS])).logits[0, -1:]
    net.set_attn_implementation("kvcli")
    torch.testing.assert_close(opening(model, prefix), expected, atol=1e-4, rtol=1e-4)


def as_model(net: Any) -> Model:
    """A model around a net; its identity is not asked for, so the blocks of a snapshot that name it stay empty."""
    model = Model(net, tiny_tokenizer(), None, "made", "", torch.device("cpu"))
    model.__dict__.update(identity={}, tokenizer_hash="")
    return model


class Odd(LlamaForCausalLM):
    """Makes its logits in a way that no config names."""

    @wraps(LlamaForCausalLM.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 3
        return out


def test_a_head_that_is_not_known_is_refused(model: Model, folder: Path) -> None:
    prefix = remember(model)
    model.net.__class__ = Odd
    with pytest.raises(InfeasibleError, match="llama"):
        opening(model, prefix)


def test_without_a_usable_hidden_state_something_must_be_asked(model: Model) -> None:
    prefix = remember(model)
    bare = Prefix(prefix.rows, prefix.tokens, prefix.tail, chat=False)
    with pytest.raises(InfeasibleError) as caught:
        answer(model, bare, [], Sampling())
    assert "ask" in caught.value.fix
    with pytest.raises(FormatError, match="final_hidden"):
        opening(model, Prefix(prefix.rows, prefix.tokens, "", False, torch.zeros(5)))


@pytest.mark.parametrize(
    "drawn", [{"temperature": 1.3}, {"temperature": 0.7, "top_k": 20, "top_p": 0.8}, {"temperature": 1.0}]
)
def test_tokens_are_drawn_as_generate_draws_them(model: Model, eager: Any, drawn: dict[str, Any]) -> None:
    torch.manual_seed(3)
    expected = own(eager, [*IDS, 7, 8], 10, **{"do_sample": True, "top_k": 0, "top_p": 1.0, **drawn})
    before = torch.random.get_rng_state()
    assert answer(model, remember(model), [7, 8], Sampling(n=10, seed=3, **drawn)).ids == expected
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("drawn", [{"top_k": 1}, {"top_p": 0.0}, {"temperature": 1e-30}])
def test_the_narrowest_draw_is_greedy(model: Model, drawn: dict[str, Any]) -> None:
    prefix = remember(model)
    sampling = Sampling(**{"n": 8, "temperature": 2.0, **drawn})
    assert answer(model, prefix, [7], sampling).ids == answer(model, prefix, [7], Sampling(n=8)).ids


TOKENIZER = tiny_tokenizer()
WHOLE = st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")
AB = st.text("ab", min_size=1, max_size=3)


@settings(deadline=None)
@given(st.lists(AB, max_size=6), st.lists(AB, max_size=3))
def test_stop_texts_cut_at_the_first_that_ends_whatever_the_pieces(pieces: list[str], stops: list[str]) -> None:
    shown, held, stopped = "", "", False
    for i, piece in enumerate(pieces):
        more, held, stopped = cut(held + piece, stops)
        shown += more
        if stopped:
            pieces = pieces[: i + 1]
            break
        assert len(held) < max(map(len, stops), default=1)
    whole = "".join(pieces)
    ends = [end for end in range(len(whole) + 1) if any(whole[:end].endswith(stop) for stop in stops)]
    assert stopped == bool(ends)
    longest = max((len(stop) for stop in stops if whole[: ends[0]].endswith(stop)), default=0) if ends else 0
    assert shown + held == (whole[: ends[0] - longest] if ends else whole)


@settings(deadline=None)
@given(st.lists(st.integers(0, 264), max_size=30))
def test_pieces_are_the_text_of_all_tokens(ids: list[int]) -> None:
    pieces: list[str] = []
    speech = Speech(TOKENIZER, (), pieces.append)
    assert not any(speech.add(token) for token in ids)
    assert speech.end() == "".join(pieces) == TOKENIZER.decode(ids, skip_special_tokens=True)


@settings(max_examples=40, deadline=None)
@given(st.text(WHOLE, max_size=12), st.integers(0, 12))
def test_characters_come_whole(text: str, at: int) -> None:
    pieces: list[str] = []
    stop = text[at : at + 2]
    speech = Speech(TOKENIZER, [stop] if stop else [], pieces.append)
    ids = TOKENIZER.encode(text, split_special_tokens=True)
    stopped = any(speech.add(token) for token in ids)
    assert stopped == bool(stop)
    assert speech.end() == (text[: text.index(stop)] if stop else text)
    assert not any("\ufffd" in piece for piece in pieces)


class Halves:
    """A tokenizer whose last token ends in the middle of a character."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return b"".join((b"a", b"b stop\xe2")[token] for token in ids).decode(errors="replace")


def test_a_stop_text_before_half_a_character_is_not_shown_either() -> None:
    for stops, text in (((), "ab stop\ufffd"), (("stop",), "ab ")):
        speech = Speech(Halves(), stops, lambda piece: None)
        assert not speech.add(0) and not speech.add(1) and speech.end() == text


def test_an_answer_ends_with_the_turn_or_before_a_stop_text(model: Model) -> None:
    prefix = remember(model)
    for token in range(300):  # so that it says letters only
        if not model.tokenizer.decode([token]).isalpha():
            model.net.lm_head.weight[token] = 0
    free = answer(model, prefix, [7], Sampling(n=16))
    model.net.generation_config.eos_token_id = free.ids[4]
    ended = answer(model, prefix, [7], Sampling(n=16))
    assert ended.finish == "end" and ended.ids == free.ids[: free.ids.index(free.ids[4]) + 1]
    assert kept(model.tokenizer, ended) == ended.ids[:-1]
    model.net.generation_config.eos_token_id = None
    stop = free.text[5:7]
    shown: list[str] = []
    cut_off = answer(model, prefix, [7], Sampling(n=16, stops=(stop,)), shown.append)
    assert cut_off.finish == "stop" and "".join(shown) == cut_off.text == free.text[: free.text.index(stop)]
    assert len(cut_off.ids) < 16
    assert model.tokenizer.decode(kept(model.tokenizer, cut_off)) == cut_off.text
    assert kept(model.tokenizer, free) == free.ids


def test_a_text_is_expected_as_in_one_forward_pass(model: Model, eager: Any) -> None:
    prefix = remember(model)
    with torch.no_grad():
        rows = eager(torch.tensor([IDS + LONG])).logits[0]
    whole = cross_entropy(rows[len(IDS) - 1 : -1], torch.tensor(LONG), reduction="none")
    found = expected(model, prefix, prefix, LONG, len(LONG))
    torch.testing.assert_close(found["nll"], whole, atol=1e-4, rtol=1e-4)
    assert torch.equal(found["nll"], found["nll_against"])
    assert found["kl"].abs().max() < 1e-6 and bool(found["top1"].all())
    torch.testing.assert_close(expected(model, prefix, None, LONG, 140)["nll"], whole[-140:], atol=1e-4, rtol=1e-4)
    assert sorted(expected(model, prefix, None, LONG[:1], 1)) == ["nll"]
    sizes = [len(part) for part in predict(model, prefix, LONG, 301)]
    assert sum(sizes) == 301 and max(sizes) <= CHUNK


def test_two_prefixes_are_held_against_each_other(model: Model) -> None:
    full, other = remember(model), Prefix.read(prefill(model, IDS[::-1], (0, "\n", False)), model)
    found = expected(model, other, full, LONG, len(LONG))
    mine, theirs = (logits(model, one, LONG[:-1], len(LONG)) for one in (other, full))
    assert torch.equal(found["kl"], kl(theirs, mine)) and torch.equal(found["top1"], top1(theirs, mine))
    assert torch.equal(found["nll_against"], expected(model, full, None, LONG, len(LONG))["nll"])
    assert not torch.equal(found["nll"], found["nll_against"])


@pytest.mark.parametrize("ids", [[], [7, 8]])
def test_comparison_works_with_and_without_a_question(model: Model, ids: list[int]) -> None:
    prefix = remember(model)
    divergence, same = compare(model, prefix, prefix, ids, 5)
    assert len(divergence) == 5 and bool((divergence.abs() < 1e-6).all()) and bool(same.all())
    assert logits(model, prefix, ids, len(ids) + 1).shape == (len(ids) + 1, 300)


def test_garbage_is_never_said(model: Model) -> None:
    prefix, said = remember(model), list[str]()
    model.net.lm_head.weight[:, 3] = torch.nan
    for ids in ([], [7]):
        with pytest.raises(KvError, match="NaN") as caught:
            answer(model, prefix, ids, Sampling(), said.append)
        assert "float32" in caught.value.why and said == []
    with pytest.raises(KvError, match="NaN"):
        expected(model, prefix, None, LONG, len(LONG))


def test_the_context_is_respected_to_the_token(model: Model) -> None:
    prefix = remember(model)  # 120 of 512
    assert len(answer(model, prefix, [7] * 390, Sampling(n=2)).ids) == 2
    with pytest.raises(InfeasibleError, match="no room"):
        answer(model, prefix, [7] * 390, Sampling(n=3))
    assert len(expected(model, prefix, None, [7] * 392, 1)["nll"]) == 1
    with pytest.raises(InfeasibleError, match="no room"):
        expected(model, prefix, None, [7] * 393, 1)


def test_speed_is_measured_over_as_many_tokens_as_are_asked_for(model: Model) -> None:
    prefix = remember(model)
    said = answer(model, prefix, LONG, Sampling(n=6))
    ends = set(said.ids)
    model.net.generation_config.eos_token_id = [*ends]
    assert answer(model, prefix, LONG, Sampling(n=6)).finish == "end"
    endless = answer(model, prefix, LONG, Sampling(n=6, endless=True))
    assert (endless.finish, len(endless.ids)) == ("length", 6)
