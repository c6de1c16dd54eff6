"""kvzip as a method and in commands: what is kept of a document that was repeated, and what records that."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from make import make_snapshot, opened, same, shrunk
from test_architectures import build
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor

import kvcli
from kvcli.cli import run
from kvcli.collect import COLLECT
from kvcli.errors import InfeasibleError, UsageError
from kvcli.model.load import Model, load
from kvcli.recipe import Recipe, grid
from kvcli.snapshot import Snapshot

TEXT = "The harbour opened at six.\n\n" * 5 + "The new ferry is called Kestrel.\n"
SHARES, NAMES = ("global", "layer", "uniform"), {"": "kvzip", "agg=rms": "kvzip_rms", "plus": "kvzip_plus"}
BARE = "sink=0,recent=0"


def random(tokens: int = 100) -> Snapshot:
    return make_snapshot(layers=3, heads=2, tokens=tokens, dtype=torch.float32)


def kept(small: Snapshot) -> set[tuple[int, int, int]]:
    """Layer, head and position of every entry."""
    heads = [rows.pos.split(rows.lens.tolist()) for rows in small.rows]
    return {(i, h, pos) for i, layer in enumerate(heads) for h, head in enumerate(layer) for pos in head.tolist()}


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("option", NAMES)
def test_the_best_of_what_was_recorded_stay(share: str, option: str, tmp_path: Path) -> None:
    """Of all, of each layer, or of each head; of equal scores the earlier, as half of the numbers here are."""
    full = random()
    stats = [
        replace(part, **{name: (getattr(part, name) * 40).round() / 40 for name in NAMES.values()})
        for part in full.stats
    ]
    score = torch.stack([getattr(part, NAMES[option]) for part in stats])  # [L, H, N]
    small = shrunk(replace(full, stats=stats), f"kvzip:{BARE},share={share},{option}".rstrip(","), tmp_path / "a")
    groups = {"global": score.view(1, -1), "layer": score.flatten(1), "uniform": score.flatten(0, 1)}[share]
    best = groups.argsort(dim=-1, descending=True, stable=True)[:, : groups.shape[1] * 3 // 10]
    flat = (best + torch.arange(len(best))[:, None] * groups.shape[1]).flatten().tolist()
    assert kept(small) == {(at // 200, at // 100 % 2, at % 100) for at in flat}


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("rest", ["", f":{BARE}"])
def test_budgets_are_met_and_more_only_adds(share: str, rest: str, tmp_path: Path) -> None:
    recipe, full, before = f"kvzip:share={share}{rest.replace(':', ',')}", random(), set[tuple[int, int, int]]()
    for budget in (0.1, 0.35, 0.9):
        small = shrunk(full, recipe, tmp_path / "a", str(budget))
        now = kept(small)
        assert len(now) == round(6 * 100 * budget) and before < now
        sizes = torch.stack([rows.lens for rows in small.rows])
        assert share == "global" or bool((sizes.sum(1) == 200 * budget).all())
        assert share != "uniform" or bool((sizes == 100 * budget).all())
        before = now
    for one, other in zip(shrunk(full, recipe, tmp_path / "b", "100%").rows, full.rows, strict=True):
        same(one, other)


def test_plus_is_a_word(tmp_path: Path) -> None:
    for text in ("kvzip:plus", "kvzip:plus=true", "kvzip:share=layer,plus"):
        recipe = Recipe.parse(text)
        again = Recipe.parse(str(recipe))
        assert again == recipe and recipe.score is not None and again.score is not None
        assert again.score.options == {"agg": "max", "plus": True}
        assert Recipe.parse("+".join(f"{step.stage.kind}={step.text}" for step in recipe.steps)).steps == recipe.steps
    assert [str(recipe) for recipe, _ in grid(["kvzip:plus,share=layer,knorm"], ["50%"])] == [
        "kvzip:plus,share=layer",
        "knorm",
    ]
    assert kept(shrunk(random(), "kvzip:plus", tmp_path / "a")) != kept(shrunk(random(), "kvzip", tmp_path / "a"))
    with pytest.raises(UsageError, match="plus='2'"):
        Recipe.parse("kvzip:plus=2")


def test_what_does_not_go_together_or_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InfeasibleError, match="agg=rms and plus"):
        shrunk(random(), "kvzip:agg=rms,plus", tmp_path / "a")
    full = random()
    bare = replace(full, stats=[replace(part, kvzip_plus=None) for part in full.stats])
    with pytest.raises(InfeasibleError, match="kvzip_plus") as caught:
        shrunk(bare, "kvzip:plus", tmp_path / "a")
    assert "output projection" in caught.value.why
    assert kept(shrunk(bare, "kvzip", tmp_path / "a")) == kept(shrunk(full, "kvzip", tmp_path / "a"))


@pytest.fixture
def desk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVCLI_MODEL", str(folder))
    (tmp_path / "a.txt").write_text(TEXT)
    return tmp_path


@pytest.mark.parametrize("options", ["", "--dtype float32", "--raw", "--chunk 50"])
def test_score_adds_what_prefill_records(desk: Path, options: str) -> None:
    chunk = options if "chunk" in options else ""
    assert run(f"prefill a.txt {options} -o a".split()) == 0
    for names in ("kvzip", "kvzip,moments"):
        assert run(f"prefill a.txt {options} --collect {names} -f -o b".split()) == 0
        assert run(f"score a --collect {names} {chunk} -f -o c".split()) == 0
        assert (desk / "b").read_bytes() == (desk / "c").read_bytes() != (desk / "a").read_bytes()
        assert run(["verify", "b"]) == 0
    assert run(f"score b --collect kvzip {chunk} -f -o c".split()) == 0
    assert (desk / "b").read_bytes() == (desk / "c").read_bytes()
    plain, more = opened(desk / "a"), opened(desk / "c")
    wanted = {*COLLECT["kvzip"], *COLLECT["moments"]}
    for one, other, rows, again in zip(plain.stats, more.stats, plain.rows, more.rows, strict=True):
        assert {*other.present()} - {*one.present()} == wanted
        same(one, replace(other, **dict.fromkeys(wanted)))
        same(rows, again)


def test_a_file_without_it_says_how_to_get_it(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("prefill a.txt -o a".split()) == 0
    for recipe in ("kvzip", "kvzip:plus", "kvzip:agg=rms"):
        assert run(["compress", "a", "-m", recipe, "-b", "30%", "-o", "b"]) == 6
        assert "kvcli score SNAPSHOT --collect kvzip adds" in capsys.readouterr().err
    assert run("score a --collect kvzip -f -o a".split()) == 0
    for recipe in ("kvzip", "kvzip:plus", "kvzip:agg=rms,share=uniform", "kvzip+encode=kivi"):
        assert run(["compress", "a", "-m", recipe, "-b", "30%", "-f", "-o", "b"]) == 0
        assert run(["resume", "b", "-p", "Who?", "-n", "2"]) == 0
    assert run("score b --collect kvzip -o c".split()) == 6
    assert "the snapshot is compressed" in capsys.readouterr().err and not (desk / "c").exists()


def test_appended(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (desk / "b.txt").write_text("It sails at noon.\n")
    assert run("prefill a.txt --collect kvzip -o a".split()) == 0
    assert run("compress a -m kvzip -b 40% --keep-stats -o small".split()) == 0
    capsys.readouterr()
    assert run("prefill b.txt --onto a --collect kvzip -o ab".split()) == 0
    assert "not recorded" not in capsys.readouterr().err
    longer = opened(desk / "ab")
    assert longer.stats[1].kvzip.shape[1] == longer.meta.seq.tokens > opened(desk / "a").meta.seq.tokens
    assert run("score ab --collect kvzip -o again".split()) == 0
    assert (desk / "ab").read_bytes() == (desk / "again").read_bytes()
    assert run("prefill b.txt --onto small --collect kvzip -o sb".split()) == 0
    assert "not recorded: kvzip, kvzip_rms, kvzip_plus, q_repeat, q_repeat_pos" in capsys.readouterr().err
    assert "left out" not in capsys.readouterr().err
    assert run("prefill b.txt --onto a -o plain".split()) == 0 and opened(desk / "plain").stats[0].kvzip is None
    assert "left out: kvzip" in (told := capsys.readouterr().err) and "score SNAPSHOT --collect kvzip" in told
    assert run("score plain --collect kvzip -o plain2".split()) == 0
    assert (desk / "plain2").read_bytes() == (desk / "ab").read_bytes()


def test_no_room_is_told_before_anything_is_read(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (desk / "long.txt").write_text(TEXT * 3)
    assert run("prefill long.txt --collect kvzip -o a".split()) == 6
    seen = capsys.readouterr().err
    assert "no room to repeat" in seen and "have, the model reads 512" in seen and "shorten the document" in seen
    assert run("eval long.txt -m kvzip -b 20% -t ppl".split()) == 6  # which has no --collect to leave out
    assert "the methods that need it" in capsys.readouterr().err
    assert run("prefill long.txt -o a".split()) == 0 and run("score a --collect norms,kvzip -o b".split()) == 6
    assert "no room to repeat" in capsys.readouterr().err and not (desk / "b").exists()


def read(document: object, model: Model, **how: object) -> Snapshot:
    return kvcli.prefill(document, model, collect=["kvzip"], warn=lambda text: None, **how)


def scored(snapshot: Snapshot) -> list[Tensor]:
    return [part.kvzip for part in snapshot.stats]


def test_what_the_template_wrote_before_the_text_is_kept_and_not_repeated(model: Model, tmp_path: Path) -> None:
    chat, raw = read(TEXT, model), read(TEXT, model, raw=True)
    lead = chat.meta.seq.lead
    assert lead > 4 and raw.meta.seq.lead == 0
    for part in scored(chat):
        assert not part[:, :lead].any() and bool((part[:, lead:] > 0).all())
    assert all(bool((part > 0).all()) for part in scored(raw))
    for heads in (rows.pos.split(rows.lens.tolist()) for rows in shrunk(chat, "kvzip", tmp_path / "a", "60%").rows):
        assert all({*range(lead)} <= {*head.tolist()} for head in heads)
    first = [rows.pos[:4].tolist() for rows in shrunk(raw, "kvzip", tmp_path / "a", "60%").rows]
    assert first == [[0, 1, 2, 3]] * 2


def test_a_chat_of_several_turns(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The marks between turns are repeated as the rest of it; what opens the first turn is not."""
    roles = ("system", "user", "assistant", "user", "assistant")
    turns = [{"role": role, "content": f"The ferry has {n} decks."} for n, role in enumerate(roles)]
    (desk / "chat.jsonl").write_text("\n".join(map(json.dumps, turns)))
    assert run("prefill chat.jsonl --collect kvzip -o a".split()) == 0
    found = opened(desk / "a")
    lead = found.meta.seq.lead
    assert 0 < lead < 20 and found.meta.seq.chat
    for part in found.stats:
        assert not part.kvzip[:, :lead].any() and bool((part.kvzip[:, lead:] > 0).all())
        assert part.q_repeat_pos[0] > found.meta.seq.tokens and len(part.q_repeat_pos) == found.meta.seq.tokens - lead
    assert run("compress a -m kvzip -b 30% -o b".split()) == 0 and run("resume b -p Who? -n 2".split()) == 0


def test_a_model_whose_texts_begin_with_bos(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    folder = tiny_model(tmp_path / "m")
    tokenizer = tiny_tokenizer(chat_template=None)
    special = [("<|im_start|>", tokenizer.bos_token_id)]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=special)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    found = read(TEXT, load(str(folder), dtype="float32"))
    assert found.meta.seq.lead == 1 and found.ids[0] == tokenizer.bos_token_id
    assert all(not part[:, 0].any() and bool((part[:, 1:] > 0).all()) for part in scored(found))


def test_in_16_bit_it_is_nearly_the_same(folder: Path) -> None:
    want = read(TEXT, load(str(folder), dtype="float32"))
    for dtype in ("bfloat16", "float16"):
        found = read(TEXT, load(str(folder), dtype=dtype))
        for one, other in zip(found.stats, want.stats, strict=True):
            for name in ("kvzip", "kvzip_rms", "kvzip_plus"):
                torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0.05, atol=1e-4)
            assert one.q_repeat.dtype == getattr(torch, dtype)


def test_what_a_model_does_not_show_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """GPT-2 has no output projection of the usual kind: only kvzip:plus is out of reach."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVCLI_MODEL", str(build("gpt2", tmp_path / "m")))
    (tmp_path / "a.txt").write_text(TEXT[:60])
    assert run("prefill a.txt --collect kvzip -o a".split()) == 0
    assert "not recorded: kvzip_plus; the model does not show" in capsys.readouterr().err
    assert run("compress a -m kvzip -b 30% -o b".split()) == 0
    assert run("compress a -m kvzip:plus -b 30% -o c".split()) == 6
    assert "leave plus out" in capsys.readouterr().err
