"""The command line: exit codes, messages, JSON, pipes, terminals, and what is refused."""

import json
import os
import pty
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import click
import pytest
from tiny import nudge, tiny_model

from kvcli.cli import COMMANDS, run
from kvcli.spool import header_of

TEXT = "The harbour opened at six. " * 12 + "The new ferry is called Kestrel.\n"
KVCLI = [sys.executable, "-m", "kvcli"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A document, two models, a full snapshot and a small one."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "doc.txt").write_text(TEXT)
    tiny_model(folder / "model")
    nudge(tiny_model(folder / "other"))
    tiny_model(folder / "wide", hidden_size=64)
    (folder / "q.jsonl").write_text('{"prompt": "Who?", "prefix": "It is", "answer": "x"}\n\n{"prompt": "What?"}\n')
    os.environ["KVCLI_HOME"] = str(folder / "home")
    assert run(["prefill", f"{folder}/doc.txt", "--model", f"{folder}/model", "-o", f"{folder}/a.kv.safetensors"]) == 0
    assert run(["compress", f"{folder}/a.kv.safetensors", *"-m snapkv+adakv -b 35% -o".split(), f"{folder}/b"]) == 0
    return folder


@pytest.fixture
def work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVCLI_HOME", str(folder / "home"))
    monkeypatch.chdir(folder)
    return folder


def result(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, object]:
    capsys.readouterr()
    assert run([*args, "--json"]) == 0
    out = capsys.readouterr().out
    facts = json.loads(out)
    assert facts["schema"].startswith(f"kvcli.{args[0]}/")
    return dict(facts)


def test_the_main_job(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (full,) = result(capsys, "prefill", "doc.txt", "--model", "model", "-o", "c.kv.safetensors")["rows"]  # type: ignore[misc]
    assert (work / "c.kv.safetensors").read_bytes() == (work / "a.kv.safetensors").read_bytes()
    assert full["file_bytes"] == (work / "c.kv.safetensors").stat().st_size
    args = [
        "compress",
        "c.kv.safetensors",
        "-m",
        "kvmerger",
        "-b",
        "50%",
        "-b",
        "20",
        "-o",
        "c-{budget}.kv.safetensors",
    ]
    rows = result(capsys, *args)["rows"]
    assert isinstance(rows, list) and [row["file"] for row in rows] == ["c-50%.kv.safetensors", "c-20.kv.safetensors"]
    assert rows[0]["keep"] == pytest.approx(0.5, abs=0.01) and rows[1]["entries"] == 2 * 2 * 20
    assert 0 < rows[0]["output_error"]["q_probe_median"] < rows[1]["output_error"]["q_probe_median"]
    small = "c-50%.kv.safetensors"
    assert result(capsys, "verify", small)["ok"] is True
    assert result(capsys, "inspect", small)["entries"] == rows[0]["entries"]
    facts = result(capsys, "resume", small, "--questions", "q.jsonl", "-n", "4", "--against", "c.kv.safetensors")
    assert facts["asked"] == 1 and facts["hits"] == 0 and 0 < facts["kl_mean"] < 1  # type: ignore[operator]
    assert (
        facts["tokens_reused"] == full["tokens"] and isinstance(facts["answers"], list) and len(facts["answers"]) == 2
    )


def test_the_answer_alone_goes_to_stdout(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["resume", "b", "--prompt", "Who?", "--prefix", "It is", "-n", "4"]) == 0
    seen = capsys.readouterr()
    assert seen.out.startswith("It is") and seen.out.endswith("\n")
    assert "tokens reused" in seen.err and "first token" in seen.err
    assert run(["resume", "b", "-p", "Who?", "-n", "4", "-q"]) == 0
    assert capsys.readouterr().err == ""


def test_a_dry_run_says_the_sizes_and_writes_nothing(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(work.iterdir())
    rows = result(capsys, *"compress a.kv.safetensors -m kvmerger -b 40% --dry-run".split())["rows"]
    assert sorted(work.iterdir()) == before
    assert run([*"compress a.kv.safetensors -m kvmerger -b 40% -f -o dry".split()]) == 0
    assert isinstance(rows, list) and rows[0]["file_bytes"] == (work / "dry").stat().st_size
    (work / "dry").unlink()


def test_notes_of_several_budgets_say_whose_they_are(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    once = "compress a.kv.safetensors -m taskkv --dry-run -q -b 20%"
    rows = result(capsys, *f"{once} -b 40%".split())["rows"]
    assert isinstance(rows, list) and all(row["notes"] for row in rows)
    assert run(f"{once} -b 40%".split()) == 0
    lines = [f"kvcli: warning: {row['budget']}: {note}" for row in rows for note in row["notes"]]
    assert capsys.readouterr().err.splitlines() == lines
    assert run(once.split()) == 0
    assert capsys.readouterr().err.splitlines() == [f"kvcli: warning: {note}" for note in rows[0]["notes"]]


def test_options_of_a_group_are_those_of_its_command_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("methods show hack --json".split()) == 0
    found = capsys.readouterr().out
    assert json.loads(found)["schema"] == "kvcli.methods/1"
    assert run("methods --json show hack".split()) == 0
    assert capsys.readouterr().out == found


REFUSED = [
    ("prefill doc.txt --model model -o a.kv.safetensors", 3, "exists"),
    ("prefill none.txt --model model -o x", 3, "none.txt"),
    ("prefill doc.txt --model none/here -o x", 3, "none/here"),
    ("prefill . --model model -o x", 3, "directory"),
    ("prefill empty.txt --model model -o x", 2, "empty"),
    ("prefill latin.txt --model model -o x", 4, "byte 3"),
    ("prefill long.txt --model model -o x", 6, "512"),
    ("compress a.kv.safetensors -m snapkv -o x", 2, "--budget"),
    ("compress a.kv.safetensors -m snapkv -b 1 -o x", 2, "everything"),
    ("compress a.kv.safetensors -m snapkw -b 35% -o x", 2, "snapkv"),
    ("compress a.kv.safetensors -m raw -b 35% -o x", 2, "takes no --budget"),
    ("compress a.kv.safetensors -m snapkv -b 0.1% -o x", 6, "smallest feasible"),
    ("compress a.kv.safetensors -m snapkv -b 1KiB -o x", 6, "smallest feasible"),
    ("compress a.kv.safetensors -m snapkv:sink=90 -b 20% -o x", 6, "sink=90"),
    ("compress b -m snapkv -b 20% -o x", 6, "q_last"),
    ("compress a.kv.safetensors -m snapkv -b 20% -b 30% -o x", 2, "{budget}"),
    ("compress doc.txt -m snapkv -b 20% -o x", 4, ""),
    ("compress none -m snapkv -b 20% -o x", 3, "none"),
    ("resume b", 2, "--prompt"),
    ("resume b -p x --questions q.jsonl", 2, "one of them"),
    ("resume b --questions doc.txt", 4, "doc.txt:1"),
    ("resume b --questions latin.txt", 4, "byte 3"),
    ("resume b --questions bad.jsonl", 4, "bad.jsonl:2"),
    ("resume b -p x --against b", 2, "compressed"),
    ("resume b -p x --against doc.txt", 4, "header"),
    ("compress a.kv.safetensors -m snapkv -b 20% -b 20% -o x-{budget}", 2, "twice"),
    ("compress a.kv.safetensors -m random -b 20% -o none/x", 3, "none"),
    ("compress a.kv.safetensors -m random -b 20% --seed 99999999999 -o x", 2, "seed"),
    ("compress a.kv.safetensors -m snapkv:kernel=99999999999999999999999 -b 20% -o x", 2, "odd whole number"),
    ("inspect flipped-header", 4, "header"),
    ("resume flipped-stat -p x", 4, "stat."),
    ("resume b -p x --model other", 5, "weights differ"),
    ("resume b -p x --model wide", 5, "made with"),
    ("resume b -p x -n 400", 6, "no room"),
    ("resume cut -p x", 4, ""),
    ("resume flip -p x", 4, ""),
    ("inspect cut", 4, ""),
    ("verify flip", 4, ""),
    ("resume b -p x --frobnicate", 2, "frobnicate"),
    ("frobnicate", 2, "frobnicate"),
    *((f"compress none -m snapkv -b {text} -o x", 2, text) for text in ("0", "101%", "-5", "nan", "text")),
    *((f"compress none -m snapkv:{text} -b 20% -o x", 2, "window is") for text in ("window=0", "window=x", "window")),
    ("compress none -m snapkv:windw=3 -b 20% -o x", 2, "did you mean window"),
    ("compress none -m adakv:floor=nan+snapkv -b 20% -o x", 2, "0 to 1"),
    ("compress none -m snapkv:sink=99999999999999 -b 20% -o x", 2, "sink is"),
    ("compress b -m h2o -b 20% -o x", 6, "--keep-stats"),
    ("compress none -m kvmerger:epsilon=0.75 -b 20% -o x", 2, "takes no --budget"),
    ("compress none -m kvmerger:epsilon=0.75+adakv -o x", 2, "fixes its own sizes"),
    ("compress none -m kvmerger:sigma=0 -b 20% -o x", 2, "above 0"),
    ("compress a.kv.safetensors -m kvmerger:max_run=2 -b 20% -o x", 6, "write max_run="),
]


@pytest.mark.parametrize(("line", "code", "says"), REFUSED, ids=[line for line, *_ in REFUSED])
def test_bad_input(work: Path, capsys: pytest.CaptureFixture[str], line: str, code: int, says: str) -> None:
    (work / "empty.txt").write_text(" \n")
    (work / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (work / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": "a", "answer": 5}\n')
    (work / "long.txt").write_text(TEXT * 8)
    small = (work / "b").read_bytes()
    (work / "cut").write_bytes(small[: len(small) // 2])
    (work / "flipped-header").write_bytes(small.replace(b"LlamaForCausalLM", b"MlamaForCausalLM", 1))
    full = bytearray((work / "a.kv.safetensors").read_bytes())
    at = header_of(work / "a.kv.safetensors").by_name["L001.stat.attn_mass"].start
    full[at] ^= 1
    (work / "flipped-stat").write_bytes(full)
    (work / "flip").write_bytes(small[:9000] + bytes([small[9000] ^ 4]) + small[9001:])
    args = line.split()
    assert run([*args, "--json"]) == code
    seen = capsys.readouterr()
    assert says in seen.err and seen.err.startswith("kvcli: ") and "Traceback" not in seen.err
    assert len(seen.err.splitlines()) <= 4
    assert json.loads(seen.out)["error"]["code"] == code
    assert not (work / "x").exists()


@pytest.mark.parametrize(
    "line",
    [
        "prefill doc.txt --model model -o x",
        "compress a.kv.safetensors -m random -b 20% -o x",
        "resume b -p x",
        "eval doc.txt --model model",
    ],
)
def test_a_card_that_is_not_there(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    told = []
    for args, given in ((["--device", "cuda"], ""), ([], "cuda")):
        monkeypatch.setenv("KVCLI_DEVICE", given)
        assert run([*line.split(), *args]) == 6
        told.append(capsys.readouterr().err)
    assert "--device cuda: torch sees no GPU here\n       use --device cpu" in told[0] and told[0] == told[1]
    assert not (work / "x").exists()


def test_a_trusted_model_only_warns(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("resume b -p x -n 2 --model other --trust-model".split()) == 0
    assert "warning" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
def test_another_precision_than_the_files(work: Path, capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    assert run(["prefill", "doc.txt", "--model", "model", "--dtype", "float32", "-o", "f", "-f"]) == 0
    for file in ("a.kv.safetensors", "f"):
        assert run(["resume", file, "-p", "Who?", "-n", "3", "--dtype", dtype]) == 0


@pytest.mark.slow
def test_closed_streams_and_links_to_nowhere_are_no_trouble(work: Path) -> None:
    (work / "z.kv.safetensors").symlink_to("nowhere")
    kvcli = " ".join(KVCLI)
    for line in (f"{kvcli} inspect 2>&- <&-", f"{kvcli} verify b >&-", f"{kvcli} inspect b -q 2>&-"):
        assert subprocess.run(["bash", "-c", line], capture_output=True, check=False).returncode == 0
    (work / "z.kv.safetensors").unlink()


@pytest.mark.slow
def test_pipes_give_the_same_bytes_and_the_same_answer(work: Path) -> None:
    prefill, compress = "prefill doc.txt --model model", "compress -m kvmerger -b 0.35"
    python = " ".join(KVCLI)
    line = f"{python} {prefill} | tee p1 | cat | {python} {compress} | tee p2 | cat | {python} resume -p Who? -n 8"
    piped = subprocess.run(line, shell=True, capture_output=True, text=True, check=True)
    assert (work / "p1").read_bytes() == (work / "a.kv.safetensors").read_bytes()
    assert run(f"{compress} -o p3 a.kv.safetensors".split()) == 0
    assert (work / "p2").read_bytes() == (work / "p3").read_bytes()
    named = subprocess.run([*KVCLI, *"resume p3 -p Who? -n 8".split()], capture_output=True, text=True, check=True)
    assert piped.stdout == named.stdout != ""
    told = [line for line in piped.stderr.splitlines() if not line.startswith("reading")]
    assert len(told) == 5


@pytest.mark.slow
def test_as_typed_at_a_terminal(work: Path, tmp_path: Path) -> None:
    (tmp_path / "doc.txt").write_text(TEXT)
    lines = (["prefill", "doc.txt", "--model", f"{work}/model"], ["compress", "-m", "kvmerger", "-b", "0.35"])
    for args in (*lines, ["resume", "--prompt", "Who?", "-n", "4"]):
        seen = on_terminal([*KVCLI, *args], tmp_path)
        assert "Traceback" not in seen and "kvcli:" not in seen
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "doc.kv.safetensors",
        "doc.kvmerger-0.35.kv.safetensors",
        "doc.txt",
    ]
    assert "reading doc.kvmerger-0.35.kv.safetensors" in seen
    assert "terminal" in on_terminal([*KVCLI, "prefill", "doc.txt", "-o", "-"], tmp_path)


def on_terminal(command: list[str], folder: Path) -> str:
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.execv(command[0], command)
    seen = b""
    try:
        while block := os.read(terminal, 4096):
            seen += block
    except OSError:  # the other side is gone
        pass
    os.waitpid(pid, 0)
    os.close(terminal)
    return seen.decode()


@pytest.mark.slow
def test_a_closed_pipe_is_141(work: Path) -> None:
    line = (
        f"{' '.join(KVCLI)} compress a.kv.safetensors -m random -b 90% | head -c 10 >/dev/null; exit ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (141, "")


def test_light_commands_import_no_torch(work: Path) -> None:
    heavy = ["torch", "transformers", "rich"]
    for args in (["--help"], ["compress", "--help"], ["--version"], ["inspect", "b"], ["completion", "zsh"]):
        code = f"import sys; from kvcli.cli import run; sys.exit(run({args}) or any(m in sys.modules for m in {heavy}))"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str) -> None:
    command: click.Command = import_module(f"kvcli.cli.{name}").command
    assert command.help and f"kvcli {name}" in command.help and "Example" in command.help
    assert command.short_help and len(command.short_help) < 70
    undocumented = [option.name for option in command.params if isinstance(option, click.Option) and not option.help]
    assert not undocumented
