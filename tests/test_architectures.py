"""Every architecture: a full snapshot equals one forward pass, a ragged one equals masked attention, masses are exact.

`naive` is attention written out, with all that a model may ask of it; `hidden` takes entries away from later tokens.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from make import shrunk
from tiny import tiny_tokenizer
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from kvcli.cli import run
from kvcli.errors import InfeasibleError
from kvcli.kernels.error import attend
from kvcli.model.answer import Sampling, answer
from kvcli.model.batch import answers
from kvcli.model.cache import make_cache, named
from kvcli.model.convert import quiet
from kvcli.model.load import Model, load
from kvcli.model.observe import prefill
from kvcli.model.prefix import Prefix, logits
from kvcli.snapshot import Snapshot
from kvcli.storage import Reader, write_snapshot

N, IDS = 110, torch.randint(5, 290, (110,), generator=torch.Generator().manual_seed(0)).tolist()
MORE = [7, 99, 230, 41, 8, 150]
SHORT = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 120}
LONGROPE = {**SHORT, "short_factor": [1.1, 1.2, 1.3, 1.4], "long_factor": [2.0, 3.0, 4.0, 5.0]}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama dynamic": {"rope_parameters": DYNAMIC, "max_position_embeddings": 120},
    "llama yarn": {"rope_parameters": YARN},
    "qwen2": {},
    "qwen2 sliding": {"use_sliding_window": True, "sliding_window": 33, "max_window_layers": 1},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "mistral sliding": {"sliding_window": 40},
    "mistral wide": {"sliding_window": 114},
    "gemma2": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0, "sliding_window": 17},
    "gemma3_text": {"sliding_window": 24, "sliding_window_pattern": 2},
    "phi3": {},
    "phi3 longrope": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 120},
    "gpt_neox": {"num_key_value_heads": None, "rotary_pct": 0.5},
    "gpt_oss": {"sliding_window": 30, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "cohere": {},
    "granite": {"attention_multiplier": 0.2},
    "gpt2": {},
}
hidden: dict[int, Tensor] = {}  # layer -> [Hq, N] bool: what tokens from N on do not see
masses: dict[int, Tensor] = {}  # layer -> [Hq, N] float64
outputs: dict[int, Tensor] = {}  # layer -> [Hq, M, Dv] float64


def naive(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **asked: Any
) -> tuple[Tensor, None]:
    """One sequence in one pass, every rule spelled out in float64."""
    q, k, v = (part[0].double() for part in (query, key, value))
    k, v = (part.repeat_interleave(len(q) // len(part), 0) for part in (k, v))
    scale = asked.get("scaling")
    logit = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if cap := asked.get("softcap"):
        logit = cap * torch.tanh(logit / cap)
    age = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])
    unseen = (age < 0) | (age >= (asked.get("sliding_window") or 10**9))
    unseen = unseen.expand(logit.shape).clone()
    if module.layer_idx in hidden:
        unseen[:, N:, :N] |= hidden[module.layer_idx][:, None]
    logit = logit.masked_fill(unseen, -torch.inf)
    if (sinks := asked.get("s_aux")) is not None:
        logit = torch.cat([logit, sinks.double()[:, None, None].expand(-1, q.shape[1], 1)], -1)
    weight = logit.softmax(-1)[..., : k.shape[1]]
    masses[module.layer_idx] = weight[:, :N, :N].sum(1)
    outputs[module.layer_idx] = weight @ v
    return outputs[module.layer_idx].transpose(0, 1)[None].to(query), None


AttentionInterface.register("naive", naive)


@pytest.fixture(autouse=True)
def nothing_hidden() -> Iterator[None]:
    hidden.clear()
    yield
    hidden.clear()


def build(name: str, folder: Path) -> Path:
    """A random model of this architecture whose attention is far from even."""
    fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "max_position_embeddings": 256}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 300}
    fields |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3}
    if name == "gpt2":
        fields = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, "vocab_size": 300}
        fields |= {"initializer_range": 0.3}
    given = {key: value for key, value in {**fields, **MODELS[name]}.items() if value is not None or key[0] == "s"}
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(1)
        net = AutoModelForCausalLM.from_config(AutoConfig.for_model(name.split()[0], **given))
        for key, weight in net.named_parameters():
            if "sinks" in key or weight.dim() < 2:  # sinks, biases, norms
                weight.data += 0.3 * torch.randn_like(weight)
        net.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(request.param, tmp_path_factory.mktemp("arch"))


@pytest.fixture
def model(folder: Path) -> Model:
    return load(str(folder), dtype="float32")


def one_pass(folder: Path, ids: list[int], attention: str = "naive", dtype: str = "float32") -> Tensor:
    net = load(str(folder), dtype=dtype, attention=attention).net
    with torch.no_grad():
        return net(torch.tensor([ids])).logits[0]


def read(model: Model, chunk: int = 1024) -> Snapshot:
    return prefill(model, IDS, (3, "\n", True), chunk=chunk)


def test_naive_attention_is_the_models_own(folder: Path) -> None:
    torch.testing.assert_close(one_pass(folder, IDS), one_pass(folder, IDS, "eager"), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk", [1024, 37, 5])
def test_a_full_snapshot_gives_the_logits_of_one_forward_pass(folder: Path, model: Model, chunk: int) -> None:
    prefix = Prefix.read(read(model, chunk), model)
    expected = one_pass(folder, IDS + MORE)[N:]
    torch.testing.assert_close(logits(model, prefix, MORE, 6), expected, atol=1e-4, rtol=1e-4)
    cache = named(model.net, make_cache(model.net, prefix.rows, prefix.tokens))
    with torch.no_grad():  # two tokens, then one at a time
        steps = [
            model.net(torch.tensor([part]), use_cache=True, **cache).logits[0] for part in (MORE[:2], *zip(MORE[2:]))
        ]
    torch.testing.assert_close(torch.cat(steps), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_16_bit(folder: Path, dtype: str) -> None:
    model = load(str(folder), dtype=dtype)
    got, want = logits(model, Prefix.read(read(model, 37), model), MORE, 6), one_pass(folder, IDS + MORE)[N:]
    eager = one_pass(folder, IDS + MORE, "eager", dtype)[N:].float()
    limit = 1.5 * float((eager - want).norm() / want.norm()) + 0.01  # no worse than the model's own
    assert float((got.float() - want).norm() / want.norm()) < limit


def test_a_ragged_snapshot_equals_a_masked_one(folder: Path, model: Model, tmp_path: Path) -> None:
    snapshot = read(model)
    if not snapshot.meta.held:
        with pytest.raises(InfeasibleError, match="nothing to compress"):
            shrunk(snapshot, "snapkv+adakv", tmp_path / "a")
        return
    small = shrunk(snapshot, "snapkv+adakv", tmp_path / "a")
    heads = snapshot.meta.layout.q_heads // snapshot.meta.layout.heads
    for i in snapshot.meta.held:
        kept = torch.zeros(snapshot.meta.layout.heads, N, dtype=torch.bool)
        kv = small.layer(i)
        kept.scatter_(1, kv.pos.clamp(min=0).long(), True)
        kept[:, 0] |= (kv.pos == 0).any(1)
        hidden[i] = ~kept.repeat_interleave(heads, 0)
    assert len({tuple(small.layer(i).lens.tolist()) for i in snapshot.meta.held}) > 1 or len(hidden) == 1
    expected = one_pass(folder, IDS + MORE)[N:]
    got = logits(model, Prefix.read(small, model), MORE, 6)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    hidden.clear()
    assert not torch.allclose(got, one_pass(folder, IDS + MORE)[N:], atol=1e-2)


def test_masses_are_exact_and_sliding_layers_keep_their_window(folder: Path, model: Model) -> None:
    one_pass(folder, IDS)
    snapshot = read(model, 37)
    for i, (rows, stats) in enumerate(zip(snapshot.rows, snapshot.stats, strict=True)):
        if i in snapshot.meta.held:
            mass = masses[i].unflatten(0, (snapshot.meta.layout.heads, -1)).mean(1)
            assert stats.attn_mass is not None and stats.q_last is not None
            assert (stats.value_norm is None) == ("GPT2" in snapshot.meta.model["architecture"])  # no Linear there
            torch.testing.assert_close(stats.attn_mass.double(), mass, atol=1e-4, rtol=1e-4)
        else:
            window = model.config.sliding_window
            assert stats.present() == {} and set(rows.lens.tolist()) == {window - 1}
            assert rows.pos.view(len(rows.lens), -1)[0].tolist() == list(range(N - window + 1, N))


def test_metrics_know_the_models_attention(folder: Path, model: Model) -> None:
    one_pass(folder, IDS)
    snapshot = read(model)
    layout = snapshot.meta.layout
    for i in snapshot.meta.held:
        stats = snapshot.stats[i]
        assert stats.q_probe is not None and stats.q_probe_pos is not None
        law = layout.scale, layout.softcap, stats.sink_logit
        out = attend(stats.q_probe, stats.q_probe_pos, snapshot.layer(i).entries, *law)
        torch.testing.assert_close(out.double(), outputs[i][:, stats.q_probe_pos.long()], atol=1e-4, rtol=1e-4)


def test_the_file_reads_back(model: Model, tmp_path: Path) -> None:
    snapshot = read(model)
    write_snapshot(snapshot, tmp_path / "a")
    again = Reader(tmp_path / "a").snapshot()
    assert again.meta.layout == snapshot.meta.layout
    for one, other in zip(snapshot.rows, again.rows, strict=True):
        assert torch.equal(one.k, other.k) and torch.equal(one.pos, other.pos)
    said = answer(model, Prefix.read(again, model), MORE, Sampling(n=4))
    assert said.ids == answer(model, Prefix.read(snapshot, model), MORE, Sampling(n=4)).ids


@pytest.mark.parametrize("name", ["llama dynamic", "phi3 longrope"])
def test_a_rope_that_changes_with_length_is_refused_across_its_switch(name: str, tmp_path: Path) -> None:
    model = load(str(build(name, tmp_path)), dtype="float32")
    prefix = Prefix.read(read(model), model)
    assert len(answer(model, prefix, MORE, Sampling(n=4)).ids) <= 4
    with pytest.raises(InfeasibleError, match=r"120") as caught:
        answer(model, prefix, MORE, Sampling(n=5))
    assert f"{name.split()[-1]} RoPE" in caught.value.why
    with pytest.raises(InfeasibleError, match=r"121 tokens") as caught:
        prefill(model, [5] * 121, (0, "", False))
    assert f"{name.split()[-1]} RoPE" in caught.value.why


def test_inspect_tells_sliding_layers_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load(str(build("gemma3_text", tmp_path)), dtype="float32")
    write_snapshot(read(model), tmp_path / "a")
    shrunk(read(model), "snapkv", tmp_path / "b")
    for name, entries in (("a", 110), ("b", 33)):
        assert run(["inspect", str(tmp_path / name)]) == 0
        told = capsys.readouterr().out
        assert "3 layers" in told and "2 of them sliding" in told
        assert f"{entries * 2} of 220 ({entries / 110:.1%}), {entries} in every head" in told


def test_a_window_that_is_not_the_configs_is_refused(tmp_path: Path) -> None:
    model = load(str(build("mistral sliding", tmp_path)), dtype="float32")
    model.net.config.sliding_window = 39
    prefix = Prefix.read(read(model), model)
    assert prefix.rows[0].lens[0] == 38
    cache = make_cache(model.net, prefix.rows, prefix.tokens)
    model.net.config.sliding_window = 40
    with pytest.raises(InfeasibleError, match=r"40 tokens.*39 tokens"):
        model.net(torch.tensor([MORE]), use_cache=True, **named(model.net, cache))


@pytest.mark.parametrize("recipe", ["", "snapkv:window=8+adakv", "kvmerger"])
def test_answers_in_step_are_those_given_alone(model: Model, recipe: str, tmp_path: Path) -> None:
    snapshot = read(model)
    if recipe and all(kind == "sliding" for kind in snapshot.meta.layout.kinds):
        pytest.skip("all layers slide: there is nothing to compress")
    prefix = Prefix.read(shrunk(snapshot, recipe, tmp_path / "x", "40%") if recipe else snapshot, model)
    asked, most = [MORE, MORE[:1], MORE[2:], MORE[:4]], [3, 2, 1, 4]
    alone = [answer(model, prefix, ids, Sampling(n=n)).ids for ids, n in zip(asked, most, strict=True)]
    assert answers(model, prefix, asked, most) == alone
    assert answers(model, prefix, [MORE] * 17, [2] * 17) == [alone[0][:2]] * 17  # more than are asked at a time
