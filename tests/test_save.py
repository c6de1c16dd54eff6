"""resume --save: a turn kept as a snapshot of its own is what the model would remember of the whole talk."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from kvcli.cli import run
from kvcli.errors import InfeasibleError
from kvcli.model.answer import Sampling, answer
from kvcli.model.extend import extend
from kvcli.model.load import Model, load
from kvcli.model.observe import prefill
from kvcli.model.prefix import Prefix, logits
from kvcli.model.resume import question, turn
from kvcli.model.text import closing_ids, document_ids
from kvcli.snapshot import Snapshot
from kvcli.storage import Reader

TEXT = "The harbour opened at six. " * 5 + "The new ferry is called Kestrel.\n"
START, END = 1, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    tiny_model(folder / "model")
    (folder / "doc.txt").write_text(TEXT)
    return folder


@pytest.fixture
def model(folder: Path) -> Model:
    return load(str(folder / "model"), dtype="float32")


def remember(model: Model, chat: bool) -> Snapshot:
    ids, lead, tail = document_ids(model.tokenizer, TEXT, chat)
    return prefill(model, ids, (lead, tail, chat))


def ask(model: Model, snapshot: Snapshot, prompt: str, **how: Any) -> tuple[Snapshot, list[int]]:
    """The snapshot with the turn, and the ids of the turn."""
    prefix = Prefix.read(snapshot, model)
    ids = question(model, prefix, prompt)
    whole = turn(model, prefix, prompt, ids, answer(model, prefix, ids, Sampling(**how)))
    return extend(model, snapshot, whole), whole


def in_one_pass(folder: Path, ids: Sequence[int], n: int) -> torch.Tensor:
    net = load(str(folder / "model"), dtype="float32", attention="eager").net
    with torch.no_grad():
        rows: torch.Tensor = net(torch.tensor([ids])).logits[0, -n:]
    return rows


@pytest.mark.parametrize("chat", [True, False])
def test_a_second_question_finds_the_whole_talk(folder: Path, model: Model, chat: bool) -> None:
    snapshot = remember(model, chat)
    saved, added = ask(model, snapshot, "Who?", n=9)
    assert saved.ids.tolist() == [*snapshot.ids.tolist(), *added] and saved.meta.seq.next_pos == len(saved.ids)
    prefix = Prefix.read(saved, model)
    second = question(model, prefix, "And when?")
    expected = in_one_pass(folder, [*saved.ids.tolist(), *second], len(second))
    torch.testing.assert_close(logits(model, prefix, second, len(second)), expected, atol=1e-4, rtol=1e-4)


def test_a_saved_chat_reads_as_its_template_writes_it(model: Model) -> None:
    snapshot = remember(model, True)
    model.net.lm_head.weight[:] = 0
    model.net.lm_head.bias = torch.nn.Parameter(torch.zeros(300), requires_grad=False)
    letter = model.tokenizer.encode("A")[0]
    model.net.lm_head.bias[letter] = 1  # it says A until -n
    saved, _ = ask(model, snapshot, "Who?", n=3)
    turns = [("user", TEXT + "Who?"), ("assistant", "AAA"), ("user", "")]
    shown = model.tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in turns], tokenize=False
    )
    assert shown.startswith(model.tokenizer.decode(saved.ids)) and shown.endswith("user\n<|im_end|>\n")
    assert saved.ids.tolist().count(END) == 2
    model.net.lm_head.bias[END] = 2  # it ends its turn at once: the template's end is not doubled
    ended, _ = ask(model, snapshot, "Who?", n=3)
    assert model.tokenizer.decode(ended.ids).endswith("assistant\n<|im_end|>\n<|im_start|>user\n")


@pytest.mark.parametrize("stop", [(), ("zz",)])
def test_plain_text_that_goes_on_twice_goes_on_as_once(model: Model, stop: tuple[str, ...]) -> None:
    snapshot = remember(model, False)
    once, ids = ask(model, snapshot, "", n=12, stops=stop)
    half, first = ask(model, snapshot, "", n=5, stops=stop)
    twice, second = ask(model, half, "", n=7, stops=stop)
    assert first + second == ids and torch.equal(once.ids, twice.ids)


def test_text_between_turns() -> None:
    assert tiny_tokenizer().decode(closing_ids(tiny_tokenizer(), True)) == "<|im_end|>\n<|im_start|>user\n"
    for tokenizer, chat in ((tiny_tokenizer(), False), (tiny_tokenizer(chat_template=None), True)):
        assert tokenizer.decode(closing_ids(tokenizer, chat)) == "\n"
    forgetful = "{{ messages[-1]['content'] }}"  # drops earlier turns
    with pytest.raises(InfeasibleError, match="template"):
        closing_ids(tiny_tokenizer(chat_template=forgetful), True)


@pytest.fixture
def work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    assert run("prefill doc.txt --model model -f -o full".split()) == 0
    assert run("compress full -m kvmerger -b 50% -f -o small".split()) == 0
    return folder


def test_saving_at_the_command_line(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in ("full", "small"):
        capsys.readouterr()
        assert run([*f"resume {file} -p Who? -n 6 -f --json --save".split(), f"{file}-2"]) == 0
        facts = json.loads(capsys.readouterr().out)
        saved, told = facts["saved"], facts["answers"][0]
        with Reader(work / f"{file}-2") as reader:
            assert reader.verify()["ok"] and saved["file_bytes"] == reader.header.size
            assert saved["tokens"] == reader.meta.seq.tokens == facts["tokens_reused"] + saved["added"]
        assert saved["added"] > told["computed"] + 1
        assert run([*"resume -p Why? -n 4 --save third -f".split(), f"{file}-2"]) == 0
        assert f"third: {len(Reader(work / 'third').snapshot().ids)} tokens, " in capsys.readouterr().err
        assert run([*"compress -m snapkv -b 50% -f -o fourth".split(), f"{file}-2"]) == 0
        assert run("resume fourth -p x -n 2".split()) == 0


def test_what_a_stop_text_cut_off_is_not_saved(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run("resume full -p Who? -n 20 --json".split()) == 0
    free = json.loads(capsys.readouterr().out)["answers"][0]["text"]
    stop = next(char for char in free[3:] if char.isprintable() and char not in "\ufffd ")
    assert run(["resume", "full", "-p", "Who?", "-n", "20", "-f", "--save", "cut", "--stop", stop]) == 0
    with Reader(work / "cut") as reader:
        said = tiny_tokenizer().decode(reader.tensor("ids")).split("assistant\n")[1]
    assert said == free[: free.index(stop)] + "<|im_end|>\n<|im_start|>user\n"


REFUSED = [
    ("full -p x --save full", 3, "exists"),
    ("full -p x --save -", 2, "--save"),
    ("full -p x --save new --trust-model", 2, "another model"),
    ("full -p x -p y --save new", 2, "one question"),
    ("full --continuation doc.txt --save new", 2, "--save"),
    ("full -p x --save none/new", 3, "none"),
    ("full -p x --save new -n 350", 6, "no room"),
]


@pytest.mark.parametrize(("line", "code", "says"), REFUSED, ids=[line for line, *_ in REFUSED])
def test_bad_input(work: Path, capsys: pytest.CaptureFixture[str], line: str, code: int, says: str) -> None:
    before = sorted(work.iterdir()), (work / "full").read_bytes()
    capsys.readouterr()
    assert run(["resume", *line.split()]) == code
    seen = capsys.readouterr()
    assert says in seen.err and "Traceback" not in seen.err and seen.out == ""
    assert before == (sorted(work.iterdir()), (work / "full").read_bytes())


def test_a_save_that_would_not_fit_is_refused_before_the_answer(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    long = ["resume", "full", "-p", "x" * 300]
    assert run([*long, "-n", "1", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    most = 512 - facts["tokens_reused"] - facts["tokens_computed"]
    close = len(closing_ids(tiny_tokenizer(), True))
    for n, code in ((most, 6), (most - close + 1, 6), (most - close, 0)):
        capsys.readouterr()
        assert run([*long, "-n", str(n), "--save", "new", "-f"]) == code
        assert (capsys.readouterr().out == "") == bool(code)
    assert run([*long, "-n", str(most)]) == 0
