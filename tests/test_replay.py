"""What repeating a document shows: against eager passes and a softmax written out, in any parts, chunks and models.

`told` is what attention over a document and its repetition had: queries and keys behind their rotation, by layer.
"""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from make import same, shrunk
from test_architectures import MODELS, build
from test_architectures import naive as attention
from test_collect import naive
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from kvcli.collect import COLLECT
from kvcli.errors import InfeasibleError, KvError
from kvcli.model.extend import extend
from kvcli.model.load import Model, load
from kvcli.model.observe import prefill
from kvcli.model.observed import output_weight
from kvcli.model.replay import ASK, GO_ON, LAST, Repeating, replay, value_sizes
from kvcli.model.score import collect
from kvcli.model.text import parsed_ids, plain_ids
from kvcli.snapshot import Snapshot

LEAD, PARTS = 7, COLLECT["kvzip"]
IDS = torch.randint(5, 290, (300,), generator=torch.Generator().manual_seed(0)).tolist()
LENGTHS = {"llama dynamic": 28, "phi3 longrope": 28}  # whose contexts are 120 tokens
HALF = {"rtol": 6e-4, "atol": 2e-7, "check_dtype": False}  # a unit in the last place of float16, one of its smallest
told: dict[int, dict[str, Any]] = {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose attention is far from even."""
    return tiny_model(tmp_path_factory.mktemp("sharp"), initializer_range=0.3)


def noting(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **asked: Any
) -> tuple[Tensor, None]:
    parts = {"q": query[0].double(), "k": key[0].double(), "v": value[0].double(), "module": module}
    scale = asked.get("scaling")
    told[module.layer_idx] = {**asked, **parts, "scaling": query.shape[-1] ** -0.5 if scale is None else scale}
    return attention(module, query, key, value, mask, **asked)


AttentionInterface.register("noting", noting)


def document(name: str) -> list[int]:
    return IDS[: LENGTHS.get(name, 80)]


def read(model: Model, ids: list[int] | None = None, lead: int = LEAD, **how: Any) -> Snapshot:
    full = prefill(model, ids or document(""), (lead, "\n", True))
    return replay(model, full, **how)


def asking(model: Model, ids: list[int], begin: int, lead: int = LEAD) -> list[int]:
    """The ids that have these tokens repeated, without those."""
    ask = plain_ids(model.tokenizer, ASK if begin == lead else GO_ON)
    return [*ask, *ids[max(lead, begin - LAST) : begin], *parsed_ids(model.tokenizer, "\n")]


@pytest.mark.parametrize("name", MODELS)
def test_one_part_is_what_eager_attention_gives_in_float64(name: str, tmp_path: Path) -> None:
    folder, ids = build(name, tmp_path / "m"), document(name)
    model, N = load(str(folder), dtype="float32"), len(document(name))
    snapshot = read(model, ids, chunk=31)
    _, _, seen, weights = naive(folder, [*ids, *asking(model, ids, LEAD), *ids[LEAD:]])
    assert name == "mistral sliding" or snapshot.meta.held
    modules = [each for each in model.net.modules() if hasattr(each, "layer_idx") and hasattr(each, "config")]
    modules = [each for each in modules if "Attention" in type(each).__name__]
    for i, stats in enumerate(snapshot.stats):
        if i not in snapshot.meta.held:
            assert not stats.present()
        elif name != "mistral wide":  # whose window slides while it repeats
            H = snapshot.meta.layout.heads
            weight = weights[i][:, N:, :N].double().unflatten(0, (H, -1))  # [H, G, R, N]
            weight[..., :LEAD] = 0
            torch.testing.assert_close(stats.kvzip, weight.amax((1, 2)), **HALF)
            torch.testing.assert_close(stats.kvzip_rms, weight.square().mean((1, 2)).sqrt(), **HALF)
            out = output_weight(modules[i])
            assert (stats.kvzip_plus is None) == (out is None) == (name == "gpt2")
            if out is not None:
                sizes = sizes_of(snapshot.layer(i).v.double(), out.double())
                plus = weight * sizes[:, :, None] / seen[i][N:].double().norm(dim=-1)[:, None]
                torch.testing.assert_close(stats.kvzip_plus, plus.amax((1, 2)), **{**HALF, "atol": 1e-6})


def sizes_of(v: Tensor, weight: Tensor) -> Tensor:  # [H, N, Dv], [d, Hq * Dv] -> [H, G, N]
    each = weight.unflatten(1, (len(v), -1, v.shape[-1]))  # [d, H, G, Dv]
    return torch.einsum("dhgv,hnv->hgnd", each, v).norm(dim=-1)


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_a_query_sees_the_sinks_its_part_and_the_repetition(name: str, parts: int, tmp_path: Path) -> None:
    """A window that slides meanwhile is no bound to it, whatever is read at a time."""
    against_a_softmax(build(name, tmp_path / "m"), document(name), parts, [17, 1024])


def test_where_every_layer_slides_nothing_is_repeated(tmp_path: Path) -> None:
    model = load(str(build("mistral sliding", tmp_path / "m")), dtype="float32")
    told: list[int] = []
    snapshot = prefill(
        model, document(""), (LEAD, "\n", True), collect=["kvzip"], tick=lambda done, _: told.append(done)
    )
    assert told == [len(document(""))] and not any(part.present() for part in snapshot.stats)


def test_nothing_of_a_repetition_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that is wider than the document, and narrower than its repetition by more than a chunk."""
    monkeypatch.setitem(MODELS, "mistral", {"sliding_window": 114, "max_position_embeddings": 512})
    against_a_softmax(build("mistral", tmp_path / "m"), IDS[:112], 1, [1, 13, 50])


def against_a_softmax(folder: Path, ids: list[int], parts: int, chunks: list[int]) -> None:
    """What repeating the document in so many parts records, held against that written out in float64."""
    model, N, size = load(str(folder), dtype="float32"), len(ids), -(-(len(ids) - LEAD) // parts)
    snapshots = [read(model, ids, size=size, chunk=chunk) for chunk in chunks]
    net = load(str(folder), dtype="float32", attention="noting").net
    most, squares, count = dict[int, list[Tensor]](), dict[int, list[Tensor]](), 0
    for begin in range(LEAD, N, size):
        again = [*asking(model, ids, begin), *ids[begin : begin + size]]
        with torch.no_grad():
            net(torch.tensor([[*ids, *again]]))
        count += len(again)
        for i in snapshots[0].meta.held:
            weight = subset(told[i], begin, min(begin + size, N), N)
            most.setdefault(i, []).append(weight.amax((1, 2)))
            squares.setdefault(i, []).append(weight.square().sum(2).mean(1))
    for snapshot in snapshots:
        for i in snapshot.meta.held:
            stats = snapshot.stats[i]
            assert len(most[i]) == parts
            torch.testing.assert_close(stats.kvzip[:, LEAD:], torch.cat(most[i], -1), **HALF)
            torch.testing.assert_close(stats.kvzip_rms[:, LEAD:], (torch.cat(squares[i], -1) / count).sqrt(), **HALF)
            assert not stats.kvzip[:, :LEAD].any() and not stats.kvzip_rms[:, :LEAD].any()


def subset(had: dict[str, Any], begin: int, end: int, N: int) -> Tensor:  # -> [H, G, R, end - begin]
    """Attention to the part of queries from N on, over the sinks, the part, and the repetition up to each."""
    sinks = min(max(LEAD, 4), begin)
    q, k = torch.unflatten(had["q"][:, N:], 0, (len(had["k"]), -1)), had["k"][:, None]
    keys = torch.cat([k[..., :sinks, :], k[..., begin:end, :], k[..., N:, :]], -2)
    logit = q @ keys.mT * had["scaling"]
    if cap := had.get("softcap"):
        logit = cap * torch.tanh(logit / cap)
    R = q.shape[2]
    logit[..., -R:] = logit[..., -R:].masked_fill(torch.ones(R, R).triu(1).bool(), -torch.inf)
    if (nothing := had.get("s_aux")) is not None:
        more = torch.unflatten(nothing.double(), 0, q.shape[:2])[..., None, None].expand(*q.shape[:3], 1)
        logit = torch.cat([logit, more], -1)
    return logit.softmax(-1)[..., sinks : sinks + end - begin]


@pytest.mark.parametrize("size", [2048, 30, 3])
def test_saved_queries_are_those_of_an_eager_pass_evenly_spread(model: Model, folder: Path, size: int) -> None:
    ids, N = document(""), 80
    snapshot = read(model, ids, size=size, queries=20, chunk=13)
    wanted = torch.linspace(LEAD, N - 1, 20).round().long().tolist()
    net, found = load(str(folder), dtype="float32", attention="noting").net, [list[Tensor]() for _ in range(2)]
    pos = []
    for begin in range(LEAD, N, size):
        end = min(begin + size, N)
        asked = asking(model, ids, begin)
        with torch.no_grad():
            net(torch.tensor([[*ids, *asked, *ids[begin:end]]]))
        mine = [N + len(asked) + at - begin for at in wanted if begin <= at < end]
        pos += mine
        for i, each in enumerate(found):
            each.append(told[i]["q"][:, mine])
    for stats, each in zip(snapshot.stats, found, strict=True):
        assert stats.q_repeat_pos.tolist() == pos and stats.q_repeat_pos.dtype == torch.int32
        torch.testing.assert_close(stats.q_repeat, torch.cat(each, 1), atol=1e-5, rtol=1e-5, check_dtype=False)


@pytest.mark.parametrize("N", [8, 9, 80, 199, 200, 220])
def test_as_many_queries_as_there_are_tokens_but_192_at_most(model: Model, N: int) -> None:
    stats = read(model, IDS[:N]).stats[0]
    assert stats.q_repeat.shape == (4, min(192, N - LEAD), 8) and stats.q_repeat_pos.unique().numel() == min(192, N - 7)


def test_only_what_it_is_asked_for_changes(model: Model) -> None:
    before = prefill(model, document(""), (LEAD, "\n", True), collect=("norms", "moments"))
    held = [(rows.k.clone(), rows.v.clone()) for rows in before.rows]
    after = replay(model, before, size=20)
    assert after.meta == before.meta and after.extra is before.extra and torch.equal(after.ids, before.ids)
    for one, other, stats, more, (k, v) in zip(before.rows, after.rows, before.stats, after.stats, held, strict=True):
        same(one, other)
        assert torch.equal(one.k, k) and torch.equal(one.v, v)
        assert {*more.present()} - {*stats.present()} == {*PARTS}
        same(stats, replace(more, **dict.fromkeys(PARTS)))


@pytest.mark.parametrize("size", [2048, 30])
@pytest.mark.parametrize("chunk", [1, 7, 37, 109])
def test_any_chunks_give_the_same(model: Model, chunk: int, size: int) -> None:
    for one, other in zip(read(model, size=size, chunk=chunk).stats, read(model, size=size).stats, strict=True):
        for name in PARTS:
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-3, atol=1e-5)


def test_equal_inputs_give_equal_bits(model: Model) -> None:
    for one, other in zip(read(model, size=30).stats, read(model, size=30).stats, strict=True):
        same(one, other)


def asks(model: Model) -> int:
    """The most tokens that ask for a repetition."""
    return max(len(plain_ids(model.tokenizer, ASK)), len(plain_ids(model.tokenizer, GO_ON)) + LAST) + 1


def test_parts_shrink_where_the_context_ends(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """512 tokens: what fits is told, and fits."""
    seen, most = list[int](), 512 - asks(model) - 64
    monkeypatch.setattr("kvcli.model.replay.read", lambda model, layers, ids, chunk, tick: seen.append(len(ids)))
    monkeypatch.setattr("kvcli.model.replay.Repeating.stats", lambda *_: {})
    ids = (IDS * 2)[:most]
    replay(model, prefill(model, ids, (LEAD, "\n", True)))
    assert len(seen) == -(-(most - LEAD) // 64) and max(seen) <= 512 - most and max(seen[1:-1]) == 512 - most
    replay(model, prefill(model, ids[:-6], (LEAD, "\n", True)))
    assert max(seen[-3:]) == 512 - most + 6
    read_at = list[int]()
    with pytest.raises(InfeasibleError, match=rf"{most + 1} tokens.* at most {most} have, the model reads 512"):
        prefill(model, [*ids, 9], (LEAD, "\n", True), collect=("kvzip",), tick=lambda done, _: read_at.append(done))
    full = prefill(model, [*ids, 9], (LEAD, "\n", True))
    for work in (
        lambda: collect(model, full, ["norms", "kvzip"]),
        lambda: extend(model, full, [9], collect=("kvzip",)),
    ):
        with pytest.raises(InfeasibleError, match=f"at most {most} have"):
            work()
    assert not read_at  # before anything is read


@pytest.mark.parametrize("lead", [0, 1])
@pytest.mark.parametrize("context", [80, 100, 140, 200])
def test_what_is_said_to_fit_does(context: int, lead: int, tmp_path: Path) -> None:
    model = load(str(tiny_model(tmp_path / "m", max_position_embeddings=context)), dtype="float32")
    most = max(context - asks(model) - 64, (context - asks(model) + lead) // 2)
    read(model, IDS[:most], lead=lead)
    with pytest.raises(InfeasibleError, match=f"at most {most} have"):
        read(model, IDS[: most + 1], lead=lead)


@pytest.mark.parametrize("size", [2048, 2, 1])
@pytest.mark.parametrize("lead", [0, 2])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_document_of_a_few_tokens(model: Model, n: int, lead: int, size: int) -> None:
    for stats in read(model, IDS[: lead + n], lead=lead, size=size).stats:
        assert stats.kvzip.shape == (2, lead + n) and bool((stats.kvzip[:, lead:] > 0).all())
        assert not stats.kvzip[:, :lead].any() and stats.q_repeat.shape[1] == n
    with pytest.raises(InfeasibleError, match="nothing to repeat"):
        read(model, IDS[:3], lead=3)


def copying(folder: Path, first: int) -> Model:
    """One layer and head that look for what comes next: a key is its token, a query the token numbered one higher.

    Behind a newline it is `first`. Tokens are one-hot in channels that do not turn: the base of the RoPE is huge.
    """
    D, V = 640, 400
    sizes = {"hidden_size": D, "head_dim": D, "intermediate_size": 8, "vocab_size": V, "max_position_embeddings": 1024}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "tie_word_embeddings": False}
    rope = {"rope_type": "default", "rope_theta": 1e30}
    net = LlamaForCausalLM(LlamaConfig(**sizes, **heads, rope_parameters=rope)).requires_grad_(False)
    for name, weight in net.named_parameters():
        weight.fill_(float("norm" in name))
    channel = torch.cat([torch.arange(100, D // 2), torch.arange(D // 2 + 100, D)])[:V]
    tokenizer, attention = tiny_tokenizer(), net.model.layers[0].self_attn
    net.model.embed_tokens.weight[torch.arange(V), channel] = 1.0
    for name in ("k_proj", "v_proj", "o_proj"):
        getattr(attention, name).weight.copy_(torch.eye(D))
    attention.q_proj.weight[channel[1:], channel[:-1]] = 1.0
    (newline,) = plain_ids(tokenizer, "\n")
    attention.q_proj.weight[:, channel[newline]] = torch.eye(D)[channel[first]]
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load(str(folder), dtype="float32")


@pytest.mark.parametrize("size", [2048, 70])
def test_a_head_that_copies_finds_each_token_once(size: int, tmp_path: Path) -> None:
    """What stands once is found for certain, twins share that, and each of 100 fillers is worth a hundredth."""
    ids = [*range(300, 330), *[330] * 100, 331, 332, 332, *range(333, 360)]
    snapshot = read(copying(tmp_path / "m", 300), ids, lead=0, size=size)
    found = snapshot.stats[0].kvzip[0].float()
    many = {pos for pos, token in enumerate(ids) if ids.count(token) > 1}
    once = [pos for pos in range(len(ids)) if pos not in many]
    assert float(found[once].min()) > 0.99
    if size == 2048:
        assert all(abs(found[pos] * ids.count(ids[pos]) - 1) < 0.01 for pos in many)
        torch.testing.assert_close(snapshot.stats[0].kvzip_plus, snapshot.stats[0].kvzip, rtol=1e-3, atol=1e-5)
        small = shrunk(snapshot, "kvzip:sink=0,recent=0", tmp_path / "a", str(len(once) + 2))
        assert {*small.rows[0].pos.tolist()} == {*once, 131, 132}  # fillers go first, then twins


def turned_around(model: Model, folder: Path) -> Model:
    """The model with its KV heads, and the query heads of each, in the opposite order."""
    for layer in model.net.model.layers:
        attention = layer.self_attn
        for name, heads in (("q_proj", 2), ("k_proj", 2), ("v_proj", 2)):
            weight = getattr(attention, name).weight
            weight.data = weight.data.unflatten(0, (heads, -1)).flip(0).flatten(0, 1)
        out = attention.o_proj.weight
        out.data = out.data.unflatten(1, (2, -1)).flip(1).flatten(1, 2)
    model.net.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return load(str(folder), dtype="float32")


def test_heads_in_another_order_give_their_statistics_in_that_order(model: Model, tmp_path: Path) -> None:
    one, other = read(model, size=30), read(turned_around(model, tmp_path / "m"), size=30)
    for stats, again in zip(one.stats, other.stats, strict=True):
        for name in PARTS[:3]:
            torch.testing.assert_close(getattr(again, name), getattr(stats, name).flip(0), rtol=1e-3, atol=1e-5)
        assert not torch.allclose(again.kvzip, stats.kvzip, rtol=1e-3, atol=1e-5)


def test_plus_grows_as_the_values_do(model: Model) -> None:
    before = read(model).stats[1]
    model.net.model.layers[1].self_attn.v_proj.weight *= 4
    after = read(model).stats[1]
    assert torch.equal(before.kvzip, after.kvzip)
    torch.testing.assert_close(after.kvzip_plus, 4 * before.kvzip_plus, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("size", [0.0, 1e30])
def test_a_query_beside_no_hidden_state_or_a_huge_one_adds_nothing(
    model: Model, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = read(model).stats[0]
    hear = Repeating.hear

    def deaf(layer: Repeating, name: str, hidden: Tensor) -> None:
        hear(layer, name, hidden)
        layer.size[::2] = size

    monkeypatch.setattr(Repeating, "hear", deaf)
    found = read(model).stats[0]
    assert torch.equal(found.kvzip, plain.kvzip) and bool((found.kvzip_plus <= plain.kvzip_plus).all())
    same_as = found.kvzip_plus == plain.kvzip_plus
    assert 0.2 < float(same_as[:, LEAD:].float().mean()) < 0.8


def test_value_sizes_are_those_behind_the_projection() -> None:
    rng = torch.Generator().manual_seed(0)
    for dim, width in ((24, 5), (3, 8)):  # also of a projection to fewer channels than a value has
        v, weight = torch.randn(2, 11, width, generator=rng), torch.randn(dim, 6 * width, generator=rng)
        want = sizes_of(v.double(), weight.double()).flatten(0, 1).float()
        torch.testing.assert_close(value_sizes(v, weight, 6), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", [0, 1])
def test_hooks_go_when_repeating_fails_or_is_left(model: Model, layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    full = prefill(model, document(""), (LEAD, "\n", True))

    def leave(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replay(model, full, tick=leave)
    assert not any(module._forward_pre_hooks for module in model.net.modules())
    with monkeypatch.context() as patch:
        patch.setattr("kvcli.model.replay.attention_peak", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            replay(model, full)
    assert not any(module._forward_pre_hooks for module in model.net.modules())
    assert replay(model, full).stats[0].kvzip is not None
    model.net.model.layers[layer].self_attn.q_proj.weight[0, 0] = torch.nan
    with pytest.raises(KvError, match="NaN"):
        replay(model, full)
    assert not any(module._forward_pre_hooks for module in model.net.modules())


@pytest.mark.parametrize("size", [2048, 30])
def test_one_bar_for_reading_and_repeating(model: Model, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcli.model.replay.SIZE", size)
    told = list[tuple[int, int]]()
    ids, how = document(""), {"chunk": 25, "tick": lambda *at: told.append(at)}
    full = prefill(model, ids, (LEAD, "\n", True))
    for work, total in (
        (lambda: prefill(model, ids, (LEAD, "\n", True), collect=("kvzip",), **how), 160),
        (lambda: collect(model, full, ["kvzip"], **how), 80),
        (lambda: collect(model, full, ["norms", "kvzip"], **how), 160),
        (lambda: collect(model, full, ["norms"], **how), 80),
        (lambda: extend(model, full, IDS[:40], collect=("kvzip",), **how), 40 + 120),
        (lambda: extend(model, full, IDS[:40], **how), 40),
    ):
        told.clear()
        work()
        assert {whole for _, whole in told} == {total} and told[-1][0] == total
        done = [at for at, _ in told]
        assert done == sorted(done) and len(done) >= total / 25
        assert max(b - a for a, b in pairwise(done)) <= 25 + LEAD


def test_what_is_appended_is_repeated_with_the_rest_or_not_at_all(model: Model, tmp_path: Path) -> None:
    both, base = read(model, IDS[:120]), read(model)
    longer = extend(model, base, IDS[80:120], collect=("kvzip",))
    for stats, again in zip(longer.stats, both.stats, strict=True):
        for name in PARTS:
            torch.testing.assert_close(getattr(stats, name), getattr(again, name), rtol=1e-3, atol=1e-5)
    small = shrunk(base, "kvzip", tmp_path / "a", keep_stats=True)
    assert small.stats[0].kvzip is not None
    for left_out in (extend(model, base, IDS[80:120]), extend(model, small, IDS[80:120], collect=("kvzip",))):
        assert not any({*PARTS} & {*stats.present()} for stats in left_out.stats)
