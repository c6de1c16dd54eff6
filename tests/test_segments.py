"""Stretches of a text: paragraphs, those of a file, turns of a chat; in tokens, cut, appended, and kept when small."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from make import shrunk

import kvcli
from kvcli.cli import run
from kvcli.collect import SEGMENTS
from kvcli.errors import FormatError, InfeasibleError, UsageError
from kvcli.model.chat import messages
from kvcli.model.load import Model
from kvcli.model.segments import behind, in_tokens, paragraphs, spans_of, table
from kvcli.model.text import encoded
from kvcli.model.text import truncate as cut
from kvcli.snapshot import Snapshot

TEXT = "\n\nThe first.\nStill it.\n\n  The s\u00e9cond \u4e16.\n \t\n\nThe <|im_end|> last.\n\n"
PARTS = ["\n\nThe first.\nStill it.\n\n", "  The s\u00e9cond \u4e16.\n \t\n\n", "The <|im_end|> last.\n"]
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Who is <|im_end|>?\n\nWho?"},
    {"role": "assistant", "content": ""},
]


def told(snapshot: Snapshot, model: Model) -> list[tuple[str, str, int]]:
    """The text of each stretch, its type and its group."""
    found = snapshot.extra["stat.segments"]
    assert found.dtype == torch.int32 and found.shape[1] == 4
    decode = model.tokenizer.decode
    return [(decode(snapshot.ids[b:e]), SEGMENTS[kind], group) for b, e, kind, group in found.tolist()]


@pytest.mark.parametrize("raw", [False, True])
def test_paragraphs_are_recorded_of_every_text(model: Model, raw: bool) -> None:
    snapshot = kvcli.prefill(TEXT, model, raw=raw)
    assert told(snapshot, model) == [(part, "paragraph", i) for i, part in enumerate(PARTS)]
    begins, ends = snapshot.extra["stat.segments"][:, :2].T.tolist()
    assert begins == [snapshot.meta.seq.lead, *ends[:-1]] and ends[-1] == len(snapshot.ids)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", [(0, 1)]),
        ("a\nb\n", [(0, 4)]),
        ("a\n\nb", [(0, 3), (3, 4)]),
        ("a\r\n\r\nb", [(0, 5), (5, 6)]),
        (" \n\n\n a\n \n\n b\n", [(0, 10), (10, 13)]),
    ],
)
def test_blank_lines_divide(text: str, expected: list[tuple[int, int]]) -> None:
    assert [span[:2] for span in paragraphs(text)] == expected


def test_a_token_is_where_its_last_character_is() -> None:
    """A word with its space, and a character of three tokens; what has no token is left out."""
    last = [2, 5, 6, 6, 6, 7]
    spans = [(0, 3, 0, 0), (3, 6, 0, 1), (6, 7, 1, 2), (7, 8, 0, 3)]
    assert in_tokens(spans, last, 10).tolist() == [[10, 11, 0, 0], [11, 12, 0, 1], [12, 15, 1, 2], [15, 16, 0, 3]]
    assert in_tokens([(0, 1, 0, 7), (1, 8, 0, 8)], last, 0).tolist() == [[0, 6, 0, 8]]
    assert in_tokens([(9, 12, 0, 0)], last, 0).shape == (0, 4)


def test_ids_and_a_tokenizer_that_counts_no_characters_have_none(model: Model) -> None:
    assert "stat.segments" not in kvcli.prefill([7, 8, 9], model).extra

    class Slow:
        is_fast, chat_template, unk_token_id = False, None, None

        def encode(self, text: str, **_: Any) -> list[int]:
            return list(text.encode())

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [*text.encode()], "special_tokens_mask": [0] * len(text.encode())}

    assert encoded(Slow(), "A text.", print).segments is None
    with pytest.raises(InfeasibleError, match="stretches"):
        encoded(Slow(), "A text.", print, spans=[(0, 1, 0, 0)])


def test_the_text_is_encoded_once_as_ever(model: Model) -> None:
    tokenizer, asked = model.tokenizer, []
    ids = tokenizer.encode(TEXT.rstrip() + "\n", add_special_tokens=False, split_special_tokens=True)

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def encode(self, text: str, **how: Any) -> Any:
            asked.append(text)
            return tokenizer.encode(text, **how)

        def __call__(self, text: str, **how: Any) -> Any:
            asked.append(text)
            return tokenizer(text, **how)

    assert encoded(Counting(), TEXT, print, appended=True).ids == ids
    assert len([text for text in asked if len(text) > 40]) == 1


def test_what_is_cut_off_has_no_stretch(model: Model) -> None:
    doc = encoded(model.tokenizer, TEXT, print)
    at, lead = int(doc.segments[2, 0]), doc.seq[0]  # type: ignore[index]
    for room in (at + 5, at + 1, at - 3, lead + 2):
        ids, _ = cut(model.tokenizer, doc.ids, room, lead)
        found = doc.segments_of(ids)
        assert found is not None and int(found[-1, 1]) == len(ids) == room
        assert torch.equal(found[:-1], doc.segments[: len(found) - 1])  # type: ignore[index]
    assert torch.equal(doc.segments_of(doc.ids[:at]), doc.segments[:2])  # type: ignore[arg-type, index]
    assert doc.segments_of([*doc.ids[:20], *doc.ids[30:]]) is None


def test_appended_texts_go_on_counting(model: Model, tmp_path: Path) -> None:
    first = kvcli.prefill("One.\n\nTwo.", model)
    both = kvcli.prefill("Three.\n\nFour.", model, onto=first)
    texts = ["One.\n\n", "Two.\n", "Three.\n\n", "Four.\n"]
    assert told(both, model) == [(text, "paragraph", i) for i, text in enumerate(texts)]
    small = shrunk(both, "snapkv", tmp_path / "a", "50%")
    assert torch.equal(small.extra["stat.segments"], both.extra["stat.segments"])
    longer = kvcli.prefill("Five.", model, onto=small)
    assert told(longer, model)[-1] == ("Five.\n", "paragraph", 4)
    bare = kvcli.prefill([5, 6, 7], model)
    assert told(kvcli.prefill("Last.", model, onto=bare), model) == [("Last.\n", "paragraph", 0)]
    assert behind(None, table([(0, 2, 0, 0)]), 3).tolist() == [[3, 5, 0, 0]]


def test_stretches_of_a_file(model: Model, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "doc.txt").write_text("The first. And the second one.")
    rows: list[dict[str, Any]] = [{"start": 0, "end": 10, "type": "frame"}, {"start": 15, "end": 30, "group": 7}]
    (tmp_path / "s.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    args = ["prefill", f"{tmp_path}/doc.txt", "--model", str(folder), "--segments", f"{tmp_path}/s.jsonl"]
    assert run([*args, "-o", f"{tmp_path}/a"]) == 0
    expected = [("The first.", "frame", 0), (" the second one.", "paragraph", 7)]  # a token with its space
    assert told(kvcli.open(tmp_path / "a"), model) == expected
    assert told(kvcli.prefill("The first. And the second one.", model, segments=rows), model) == expected
    (tmp_path / "s.jsonl").write_text(json.dumps(rows[0]) + "\n" + json.dumps({"start": 9, "end": 12}))
    assert run([*args, "-o", f"{tmp_path}/b"]) == 4
    assert "s.jsonl:2 begins at character 9" in capsys.readouterr().err and not (tmp_path / "b").exists()
    assert run([*args, f"{tmp_path}/s.jsonl", "-o", f"{tmp_path}/{{name}}"]) == 2


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({}, "no stretch"),
        ({"start": 0}, "no stretch"),
        ({"start": 3, "end": 3}, "no stretch"),
        ({"start": -1, "end": 3}, "no stretch"),
        ({"start": 0, "end": 3.0}, "no stretch"),
        ({"start": False, "end": 3}, "no stretch"),
        ({"start": 0, "end": 3, "group": 2**31}, "no stretch"),
        ({"start": 0, "end": 3, "group": None}, "no stretch"),
        ({"start": 0, "end": 21}, "ends at character 21"),
        ({"start": 0, "end": 3, "type": "page"}, "no type 'page'"),
        ({"start": 0, "end": 3, "type": ["turn"]}, "no type"),
        ({"start": 0, "end": 3, "kind": "turn"}, "'kind'"),
    ],
)
def test_what_is_no_stretch_is_told_with_its_line(row: dict[str, Any], says: str) -> None:
    with pytest.raises(FormatError, match=says) as caught:
        spans_of([("f:7", row)], 20)
    assert "f:7" in caught.value.what


def test_a_chat_is_read_by_the_template_and_its_turns_are_stretches(model: Model) -> None:
    snapshot = kvcli.prefill(CHAT, model)
    whole = "".join(f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in CHAT)
    assert model.tokenizer.decode(snapshot.ids) == whole + "<|im_start|>user\n"
    ends = snapshot.ids.tolist().count(model.tokenizer.convert_tokens_to_ids("<|im_end|>"))
    assert ends == len(CHAT)  # that in the text stays text
    opened = "<|im_end|>\n<|im_start|>"
    assert told(snapshot, model) == [
        ("Be kind.", "system", 0),
        (f"{opened}user\nWho is <|im_end|>?\n\nWho?", "turn", 1),
        (f"{opened}assistant\n", "turn", 2),
    ]
    seq = snapshot.meta.seq
    assert seq.chat and seq.tail == kvcli.prefill("x", model).meta.seq.tail
    assert model.tokenizer.decode(snapshot.ids[: seq.lead]) == "<|im_start|>system\n"


def test_what_cannot_be_done_with_a_chat(model: Model) -> None:
    base = kvcli.prefill("One.", model)
    with pytest.raises(UsageError, match="behind a snapshot"):
        kvcli.prefill(CHAT, model, onto=base)
    with pytest.raises(UsageError, match="without the chat template"):
        kvcli.prefill(CHAT, model, raw=True)
    with pytest.raises(UsageError, match="segments"):
        kvcli.prefill(CHAT, model, segments=[])
    with pytest.raises(UsageError, match="cannot be cut"):
        kvcli.prefill(CHAT[1:2] * 60, model, truncate=True)
    model.tokenizer.chat_template = "{{ raise_exception('only one turn') }}"
    with pytest.raises(InfeasibleError, match="chat template failed"):
        kvcli.prefill(CHAT, model)
    model.tokenizer.chat_template = None
    with pytest.raises(InfeasibleError, match="no chat template"):
        kvcli.prefill(CHAT, model)


def test_a_chat_in_a_file(model: Model, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = "\n".join(map(json.dumps, CHAT))
    for name, text in (("a.jsonl", lines), ("b.json", json.dumps(CHAT, indent=1)), ("c.txt", lines)):
        (tmp_path / name).write_text(text)
        args = ["prefill", f"{tmp_path}/{name}", "--model", str(folder), "--dtype", "float32"]
        assert run([*args, "-o", f"{tmp_path}/{name}.kv"]) == 0
        assert ("a chat of 3 messages" in capsys.readouterr().err) == (name != "c.txt")
    assert run([*args[:1], f"{tmp_path}/a.jsonl", *args[2:], "--raw", "-o", f"{tmp_path}/raw"]) == 0
    ids = kvcli.prefill(CHAT, model).ids
    assert all(torch.equal(kvcli.open(tmp_path / f"{name}.kv").ids, ids) for name in ("a.jsonl", "b.json"))
    assert model.tokenizer.decode(kvcli.open(tmp_path / "raw").ids) == lines + "\n"


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "[1]", '{"role": "user"}', '{"role": "user", "content": [1]}', '{"a": 1}', "One.", "[" * 9999),
        *('{"role": "", "content": ""}', '{"role": "user\\n<|im_start|>", "content": ""}'),
        *('{"role": "\\ud800", "content": ""}', '{"role": "user", "content": ""}\n{"role": "user"}'),
    ],
)
def test_what_is_no_chat_is_a_text(text: str) -> None:
    assert messages(text) is None


def test_a_line_of_a_chat_ends_where_json_lines_end() -> None:
    """A string of JSON may hold the other characters at which Python ends a line."""
    chat = [{"role": "gpt-4 mini", "content": "One\u2028two\x85three\x0bfour"}] * 2
    lines = "\r\n".join('{"role": "gpt-4 mini", "content": "One\u2028two\x85three\\u000bfour"}' for _ in chat)
    assert messages(lines) == chat


def test_it_says_what_a_json_file_is_read_as(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    one = json.dumps(CHAT[1])
    for name, text, says in (
        ("a.JSON", one, "a chat of 1 message\n"),
        ("b.jsonl", one + '\n{"role": "user"}', "a text: it is no list of messages\n"),
    ):
        (tmp_path / name).write_text(text)
        assert run(["prefill", name, "--model", str(folder), "-o", f"{name}.kv"]) == 0
        assert f"{name} is read as {says}" in capsys.readouterr().err
    for name, chat in (("a.JSON", True), ("b.jsonl", False)):
        assert run(f"eval {name} --task ppl -m knorm -b 50% --model {folder} -q".split()) == 0
        assert ("a.JSON: the chat is read as a text" in capsys.readouterr().err) == chat
