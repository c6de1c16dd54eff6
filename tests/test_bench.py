"""kvcli bench: every cell a row, whatever fails or stops; what was measured is never measured again."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import nudge, tiny_model

import kvcli.bench
from kvcli.cli import run
from kvcli.cli.chart import draw
from kvcli.errors import KvError
from kvcli.evaluate import Grid, Unit, Work, evaluate
from kvcli.header import summary
from kvcli.model.load import Model
from kvcli.spool import header_of

TEXT = "The harbour opened at six. " * 12 + "The new ferry is called Kestrel.\n"
GRID = "-m snapkv:window=8,kernel=3,raw -m kvmerger:epsilon=0.75 -b 50%,20".split()
NAMES = [("full", "100%"), ("snapkv:window=8,kernel=3", "50%"), ("snapkv:window=8,kernel=3", "20"), ("raw", None)]
NAMES += [("kvmerger:epsilon=0.75", None)]
TIMES = {"seconds", "load_seconds", "first_token_seconds", "tokens_per_second", "bytes_per_second", "peak_memory"}
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two documents, two models, a full snapshot and a small one."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "doc.txt").write_text(TEXT)
    (folder / "other.txt").write_text("It left at noon. " * 9)
    (folder / "long.txt").write_text("word " * 400)
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    tiny_model(folder / "model")
    nudge(tiny_model(folder / "nudged"))
    os.environ["KVCLI_HOME"] = str(folder / "home")
    prefill = ["prefill", f"{folder}/doc.txt", "--dtype", "float32", "--model"]
    assert run([*prefill, f"{folder}/model", "-o", f"{folder}/full"]) == 0
    assert run([*prefill, f"{folder}/nudged", "-o", f"{folder}/strange"]) == 0
    assert run(["compress", f"{folder}/full", *"-m snapkv -b 50% -o".split(), f"{folder}/small"]) == 0
    return folder


@pytest.fixture
def calls(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Compressions run in this process, and are counted here."""
    made: list[list[str]] = []

    def here(args: list[str]) -> tuple[int, str]:
        made.append(args)
        with redirect_stdout(io.StringIO()) as out:
            code = run(args)
        return code, out.getvalue()

    monkeypatch.setattr("kvcli.process.apart", here)
    monkeypatch.setenv("KVCLI_HOME", str(folder / "home"))
    monkeypatch.setenv("KVCLI_MODEL", str(folder / "model"))
    monkeypatch.setenv("KVCLI_DTYPE", "float32")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(kvcli.bench, "ANSWER", kvcli.bench.Sampling(n=3, endless=True))
    return made


def bench(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> Rows:
    """The rows it gave to stdout."""
    capsys.readouterr()
    assert run(["bench", *args]) == code
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def kept(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text().splitlines()]


def names(rows: Rows) -> list[tuple[str, str | None]]:
    return [(row["method"], row["budget"]) for row in rows]


def steady(rows: Rows) -> Rows:
    """What two measurements must agree in."""
    return [{name: value for name, value in row.items() if name not in {*TIMES, "spread"}} for row in rows]


def test_every_cell_is_a_row_that_says_what_the_file_says(
    calls: list[list[str]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = bench(capsys, "full", "other.txt", *GRID, "--runs", "2")
    assert names(rows) == NAMES * 2 and [row["document"] for row in rows] == ["full"] * 5 + ["other.txt"] * 5
    assert len(calls) == 2 * 2 * 4
    full, *cells = rows[:5]
    header = header_of(Path("full"))
    facts = summary(header, header.meta)
    assert {name: full[name] for name in kvcli.bench.SIZES} == {name: facts[name] for name in kvcli.bench.SIZES}
    assert "seconds" not in full and "output_error" not in full
    for row, (method, budget) in zip(cells, NAMES[1:], strict=True):
        size = ["-b", budget] if budget else []
        assert run(["compress", "full", "-m", method, *size, "-o", str(tmp_path / "x"), "-f", "--json"]) == 0
        alone = json.loads(capsys.readouterr().out)["rows"][0]
        assert {name: row[name] for name in (*kvcli.bench.SIZES, "output_error")} == {
            name: alone[name] for name in (*kvcli.bench.SIZES, "output_error")
        }
        assert row["bytes_per_second"] == pytest.approx(full["kv_bytes"] / row["seconds"])
        assert all(row[name] > 0 for name in TIMES)


def test_times_are_medians(calls: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    for row in bench(capsys, "full", "-m", "h2o", "-b", "50%", "--runs", "3"):
        assert row["spread"].keys() == row.keys() & TIMES - {"peak_memory", "bytes_per_second"}
        assert all(low <= row[name] <= high for name, (low, high) in row["spread"].items())
    found = kvcli.process.medians([{"a": value} for value in (1.0, 9.0, 2.0, 3.0, 4.0, 0.0)])
    assert found == {"a": 2.5, "spread": {"a": [1.0, 4.0]}}


def test_a_text_and_its_snapshot_measure_the_same(calls: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    text, snapshot = (bench(capsys, doc, *GRID, "--runs", "1") for doc in ("doc.txt", "full"))
    own = {"document": "", "snapshot": ""}
    assert [row | own for row in steady(text)] == [row | own for row in steady(snapshot)]
    assert snapshot[0]["snapshot"] and not text[0]["snapshot"]


def test_rows_of_the_same_configuration_are_taken(
    calls: list[list[str]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path, line = tmp_path / "rows", "doc.txt -m raw,h2o -b 20 --runs 1 -o".split()
    assert bench(capsys, *line, str(path)) == []
    first = kept(path)
    assert names(first) == [("full", "100%"), ("raw", None), ("h2o", "20")] and len(calls) == 2
    calls.clear()
    assert bench(capsys, *line, str(path)) == [] and kept(path) == first and not calls
    (facts,) = bench(capsys, *line, str(path), "-b", "50%", "--json")
    assert names(facts["rows"]) == [*names(first), ("h2o", "50%")] and len(calls) == 1
    assert [{"schema": kvcli.bench.SCHEMA, **row} for row in facts["rows"]] == kept(path)
    assert bench(capsys, *line, str(path), "-f") == [] and names(kept(path)) == names(first)


@pytest.mark.parametrize("change", ["--seed 1", "--raw", "--dtype bfloat16", "--runs 2", "full", "other.txt"])
def test_rows_of_another_configuration_are_not(
    calls: list[list[str]], capsys: pytest.CaptureFixture[str], tmp_path: Path, change: str
) -> None:
    path, line = tmp_path / "rows", ["-m", "raw", "--runs", "1", "-o", str(tmp_path / "rows")]
    bench(capsys, "doc.txt", *line)
    bench(capsys, *([] if change[0] != "-" else ["doc.txt"]), *line, *change.split())
    assert names(kept(path)) == [("full", "100%"), ("raw", None)] * 2


def test_rows_of_another_machine_or_version_are_not() -> None:
    row = dict.fromkeys((*kvcli.bench.IDENTITY, "document", "tokens"), "this")
    same = {name for name in row if kvcli.bench._identity(row | {name: "other"}) == kvcli.bench._identity(row)}
    assert same == {"document", "tokens"}
    assert {*kvcli.bench.stamp(torch.device("cpu"))} == {*kvcli.bench.STAMP} < {*kvcli.bench.IDENTITY}


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_a_grid_cut_in_any_row_goes_on(
    calls: list[list[str]], capsys: pytest.CaptureFixture[str], tmp_path: Path, n: int
) -> None:
    path, line = tmp_path / "rows", f"full -m raw,h2o -b 50% --runs 1 -o {tmp_path}/rows".split()
    bench(capsys, *line)
    lines, rows = path.read_text().splitlines(keepends=True), steady(kept(path))
    calls.clear()
    path.write_text("".join(lines[:n]) + "".join(lines[n:])[:99])
    bench(capsys, *line)
    assert steady(kept(path)) == rows and len(calls) == min(2, 3 - n)


def test_what_fails_is_a_row(calls: list[list[str]], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path, line = tmp_path / "rows", "doc.txt -m snapkv,h2o -b 0.1%,50% --runs 1 -o".split()
    bench(capsys, *line, str(path), code=6)
    rows = kept(path)
    assert [row.get("error", {}).get("code") for row in rows] == [None, 6, None, 6, None]
    assert "smallest feasible" in rows[1]["error"]["fix"]
    calls.clear()
    bench(capsys, *line, str(path), code=6)
    assert kept(path) == rows and not calls, "what cannot be met today cannot be met tomorrow"


@pytest.mark.parametrize(
    ("end", "code", "says"),
    [((-9, ""), 1, "signal 9"), ((3, "no JSON"), 1, "exit code 3"), ((3, None), 3, "disk"), ((6, None), 6, "disk")],
)
def test_an_end_without_a_word(
    calls: list[list[str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    end: tuple[int, str | None],
    code: int,
    says: str,
) -> None:
    error = {"code": end[0], "what": "the disk", "why": "", "fix": ""}
    told = json.dumps({"schema": "kvcli.error/1", "error": error}) if end[1] is None else end[1]
    path, line = tmp_path / "rows", ["full", "-m", "h2o", "-b", "50%", "--runs", "1", "-o", str(tmp_path / "rows")]
    with monkeypatch.context() as broken:
        broken.setattr("kvcli.process.apart", lambda args: (end[0], told))
        bench(capsys, *line, code=code)
    assert says in json.dumps(kept(path)[1]["error"])
    bench(capsys, *line, code=6 if code == 6 else 0)  # what was of the day is tried again
    assert len(kept(path)) == (2 if code == 6 else 3)


def test_a_document_that_cannot_be_read_by_the_model(
    calls: list[list[str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise KvError("NaN or infinity in layer 0")

    monkeypatch.setattr("kvcli.document.prefill", broken)
    rows = bench(capsys, "doc.txt", "full", "-m", "h2o", "-b", "50%", "--runs", "1", code=1)
    assert names(rows) == [("full", "100%"), ("full", "100%"), ("h2o", "50%")]
    assert [row.get("error", {}).get("code") for row in rows] == [1, None, None]


REFUSED = [
    ("doc.txt none.txt", 3, "none.txt"),
    ("doc.txt latin.txt", 4, "latin.txt"),
    ("doc.txt long.txt", 6, "long.txt"),
    ("doc.txt strange", 5, "strange"),
    ("doc.txt small", 2, "compressed"),
    ("doc.txt doc.txt", 2, "twice"),
    (".", 3, "directory"),
    ("doc.txt -m h2o,h2o", 2, "twice"),
    ("doc.txt -m h2o -b 50%,50%", 2, "twice"),
    ("doc.txt -m raw -b 50%", 2, "takes no --budget"),
    ("doc.txt -m snapkw", 2, "snapkv"),
    ("doc.txt -o - --json", 2, "-o -"),
    ("doc.txt -o doc.txt", 3, "something else"),
    ("doc.txt -o .", 3, ""),
    ("doc.txt -o none/rows", 3, "none"),
]


@pytest.mark.parametrize(("line", "code", "says"), REFUSED)
def test_what_is_wrong_is_said_before_anything_is_measured(
    calls: list[list[str]], capsys: pytest.CaptureFixture[str], line: str, code: int, says: str
) -> None:
    capsys.readouterr()
    assert run(["bench", *line.split()]) == code
    assert says in capsys.readouterr().err and not calls
    assert Path("doc.txt").read_text() == TEXT


def test_what_comes_through_a_pipe(
    calls: list[list[str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in ("doc.txt", "full"):
        with Path(source).open() as stdin:
            monkeypatch.setattr("sys.stdin", stdin)
            (row,) = bench(capsys, "-m", "raw", "--runs", "1")[1:]
        assert (row["document"], bool(row["snapshot"])) == ("-", source == "full")


def test_nothing_is_left_behind(
    calls: list[list[str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = sorted(Path().iterdir())
    bench(capsys, "doc.txt", "-m", "h2o", "-b", "50%", "--runs", "1")
    assert not [*tmp_path.iterdir()] and sorted(Path().iterdir()) == before


def test_a_table_fits_its_terminal(calls: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    rows = bench(capsys, "doc.txt", "full", "-m", "h2o,raw", "-b", "0.1%,50%", "--runs", "1", code=6)
    for row in rows:
        row["document"] += "\x1b[31m[bold]"
        row |= {"tokens_per_second": 10.0} if "error" not in row else {}
    for width in (64, 80, 140):
        draw(rows, console := Console(file=io.StringIO(), width=width, force_terminal=False))
        shown = console.file.getvalue()  # type: ignore[attr-defined]
        lines = shown.splitlines()
        assert max(map(len, lines)) <= width and "\x1b" not in shown
        assert sum("failed" in line for line in lines) == 2 and "[bold]" in shown
        assert ("GB/s" in shown) == (width == 140)
        bars = [line.count("━") for line in lines if line.startswith(("full 100%", "h2o 50%"))]
        assert (bars[0] > bars[1] > 0) if width >= 80 else not any(bars)


KVCLI = [sys.executable, "-m", "kvcli"]


@pytest.mark.slow
def test_a_killed_run_loses_no_more_than_what_was_running(folder: Path, tmp_path: Path) -> None:
    """With real compressions, in processes of their own; the last run shows its table on a terminal."""
    (tmp_path / "tmp").mkdir()
    path, home = tmp_path / "rows", {"KVCLI_HOME": str(folder / "home"), "COLUMNS": "120", "TMPDIR": f"{tmp_path}/tmp"}
    args = ["bench", "full", "--model", str(folder / "model"), *"-m h2o,raw -b 50% --runs 1 -o".split(), str(path)]
    child = subprocess.Popen([*KVCLI, *args], cwd=folder, env={**os.environ, **home}, stderr=subprocess.DEVNULL)
    while child.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") >= 2):
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    before = path.read_text()
    assert 2 <= before.count("\n") <= 3
    ours, theirs = pty.openpty()
    again = [*KVCLI, *args]
    done = subprocess.run(again, cwd=folder, env={**os.environ, **home}, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert done.returncode == 0 and b"already" in done.stderr
    assert not [*(tmp_path / "tmp").iterdir()]
    rows = kept(path)
    assert path.read_text().startswith(before) and names(rows) == [("full", "100%"), ("h2o", "50%"), ("raw", None)]
    assert all(row["peak_memory"] > 50_000_000 and 0 < row["seconds"] < 60 for row in rows[1:])
    assert "h2o 50%" in shown and "tokens/s" in shown and "━" in shown


def test_what_tasks_find_is_in_the_rows(
    folder: Path, calls: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["bench", "doc.txt", *"-m random -b 50% --runs 1 -o".split(), str(tmp_path / "rows")]
    assert run([*args, "-t", "ppl"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [(row["method"], set(row["metrics"])) for row in rows] == [
        (name, {f"ppl {metric}" for metric in ("ppl", "nll", "kl", "kl_median", "kl_p95", "top1")})
        for name in ("full", "random")
    ]
    assert rows[0]["metrics"]["ppl kl"]["value"] == 0 and rows[1]["metrics"]["ppl kl"]["value"] > 0
    assert set(rows[0]["metrics"]["ppl kl"]) == {"value", "stderr", "n", "recovery"}
    assert run(args) == 0 and run([*args, "-t", "ppl"]) == 0
    assert len((tmp_path / "rows").read_text().splitlines()) == 4  # with other tasks a row is another one
    assert run(["bench", "full", "-t", "needle"]) == 2
    assert "cannot be changed" in capsys.readouterr().err


def test_tasks_of_a_snapshot_read_in_another_way_are_other_rows(
    folder: Path, calls: list[list[str]], tmp_path: Path
) -> None:
    asked = {"prompt": "When?", "answer": "six"}
    (tmp_path / "qa.jsonl").write_text(json.dumps({"context": TEXT, "questions": [asked]}) + "\n")
    args = ["bench", "full", "-t", f"qa:{tmp_path}/qa.jsonl", *"-m raw --runs 1 -o".split(), str(tmp_path / "rows")]
    assert run(args) == 0 and run([*args, "--raw"]) == 0 and run(args) == 0
    assert [row["raw"] for row in kept(tmp_path / "rows")] == [False, False, True, True]


def test_an_interruption_loses_the_tasks_of_one_recipe(
    calls: list[list[str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[list[str]] = []

    def counted(model: Model, works: list[Work], grid: Grid, *rest: object) -> Iterator[Unit]:
        asked.append([f"{recipe} {budget and budget.text}{' known' * grid.known}" for recipe, budget in grid.cells])
        if asked[-1] and asked[-1][0].startswith("h2o") and len(asked) < 4:
            raise KeyboardInterrupt
        return evaluate(model, works, grid, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("kvcli.bench.evaluate", counted)
    asks = {"context": TEXT, "questions": [{"prompt": "When?", "answer": "six"}]}
    (tmp_path / "qa.jsonl").write_text(json.dumps(asks) + "\n")
    line = f"doc.txt -m snapkv,h2o -b 50%,20% -t qa:{tmp_path}/qa.jsonl --known -o {tmp_path}/rows --runs 1"
    bench(capsys, *line.split(), code=130)
    assert names(kept(tmp_path / "rows")) == [("full", "100%"), ("snapkv", "50%"), ("snapkv", "20%")]
    bench(capsys, *line.split())
    rows = kept(tmp_path / "rows")
    assert asked[1] == ["snapkv 50% known", "snapkv 20% known"] and asked[-1] == ["h2o 50% known", "h2o 20% known"]
    assert len(asked) == 5 and all(row["known"] and "metrics" in row for row in rows)


def test_known_without_questions_is_refused_before_anything_is_measured(
    calls: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"bench doc.txt -m h2o -b 50% --known -t ppl -o {tmp_path}/rows"
    assert run(line.split()) == 2
    said = capsys.readouterr()
    assert "leave out ppl, or --known" in said.err and not said.out
    assert not calls and not (tmp_path / "rows").exists()
