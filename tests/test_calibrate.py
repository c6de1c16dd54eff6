"""Calibration: what is measured on answers and on snapshots, against definitions, and the command."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from make import make_snapshot
from tiny import tiny_model

from kvcli import calibrate
from kvcli.calibrate import Run, from_snapshots, span, variation
from kvcli.cli import run
from kvcli.errors import FormatError, InfeasibleError, MismatchError
from kvcli.model.load import Model, load
from kvcli.model.observe import prefill
from kvcli.model.prefix import Prefix
from kvcli.model.watched import speak
from kvcli.profiles import SHIPPED, numbers, profile_path, read_profile
from kvcli.registry import stages
from kvcli.snapshot import LayerKV, Snapshot, Stats, gather
from kvcli.storage import write_snapshot
from kvcli.tasks.task import Question

DOCUMENT, ASKED = [*range(10, 70)], [5, 6, 7, 8, 9, 10, 11, 12, 13]


@pytest.fixture
def prefix(model: Model) -> Prefix:
    return Prefix.read(prefill(model, DOCUMENT, (0, "\n", False)), model)


def test_the_mass_of_a_span_is_that_of_eager_attention(model: Model, prefix: Prefix, folder: Path) -> None:
    eager = load(str(folder), dtype="float32", attention="eager").net
    ids, steps = [*DOCUMENT, *ASKED], 0
    for token, layers in speak(model, prefix, ASKED, 4):
        weights = eager(torch.tensor([ids]), output_attentions=True).attentions
        for layer, expected in zip(layers, weights, strict=True):
            torch.testing.assert_close(layer.mass(20, 25), expected[0, :, -1, 20:25].sum(-1), rtol=1e-4, atol=1e-6)
        ids, steps = [*ids, token], steps + 1
    assert steps == 4


@pytest.mark.parametrize("kept", [[0, 3, 20, 60, 68], range(69)])
def test_errors_are_those_of_the_projected_outputs(model: Model, prefix: Prefix, kept: Any) -> None:
    own: list[list[torch.Tensor]] = [[], []]
    blocks = [block.self_attn for block in model.net.model.layers]
    hooks = [
        block.o_proj.register_forward_hook(lambda _, __, out, found=found: found.append(out[0, -1]))
        for block, found in zip(blocks, own, strict=True)
    ]
    index = torch.tensor([*kept]).expand(2, -1)
    expected = torch.zeros(2)
    for step, (_, layers) in enumerate(speak(model, prefix, ASKED, 3)):
        for i, layer in enumerate(layers):
            kv, _ = layer.seen()
            if step == 0:
                layer.shrink(gather(kv, index))
                continue
            every = torch.cat([index, torch.arange(69, kv.pos.shape[1]).expand(2, -1)], 1)[..., None].expand(-1, -1, 8)
            k, v = (part.gather(1, every).repeat_interleave(2, 0) for part in (kv.k, kv.v))
            weight = (layer.q[:, -1:] @ k.mT * 8**-0.5).softmax(-1)
            small = (weight @ v)[:, 0].flatten() @ blocks[i].o_proj.weight.T
            expected[i] += (small - own[i][-1]).norm() / (own[i][-1].norm() + 1e-6)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(torch.tensor([layer.error for layer in layers]), expected, rtol=1e-3, atol=1e-5)
    assert bool((expected > 0.01).all()) == (len(index[0]) < 69)


def test_the_last_queries_are_those_of_the_question(model: Model, prefix: Prefix) -> None:
    whole = prefill(model, [*DOCUMENT, *ASKED], (0, "\n", False))
    _, layers = next(speak(model, prefix, ASKED, 1))
    for layer, stats, rows in zip(layers, whole.stats, whole.rows, strict=True):
        kv, last = layer.seen()
        assert last.q_last is not None and last.q_last_pos is not None and stats.q_last is not None
        torch.testing.assert_close(last.q_last, stats.q_last[:, -len(ASKED) :], rtol=1e-4, atol=1e-5)
        assert last.q_last_pos.tolist() == [*range(60, 69)]
        torch.testing.assert_close(kv.k, LayerKV.from_rows(rows).k, rtol=1e-4, atol=1e-5)


PLANTED = [(11, 0.35), (99, 0.7), (12, 0.5)]  # a token of the answer and what a head gives to all of it


def test_a_token_of_the_answer_counts_once_however_often_it_stands_there(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [(token, [SimpleNamespace(mass=lambda *_, x=x: torch.tensor([x]))]) for token, x in PLANTED]
    monkeypatch.setattr(calibrate, "speak", lambda *_: iter(steps))
    judge = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda *_, **__: "it is 41."))
    asked = Run(None, [], Question("", answer=("41",)), 3, 6, frozenset([11, 12, 11]))  # type: ignore[arg-type]
    found = calibrate._mass(judge, asked)  # type: ignore[arg-type]
    assert found is not None and found.tolist() == [[pytest.approx(0.85)]]
    other = replace(asked, question=Question("", answer=("42",)))
    assert calibrate._mass(judge, other) is None  # type: ignore[arg-type]


def test_the_span_is_the_answer_alone(model: Model) -> None:
    text = "The ferry has 41 seats. The lot number of the lamp is 41.\nThe end."
    begin, end = span(model, text, Question("", "The lot number of the lamp is", ("41",)))
    ids = model.tokenizer.encode(text)
    assert model.tokenizer.decode(ids[begin:end]) == " 41" and begin > text.index("lamp") // 2


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model that answers whatever is asked, as its judge has it, and a snapshot."""
    tiny_model(tmp_path / "model", max_position_embeddings=4096)
    monkeypatch.setenv("KVCLI_MODEL", str(tmp_path / "model"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(calibrate.SCORES, "hit", lambda *_: 1.0)
    Path("a.txt").write_text("The ferry sailed.\n\nThe harbour was quiet.\n\n" * 8)
    assert run(["prefill", "a.txt", "-q", "--dtype", "float32", "-o", "a.kv.safetensors"]) == 0
    return tmp_path


ANSWERS = ["calibrate", "--for", "compresskv", "--documents", "1", "--tokens", "2500", "--dtype", "float32"]


def test_twice_the_same_profile_which_compress_then_uses(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compress", "a.kv.safetensors", "-m", "compresskv", "-b", "30%", "-f", "-o", "b"]) == 6
    assert "kvcli calibrate --for compresskv" in capsys.readouterr().err
    assert run([*ANSWERS, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    first = Path(facts["file"]).read_bytes()
    assert (facts["found"], facts["asked"]) == (6, 6) and sum(facts["errors"]) == pytest.approx(1, abs=1e-5)
    assert [len(row) for row in facts["heads"]] == [4, 4]
    assert run(ANSWERS) == 0 and Path(facts["file"]).read_bytes() == first
    assert "6 of 6 facts" in capsys.readouterr().out
    assert run(["compress", "a.kv.safetensors", "-m", "compresskv", "-b", "30%", "-f", "-o", "b"]) == 0


def test_a_profile_of_other_weights_is_refused(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["calibrate", "--for", "hack", "a.kv.safetensors", "--json"]) == 0
    file = Path(json.loads(capsys.readouterr().out)["file"])
    file.write_text(file.read_text().replace(file.parent.name, "0" * 32))
    assert run(["compress", "a.kv.safetensors", "-m", "hack", "-b", "30%", "-o", "b"]) == 5
    assert "another model" in capsys.readouterr().err


def test_a_model_that_finds_nothing_has_no_profile(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(calibrate.SCORES, "hit", lambda *_: 0.0)
    assert run(ANSWERS) == 6
    assert "finds none of 6 facts" in capsys.readouterr().err
    assert run([*ANSWERS, "--tokens", "100"]) == 2
    assert "no room for the facts" in capsys.readouterr().err
    assert run([*ANSWERS, "--tokens", "9000"]) == 6
    assert "give --tokens 3584" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--for snapkv", "needs no profile"),
        ("--for hack", "no uncompressed snapshot"),
        ("--for compresskv a.kv.safetensors", "takes no snapshots"),
        ("--for snapkw", "did you mean snapkv"),
        ("", "--for"),
    ],
)
def test_what_does_not_go_together(words: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["calibrate", *words.split()]) == 2
    assert told in capsys.readouterr().err


def looking(rows: torch.Tensor) -> Snapshot:
    """A snapshot of one layer whose head h gives entry j from query i the attention rows[h, i, j]."""
    H, P, T = rows.shape
    full = make_snapshot(layers=1, heads=H, q_heads=H, tokens=T, dim=T, dtype=torch.float32)
    kv = LayerKV(torch.eye(T).repeat(H, 1, 1), torch.eye(T).repeat(H, 1, 1), full.layer(0).pos)
    stats = Stats(q_probe=rows.log(), q_probe_pos=torch.arange(T - P, T))
    meta = replace(full.meta, layout=replace(full.meta.layout, scale=1.0))
    return replace(full, meta=meta, rows=[kv.rows()], stats=[stats])


def test_variation_counts_the_queries_that_see_an_entry() -> None:
    steady = torch.tensor([1.0, 1e-30, 1e-30, 1e-30]).repeat(4, 1)
    own = torch.eye(4).clamp(min=1e-30)
    even = torch.ones(4, 4)
    sigma = variation(looking(torch.stack([steady, own, even])), 0)
    assert sigma[:2].tolist() == pytest.approx([0.0, 1.0], abs=1e-6)
    # 1, 1/2, 1/3, 1/4 down the first column, and so on
    columns = [[1 / i for i in range(j, 5)] for j in range(1, 5)]
    spread = sum(float(torch.tensor(column).var(correction=0)) for column in columns)
    assert float(sigma[2]) == pytest.approx(spread / 0.659722, abs=1e-5)


def test_variation_of_queries_that_see_everything() -> None:
    rows = torch.stack([torch.tensor([0.7, 0.1, 0.1, 0.1]).repeat(4, 1), 0.1 + 0.6 * torch.eye(4)])
    full = looking(rows)
    stats = replace(full.stats[0], q_probe_pos=torch.full((4,), 9))
    assert (variation(replace(full, stats=[stats]), 0) * 0.659722).tolist() == pytest.approx([0, 0.27], abs=1e-5)


def test_snapshots_are_averaged_and_must_be_full_and_of_one_model() -> None:
    full, other = ("a", make_snapshot(tokens=40)), ("b", make_snapshot(tokens=70))
    alone = [from_snapshots("hack", [one])["sigma"] for one in (full, other)]
    both = from_snapshots("hack", [full, other])
    assert both["snapshots"] == 2 and both == from_snapshots("hack", [other, full])
    torch.testing.assert_close(torch.tensor(both["sigma"]), torch.tensor(alone).mean(0), rtol=0, atol=2e-6)
    with pytest.raises(MismatchError, match="c: it is of another model"):
        from_snapshots("hack", [full, ("c", make_snapshot(seed=1))])
    once = replace(full[1].meta, history=({"recipe": "random", "budget": "50%"},))
    with pytest.raises(InfeasibleError, match="c: the snapshot is compressed"):
        from_snapshots("hack", [full, ("c", replace(full[1], meta=once))])
    with pytest.raises(InfeasibleError, match=r"c: .* no queries"):
        from_snapshots("hack", [full, ("c", make_snapshot(stats=False))])


def test_snapshots_from_a_pipe_and_the_newest_here(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f'"{sys.executable}" -m kvcli calibrate --for hack --json'
    shell = f"cat a.kv.safetensors | {line} && {line} - < a.kv.safetensors"
    told = subprocess.run(["bash", "-c", shell], check=True, capture_output=True, text=True).stdout
    assert run(["calibrate", "--for", "hack", "--json"]) == 0
    said = capsys.readouterr()
    assert told == said.out * 2 and "reading a.kv.safetensors, the newest full" in said.err
    (desk / "b").write_bytes((desk / "a.kv.safetensors").read_bytes()[:-9])
    assert run(["calibrate", "--for", "hack", "a.kv.safetensors", "b"]) == 4
    assert "kvcli: b: " in capsys.readouterr().err


def test_a_profile_is_there_when_all_of_it_is(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that cannot be written leaves the old one, and nothing beside it; what a killed writer left is swept."""
    again = ["calibrate", "--for", "hack", "a.kv.safetensors"]
    assert run(again) == 0
    (file,) = profile_path("x", "y").parents[1].rglob("hack.json")
    before = file.read_bytes()
    (file.parent / ".hack.json.4194305.0a.tmp").touch()  # no process has this number
    with monkeypatch.context() as full:
        full.setattr("kvcli.spool._pour", lambda write, data: (_ for _ in ()).throw(OSError(28, "full")))
        assert run(again) == 3
    assert file.read_bytes() == before and [*file.parent.iterdir()] == [file]


def test_a_home_that_is_no_folder(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVCLI_HOME", str(desk / "a.kv.safetensors"))
    assert run(["calibrate", "--for", "hack", "a.kv.safetensors"]) == 3
    said = capsys.readouterr().err
    assert "cannot write" in said and "hack.json\n" in said and "Not a directory" in said


@pytest.mark.parametrize("value", [10**400, -(10**31), 1e39, float("nan"), float("inf"), True, "1", [1], None])
def test_what_is_no_number_of_a_profile(value: Any) -> None:
    profile = {"method": "hack", "sigma": [[0.5, 1], [value, 0.5]]}
    assert numbers(profile, "sigma", [0], 2) == [[0.5, 1]]
    with pytest.raises(FormatError, match="does not hold 2 sigma"):
        numbers(profile, "sigma", [0, 1], 2)


def test_a_layer_that_slides_over_some_document_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    full = make_snapshot(tokens=40)
    half = replace(full.meta, layout=replace(full.meta.layout, kinds=("sliding", "full")))
    found = from_snapshots("hack", [("a", full), ("b", replace(full, meta=half))])
    assert found["sigma"][0] is None
    write_snapshot(replace(full, meta=half), Path(profile_path("x", "y").parents[2] / "a"))
    assert run(["calibrate", "--for", "hack", str(profile_path("x", "y").parents[2] / "a")]) == 0
    assert numbers(found, "sigma", [1], 2) == [found["sigma"][1]]


@pytest.mark.parametrize("method", sorted({stage.name for stage in stages() if stage.profile}))
def test_the_profile_of_the_default_model_is_shipped(method: str) -> None:
    file = next(SHIPPED.glob(f"*/{method}.json"))
    profile = read_profile(file, method, file.parent.name)
    assert profile["model"] == "SmolLM2-135M-Instruct"
    for name, width in (("heads", 9), ("errors", None), ("sigma", 3)):
        assert name not in profile or len(numbers(profile, name, range(30), width)) == 30
