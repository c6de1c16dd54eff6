"""How a model turns its keys: found where it can be undone, unknown where it cannot."""

import math
from pathlib import Path

import pytest
import torch
from test_architectures import MODELS, build, read
from tiny import tiny_model

from kvcli.cli import run
from kvcli.kernels.rope import rotate
from kvcli.meta import Meta
from kvcli.model.load import load
from kvcli.model.observe import prefill
from kvcli.spool import header_of

# By length, interleaved channels, none at all, or no layer with full attention.
UNKNOWN = {"llama dynamic", "phi3 longrope", "cohere", "gpt2", "mistral sliding"}
MORE = {
    "llama linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    "llama llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "smollm3 all": {"no_rope_layers": [1, 1, 1], "use_sliding_window": False},
    "smollm3 some": {"no_rope_layers": [1, 0, 1], "use_sliding_window": False},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*MODELS, *MORE])
def test_frequencies_are_known_where_they_turn_keys_back(
    name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, name, MODELS.get(name) or MORE.get(name, {}))
    rope = read(load(str(build(name, tmp_path)), dtype=dtype)).meta.rope
    assert ("inv_freq" in rope) == (name not in UNKNOWN | {"smollm3 some"})
    assert rope["head_dim"] == 8
    expected = {
        "llama": [1, 0.1, 0.01, 0.001],
        "llama linear": [1 / 3, 0.1 / 3, 0.01 / 3, 0.001 / 3],
        "gpt_neox": [1, 0.01],
        "gemma3_text": [1e6 ** (-i / 4) for i in range(4)],  # of the full layers; the sliding ones have another base
    }
    if name in expected:
        assert rope["inv_freq"] == pytest.approx(expected[name], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_tokens_have_equal_keys_in_the_first_layer_when_turned_back(dtype: torch.dtype, tmp_path: Path) -> None:
    model = load(str(tiny_model(tmp_path, dtype=dtype)), dtype=str(dtype).removeprefix("torch."))
    full = prefill(model, [7, 9] * 50, (0, "", False))
    kv = full.layer(0)
    plain = rotate(kv.k, kv.pos, torch.tensor(full.meta.rope["inv_freq"]), back=True)
    near = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for token in (0, 1):
        same = plain[:, token::2]
        assert float((same - same[:, :1]).norm(dim=-1).max()) < near * float(same.norm(dim=-1).max())
    turned = kv.k[:, ::2].float()
    assert float((turned - turned[:, :1]).norm(dim=-1).max()) > 0.1 * float(turned.norm(dim=-1).max())


def test_turning_there_and_back_changes_nothing_and_keeps_norms() -> None:
    rng = torch.Generator().manual_seed(0)
    x, pos = torch.randn(2, 50, 10, generator=rng), torch.randint(0, 9000, (2, 50), generator=rng)
    freq = torch.tensor([1.0, 0.3, 0.001])
    turned = rotate(x, pos, freq)
    torch.testing.assert_close(rotate(turned, pos, freq, back=True), x, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[..., 6:], x[..., 6:])
    quarter = rotate(torch.tensor([1.0, 0.0, 5.0]), torch.tensor(1), torch.tensor([math.pi / 2]))
    torch.testing.assert_close(quarter, torch.tensor([0.0, 1.0, 5.0]), atol=1e-7, rtol=0)


def test_the_file_says_how_keys_turn_and_merging_uses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("doc.txt").write_text("The harbour opened at six, as it did every day. " * 4)
    tiny_model(Path("model"))
    assert run("prefill doc.txt --model model -o a.kv.safetensors".split()) == 0
    meta = header_of(Path("a.kv.safetensors")).meta
    assert isinstance(meta, Meta) and len(meta.rope["inv_freq"]) == 4
    for keys in ("rotated", "pivot", "rerotate"):
        assert run(f"compress a.kv.safetensors -m kvmerger:keys={keys} -b 30% -o {keys}".split()) == 0
    assert Path("rotated").read_bytes() != Path("rerotate").read_bytes()
    assert run("compress a.kv.safetensors -m kvmerger:epsilon=0.3 -o t-{budget} --json".split()) == 0
    seen = capsys.readouterr()
    assert '"budget": null' in seen.out and Path("t-kvmerger-epsilon=0.3").exists()
    assert run("inspect t-kvmerger-epsilon=0.3".split()) == 0
    assert "kvmerger:epsilon=0.3" in capsys.readouterr().out
