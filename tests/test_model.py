"""Prefill and resume on a tiny model: equal to the model itself, statistics against float64, prefix never copied."""

from pathlib import Path

import pytest
import torch
from make import shrunk
from ratios import attending, largest_allocation
from transformers import DynamicCache

from kvcli.errors import InfeasibleError, KvError
from kvcli.meta import Layout
from kvcli.model.answer import Sampling, answer
from kvcli.model.attend import attend
from kvcli.model.cache import make_cache, named
from kvcli.model.load import Model, load
from kvcli.model.observe import prefill, probe
from kvcli.model.prefix import Prefix, logits
from kvcli.model.resume import compare
from kvcli.snapshot import Rows, Snapshot

IDS = torch.randint(5, 290, (150,), generator=torch.Generator().manual_seed(0)).tolist()
MORE = [7, 99, 230, 41]


@pytest.fixture
def eager(folder: Path) -> Model:
    return load(str(folder), dtype="float32", attention="eager")


def read(model: Model, chunk: int = 1024) -> Snapshot:
    return prefill(model, IDS, (3, "\n", True), chunk=chunk)


@pytest.mark.parametrize("chunk", [1024, 64, 1])
def test_a_full_snapshot_gives_the_logits_of_one_forward_pass(model: Model, eager: Model, chunk: int) -> None:
    prefix = Prefix.read(read(model, chunk), model)
    with torch.no_grad():
        expected = eager.net(torch.tensor([IDS + MORE])).logits[0, -4:]
    torch.testing.assert_close(logits(model, prefix, MORE, 4), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("recipe", ["snapkv+adakv", "snapkv", "kvmerger"])
def test_a_compressed_snapshot_equals_masked_attention(model: Model, recipe: str, tmp_path: Path) -> None:
    """Against attention written out in float64 over the rows of the file, layer by layer, inside the same model."""
    small = shrunk(read(model), recipe, tmp_path / "a.kv.safetensors")
    prefix = Prefix.read(small, model)
    cache = make_cache(model.net, prefix.rows, prefix.tokens)
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for i, layer in enumerate(cache.layers):
        attend = layer.attend_lse
        layer.attend_lse = lambda q, law, i=i, attend=attend: (
            seen.setdefault(i, (q, attend(q, law)[0])) and attend(q, law)
        )
    with torch.no_grad():
        model.net(input_ids=torch.tensor([MORE]), use_cache=True, **named(model.net, cache))
    for i, layer in enumerate(cache.layers):
        q, out = seen[i]
        rows, start = small.rows[i], 0
        for head, count in enumerate(rows.lens.tolist()):
            part = slice(start, start + count)
            start += count
            bias = torch.zeros(count) if rows.bias is None else rows.bias[part]
            k = torch.cat([rows.k[part], layer.keys[head, :4]]).double()
            v = torch.cat([rows.v[part], layer.values[head, :4]]).double()
            late = torch.ones(4, 4).triu(1).bool()
            mask = torch.cat([bias.expand(4, count), torch.zeros(4, 4).masked_fill(late, -torch.inf)], 1)
            for g in (0, 1):
                exact = (q[2 * head + g].double() @ k.T * 8**-0.5 + mask).softmax(-1) @ v
                torch.testing.assert_close(out[2 * head + g].double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1024, 37])
def test_statistics_against_the_models_own_attention(model: Model, eager: Model, chunk: int) -> None:
    snapshot = read(model, chunk)
    with torch.no_grad():
        cache = DynamicCache(config=eager.net.config)
        out = eager.net.model(torch.tensor([IDS]), output_attentions=True, **named(eager.net, cache))
    for i, (stats, rows) in enumerate(zip(snapshot.stats, snapshot.rows, strict=True)):
        weights = out.attentions[i][0].double()  # [Hq, N, N]
        mass = weights.sum(1).view(2, 2, -1).mean(1)
        assert stats.attn_mass is not None and stats.q_last is not None and stats.value_norm is not None
        torch.testing.assert_close(stats.attn_mass.double(), mass, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(rows.k, cache.layers[i].keys[0].flatten(0, 1), atol=1e-5, rtol=1e-4)
        k = rows.k.view(2, 150, 8).repeat_interleave(2, 0)
        late = torch.ones(150, 150).triu(1).bool()[-64:]
        row = (stats.q_last @ k.mT * 8**-0.5).masked_fill(late, -torch.inf).softmax(-1)
        torch.testing.assert_close(row.double(), weights[:, -64:], atol=1e-4, rtol=1e-3)
        output = eager.net.model.layers[i].self_attn.o_proj.weight.view(32, 2, 2, 8)
        norms = torch.einsum("hnd,mhgd->hgnm", rows.v.view(2, 150, 8), output).abs().sum(-1).mean(1)
        torch.testing.assert_close(stats.value_norm, norms, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(snapshot.extra["stat.final_hidden"], out.last_hidden_state[0, -1], atol=1e-4, rtol=1e-4)


def test_generation_equals_the_models_own(model: Model, eager: Model) -> None:
    prefix = Prefix.read(read(model), model)
    pieces: list[str] = []
    said = answer(model, prefix, MORE, Sampling(n=12), pieces.append)
    own = eager.net.generate(torch.tensor([IDS + MORE]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert said.ids == own[0, 154:].tolist()
    assert "".join(pieces) == said.text and said.computed == 4
    assert 0 < said.first_seconds <= said.seconds
    drawn = [answer(model, prefix, MORE, Sampling(n=8, temperature=1.5, seed=seed)).ids for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_many_questions_share_one_prefix_that_is_never_changed(model: Model, tmp_path: Path) -> None:
    small = shrunk(read(model), "snapkv+adakv", tmp_path / "a.kv.safetensors")
    prefix = Prefix.read(small, model)
    before = [(rows.k.data_ptr(), rows.k.clone(), rows.v.clone()) for rows in prefix.rows]
    first = answer(model, prefix, MORE, Sampling(n=6)).ids
    answer(model, prefix, [3, 4, 5], Sampling(n=6))
    assert answer(model, prefix, MORE, Sampling(n=6)).ids == first
    cache = make_cache(model.net, prefix.rows, prefix.tokens)
    for (pointer, k, v), rows, layer in zip(before, prefix.rows, cache.layers, strict=True):
        assert rows.k.data_ptr() == pointer == layer.prefix.k.data_ptr()
        assert torch.equal(rows.k, k) and torch.equal(rows.v, v)


def test_comparison_with_itself_is_zero(model: Model) -> None:
    prefix = Prefix.read(read(model), model)
    divergence, same = compare(model, prefix, prefix, MORE, 5)
    assert len(divergence) == 5 and bool((divergence.abs() < 1e-6).all()) and bool(same.all())


def test_probe_is_what_the_file_holds(model: Model) -> None:
    snapshot = read(model)
    k, v = probe(model, snapshot.ids[:8])
    assert torch.equal(k, snapshot.extra["stat.probe_k"]) and torch.equal(v, snapshot.extra["stat.probe_v"])
    assert k.shape == (2, 2, 8, 8)


@pytest.mark.parametrize("count", [1, 2, 9])
def test_short_documents(model: Model, eager: Model, count: int) -> None:
    snapshot = prefill(model, IDS[:count], (0, "\n", False))
    with torch.no_grad():
        expected = eager.net(torch.tensor([IDS[:count] + MORE])).logits[0, -1:]
    torch.testing.assert_close(logits(model, Prefix.read(snapshot, model), MORE, 1), expected, atol=1e-4, rtol=0)


def test_what_cannot_be_done_is_refused(model: Model, eager: Model) -> None:
    prefix = Prefix.read(read(model), model)
    with pytest.raises(InfeasibleError, match="eager"):
        make_cache(eager.net, prefix.rows, prefix.tokens)
    with pytest.raises(InfeasibleError, match="512"):
        prefill(model, IDS * 4, (0, "", False))
    with pytest.raises(InfeasibleError, match="no room"):
        answer(model, prefix, MORE, Sampling(n=400))
    with pytest.raises(InfeasibleError, match="batch"):
        model.net(input_ids=torch.tensor([MORE, MORE]))
    q, k = torch.zeros(1, 4, 2, 8), torch.zeros(1, 2, 2, 8)
    for name in ("softcapping", "alibi", "block_table"):
        with pytest.raises(InfeasibleError, match=name):
            attend(model.net, q, k, k, None, 1.0, **{name: 5})
    layer = model.net.model.layers[1].self_attn
    layer.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(KvError, match="layer 1"):
        read(model)


def test_bfloat16_is_close_to_float32(folder: Path, model: Model) -> None:
    half = load(str(folder), dtype="bfloat16")
    exact, rough = read(model), read(half)
    assert rough.meta.layout.dtype == "BF16" and rough.rows[0].k.dtype == torch.bfloat16
    mass, other = exact.stats[1].attn_mass, rough.stats[1].attn_mass
    assert mass is not None and other is not None
    assert float((mass - other).norm() / mass.norm()) < 0.02
    assert rough.meta.seq == exact.meta.seq


def test_attention_over_ragged_heads_makes_no_padded_copy() -> None:
    lens = torch.tensor([12_000, 40, 7])
    k = torch.zeros(int(lens.sum()), 64, dtype=torch.bfloat16)
    rows = Rows(k, k, torch.cat([torch.arange(n, dtype=torch.int32) for n in lens.tolist()]), lens)
    layout = Layout(1, 3, 9, 64, 64, "BF16", 0.125)
    assert largest_allocation(lambda: attending(Prefix([rows], 12_000, ""), layout, 20)) < k.nbytes
