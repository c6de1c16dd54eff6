"""What --collect records: against a pass of the model's own in float64, in any chunks, appended, and never unasked."""

from pathlib import Path
from typing import Any

import pytest
import torch
from make import same, shrunk
from test_architectures import MODELS, build
from torch import Tensor

from kvcli.collect import COLLECT, collected
from kvcli.errors import UsageError
from kvcli.model.extend import aim, extend
from kvcli.model.load import Model, load
from kvcli.model.moments import Moments
from kvcli.model.observe import prefill
from kvcli.snapshot import Snapshot, Stats

N, LEAD = 110, 7
IDS = torch.randint(5, 290, (N,), generator=torch.Generator().manual_seed(0)).tolist()
SEQ = (LEAD, "\n", True)
ALL = tuple(name for name in COLLECT if name != "kvzip")  # which takes a second pass: test_replay.py
PARTS = {part for name in ALL for part in COLLECT[name]}
NO_ROPE = {"gpt2", "cohere", "phi3 longrope", "llama dynamic"}  # or one that depends on the length, or is laid out else


def read(model: Model, chunk: int = 1024, collect: tuple[str, ...] = ALL, lead: int = LEAD) -> Snapshot:
    return prefill(model, IDS, (lead, "\n", True), chunk=chunk, collect=collect)


def naive(folder: Path, ids: list[int]) -> tuple[Any, list[Tensor], list[Tensor], list[Tensor]]:
    """By layer of one eager pass in float64: the hidden state it begins with, what its attention sees, its weights."""
    net: Any = load(str(folder), dtype="float32", attention="eager").net
    if not any("expert" in name for name, _ in net.named_modules()):  # whose products know no float64
        net = net.double()
    seen: list[Tensor] = []
    for module in net.modules():
        if hasattr(module, "layer_idx") and hasattr(module, "config") and "Attention" in type(module).__name__:
            module.register_forward_pre_hook(
                lambda _, args, given: seen.append((args[0] if args else given["hidden_states"])[0]), with_kwargs=True
            )
    with torch.no_grad():
        out = net(torch.tensor([ids]), output_hidden_states=True, output_attentions=True)
    return net, [part[0] for part in out.hidden_states], seen, [part[0] for part in out.attentions]


@pytest.mark.parametrize("name", MODELS)
def test_against_one_eager_pass_in_float64(name: str, tmp_path: Path) -> None:
    folder = build(name, tmp_path / "m")
    snapshot = read(load(str(folder), dtype="float32"), chunk=37)
    _, hidden, seen, weights = naive(folder, IDS)
    for i, stats in enumerate(snapshot.stats):
        if i not in snapshot.meta.held:
            assert not stats.present()
            continue
        close = {"atol": 1e-4, "rtol": 2e-4, "check_dtype": False}
        torch.testing.assert_close(stats.resid_norm, hidden[i].norm(dim=-1), **close)
        torch.testing.assert_close(stats.attn_in_norm, seen[i].norm(dim=-1), **close)
        squares = weights[i].square().sum(1)
        mean = squares.unflatten(0, (snapshot.meta.layout.heads, -1)).mean(1)
        torch.testing.assert_close(stats.mass_sq, mean, **close)
        assert (stats.q_mean is None) == (name in NO_ROPE) == (stats.q_cov is None)


@pytest.mark.parametrize("name", ["llama", "llama yarn", "qwen3", "mistral", "gemma3_text"])
def test_moments_are_those_of_the_queries_before_they_turn(name: str, tmp_path: Path) -> None:
    """YaRN scales what it turns, queries and keys: that stays in."""
    folder = build(name, tmp_path / "m")
    snapshot = read(load(str(folder), dtype="float32"), chunk=29)
    net, _, seen, _ = naive(folder, IDS)
    factor = net.model.rotary_emb.attention_scaling if name == "llama yarn" else 1.0
    for i in snapshot.meta.held:
        attention, stats = net.model.layers[i].self_attn, snapshot.stats[i]
        q = attention.q_proj(seen[i]).unflatten(-1, (4, -1))
        q = (attention.q_norm(q) if hasattr(attention, "q_norm") else q).transpose(0, 1)[:, LEAD:] * factor
        torch.testing.assert_close(stats.q_mean, q.mean(1).float(), atol=1e-4, rtol=1e-4)
        cov = torch.stack([torch.cov(head.T, correction=0) for head in q])
        torch.testing.assert_close(stats.q_cov, cov.float(), atol=1e-4, rtol=1e-4)
        assert stats.q_cov is not None and torch.equal(stats.q_cov, stats.q_cov.mT)
        assert float(torch.linalg.eigvalsh(stats.q_cov.double()).min()) > -1e-5


@pytest.mark.parametrize("chunk", [1, 5, 37, 109])
def test_any_chunks_give_the_same(model: Model, chunk: int) -> None:
    close_to(read(model, chunk), read(model))


def close_to(one: Snapshot, other: Snapshot, names: set[str] = PARTS) -> None:
    for a, b in zip(one.stats, other.stats, strict=True):
        for name in names:
            torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sizes", [[1] * 300, [299, 1], [1, 299], [7, 100, 0, 150, 43], [150, 150]])
def test_streaming_moments_are_those_of_two_passes(sizes: list[int]) -> None:
    """With a mean a thousand times the deviations, where sums of squares would cancel."""
    x = torch.randn(3, 300, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1000
    found = Moments.of(x[:, :0])
    for part in x.split(sizes, 1):
        found += Moments.of(part)
    assert found.n == 300
    torch.testing.assert_close(found.mean, x.mean(1), atol=1e-9, rtol=0)
    want = torch.stack([torch.cov(head.T, correction=0) for head in x])
    torch.testing.assert_close(found.cov, want, atol=1e-9, rtol=0)
    again = Moments.again(300, found.mean, found.cov)
    torch.testing.assert_close(again.spread, found.spread, atol=1e-9, rtol=1e-12)


def test_the_first_queries_are_left_out_of_the_moments(model: Model) -> None:
    """Those of the template, and of four tokens where there is none."""
    assert not torch.equal(*(read(model, lead=lead).stats[0].q_mean for lead in (4, 5)))
    assert torch.equal(*(read(model, lead=lead).stats[0].q_mean for lead in (0, 4)))
    short = [prefill(model, IDS[:n], (0, "\n", False), collect=("moments",)).stats[0] for n in (4, 5)]
    assert short[0].q_mean is None and short[0].q_cov is None and short[0].mass_sq is not None
    assert short[1].q_cov is not None and not short[1].q_cov.any()


def test_nothing_is_recorded_or_changed_unasked(model: Model) -> None:
    plain, asked, every = read(model, collect=()), read(model), {part for parts in COLLECT.values() for part in parts}
    for stats, more in zip(plain.stats, asked.stats, strict=True):
        assert not every & {*stats.present()} and {*more.present()} & every == PARTS
        same(stats, Stats(**{name: part for name, part in more.present().items() if name not in PARTS}))
    for name, parts in COLLECT.items():
        assert every & {*read(model, collect=(name,)).stats[1].present()} == {*parts}
    assert not any(module._forward_pre_hooks for module in model.net.modules())


def test_hooks_go_when_reading_fails(model: Model) -> None:
    model.net.model.layers[1].self_attn.forward = None
    with pytest.raises(TypeError):
        read(model, collect=("moments",))
    assert not any(module._forward_pre_hooks for module in model.net.modules())


@pytest.mark.parametrize("n", [3, 6, 40, 100, 109])
def test_what_is_appended_goes_on(model: Model, n: int) -> None:
    part = (
        prefill(model, IDS[:n], SEQ, collect=ALL) if n > LEAD else prefill(model, IDS[:n], (2, "", True), collect=ALL)
    )
    both = extend(model, part, IDS[n:], chunk=23)
    close_to(both, read(model, lead=LEAD if n > LEAD else 2))


def test_what_was_dropped_or_never_recorded_is_not_gone_on_with(model: Model, tmp_path: Path) -> None:
    base = read(model)
    small = shrunk(base, "snapkv", tmp_path / "a", keep_stats=True)
    plain = extend(model, read(model, collect=()), IDS[:20])
    for longer in (extend(model, small, IDS[:20]), plain):
        assert not any(PARTS & {*stats.present()} for stats in longer.stats)
    norms = extend(model, read(model, collect=("norms",)), IDS[:20])
    assert PARTS & {*norms.stats[0].present()} == {*COLLECT["norms"]}


def test_a_question_behind_the_document_adds_nothing(model: Model) -> None:
    base = read(model)
    for stats, before in zip(aim(model, base, IDS[:9]).stats, base.stats, strict=True):
        for name in PARTS:
            assert torch.equal(getattr(stats, name), getattr(before, name))


def test_names() -> None:
    assert collected(["norms, moments", "norms"]) == ("norms", "moments") and collected([]) == ()
    with pytest.raises(UsageError, match="norm: no statistics") as caught:
        collected(["norm"])
    assert "norms" in caught.value.why
    with pytest.raises(UsageError, match="frames"):
        collected(["moments,frames"])
