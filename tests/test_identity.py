"""Whose memory a snapshot is: every difference changes a hash, and the check refuses all that is not the same model."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CHATML, nudge, tiny_model, tiny_tokenizer
from torch import Tensor

from kvcli.errors import MismatchError, StorageError
from kvcli.meta import Layout, Meta, Seq
from kvcli.model.identity import check, config_hash, tokenizer_hash, weights_dtype, weights_hash
from kvcli.model.load import Model, load

Pair = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCLI_HOME", str(tmp_path / "home"))


def loaded(folder: Path, dtype: str = "bfloat16") -> Model:
    return load(str(folder), device="cpu", dtype=dtype, attention="eager")


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return loaded(tiny_model(tmp_path / "tiny"), "float32")


def test_hash_is_of_the_weights_not_of_the_files(tmp_path: Path) -> None:
    a, b, c = (tiny_model(tmp_path / name) for name in "abc")
    weights = load_file(b / "model.safetensors")
    parts = {"one.safetensors": list(weights)[:5], "two.safetensors": list(weights)[5:]}
    for file, names in parts.items():
        save_file({name: weights[name] for name in names}, b / file, {"format": "pt"})
    (b / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, names in parts.items() for name in names}}
    (b / "model.safetensors.index.json").write_text(json.dumps(index))
    (c / "notes.kv.safetensors").write_text("not the model's")
    assert weights_hash(a) == weights_hash(b) == weights_hash(c)
    assert loaded(b).identity["weights"] == weights_hash(a)


def test_one_bit_is_another_hash(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "tiny")
    before = weights_hash(folder)
    nudge(folder)
    assert weights_hash(folder) != before
    assert weights_hash(tiny_model(tmp_path / "other", seed=1)) != before


@pytest.mark.parametrize("damage", [b"", b"\xff" * 64, b"\x02" + bytes(7) + b"[]", "cut short"])
def test_weights_that_cannot_be_read(tmp_path: Path, damage: bytes | str) -> None:
    file = tiny_model(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] if damage == "cut short" else damage)
    with pytest.raises(StorageError, match="cannot read the weights"):
        weights_hash(tmp_path)


def test_older_formats_are_hashed_as_loaded(tmp_path: Path, model: Model) -> None:
    folder = tiny_model(tmp_path / "old")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    old, again, half = (loaded(folder, dtype).identity for dtype in ("float32", "float32", "bfloat16"))
    assert old == again
    assert len({old["weights"], half["weights"], model.identity["weights"]}) == 3
    assert (old["weights_dtype"], half["weights_dtype"]) == ("F32", "BF16")


def test_weights_dtype_is_that_of_most(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, dtype=torch.int64), "b": torch.zeros(99).half()}, tmp_path / "model.safetensors")
    assert weights_dtype(tmp_path) == "F16"


def test_record(model: Model) -> None:
    identity = model.identity
    named = {key: identity[key] for key in ("id", "revision", "architecture", "dtype", "weights_dtype", "adapters")}
    expected = {"id": "tiny", "revision": "", "architecture": "LlamaForCausalLM", "dtype": "float32"}
    assert named == {**expected, "weights_dtype": "F32", "adapters": []}
    assert identity["weights"] == weights_hash(model.folder)
    model.net.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    model.net.peft_config = {"default": None}
    fresh = replace(model).identity
    assert (fresh["weights_dtype"], fresh["adapters"]) == ("F32+gptq4", ["default"])


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 3},
        {"head_dim": 16},
        {"rms_norm_eps": 1e-4},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"attention_bias": True},
        {"layer_types": ["full_attention", "sliding_attention"]},
    ],
)
def test_config_hash_sees_what_shapes_the_cache(model: Model, fields: dict[str, Any]) -> None:
    before = config_hash(model.config)
    for name, value in fields.items():
        setattr(model.config, name, value)
    assert config_hash(model.config) != before


def test_config_hash_ignores_the_rest(model: Model) -> None:
    before = config_hash(model.config)
    changes = {
        "dtype": "bfloat16",
        "eos_token_id": 5,
        "use_cache": False,
        "max_position_embeddings": 9,
        "qk_norm": None,
    }
    for name, value in changes.items():
        setattr(model.config, name, value)
    model.config.rope_parameters = {"rope_theta": 10000, "rope_type": "default"}
    assert config_hash(model.config) == before


def test_tokenizer_hash(model: Model) -> None:
    same = tiny_tokenizer(chat_template=None)
    same("text", truncation=True, max_length=3)
    same.backend_tokenizer.enable_padding(length=7)
    other, roles = tiny_tokenizer(("word",)), tiny_tokenizer(chat_template=CHATML)
    roles.eos_token = "<|endoftext|>"
    digest = tokenizer_hash(model.tokenizer)
    assert digest == tokenizer_hash(same)
    assert len({digest, tokenizer_hash(other), tokenizer_hash(roles)}) == 3


def test_tokenizer_without_a_backend() -> None:
    def slow(**vocab: int) -> SimpleNamespace:
        return SimpleNamespace(get_vocab=lambda: vocab, special_tokens_map={"eos_token": "a"})

    assert tokenizer_hash(slow(a=0, b=1)) == tokenizer_hash(slow(b=1, a=0)) != tokenizer_hash(slow(a=1, b=0))


def probe(model: Model) -> Pair:  # -> [L, H, P, D] twice
    with torch.inference_mode():
        layers = model.net(torch.arange(8)[None], use_cache=True).past_key_values.layers
    return torch.cat([layer.keys for layer in layers]), torch.cat([layer.values for layer in layers])


class Check:
    """`check` against the snapshot of a model, its warnings kept; any keys and values do where no model is to run."""

    def __init__(self, model: Model) -> None:
        layout = Layout(layers=2, heads=2, q_heads=4, head_dim=8, v_dim=8, dtype="F32", scale=8**-0.5)
        seq = Seq(9, 9, "", 0, "", False)
        self.meta, self.warned = Meta(seq, model.identity, model.tokenizer_hash, layout, {}), list[str]()
        self.saved: Pair | None = torch.rand(2, 2, 8, 8), torch.rand(2, 2, 8, 8)

    def __call__(self, other: Model, fresh: Pair | None = None, trust: bool = False) -> None:
        def probe() -> Pair:
            return fresh or pytest.fail("probed")

        check(self.meta, other, probe, self.saved, trust, self.warned.append)


@pytest.fixture
def against(model: Model) -> Check:
    return Check(model)


def test_the_same_weights_are_accepted_without_a_probe(tmp_path: Path, against: Check) -> None:
    twin = loaded(tiny_model(tmp_path / "twin"), "bfloat16")
    against(twin)
    assert not against.warned


def test_another_weight_is_refused_unless_trusted(model: Model, against: Check, tmp_path: Path) -> None:
    nudge(tiny_model(tmp_path / "other"))
    other = loaded(tmp_path / "other", "float32")
    with pytest.raises(MismatchError) as caught:
        against(other)
    lines = " ".join(caught.value.lines())
    assert all(words in lines for words in ("tiny", "other", "its weights differ", "--trust-model"))
    against(other, trust=True)
    assert against.warned == ["its weights differ; trusted all the same"]


@pytest.mark.parametrize("trust", [False, True])
def test_another_shape_is_refused_always(against: Check, tmp_path: Path, trust: bool) -> None:
    other = loaded(tiny_model(tmp_path / "other", num_hidden_layers=3))
    with pytest.raises(MismatchError) as caught:
        against(other, trust=trust)
    lines = " ".join(caught.value.lines())
    assert "tiny (LlamaForCausalLM, 2 layers, 4 query and 2 KV heads of 8)" in lines
    assert "other (LlamaForCausalLM, 3 layers" in lines


def test_another_config_or_tokenizer_or_adapter(model: Model, against: Check) -> None:
    other = replace(model, tokenizer=tiny_tokenizer(("word",)))
    other.config.rope_parameters = {"rope_type": "default", "rope_theta": 5e5}
    other.net.peft_config = {"default": None}
    with pytest.raises(MismatchError) as caught:
        against(other)
    assert all(f"its {part} differ" in caught.value.why for part in ("config", "tokenizer", "adapters"))
    against(other, trust=True)
    assert len(against.warned) == 3


def test_another_dtype_is_decided_by_the_probe(model: Model, against: Check, tmp_path: Path) -> None:
    near = loaded(tiny_model(tmp_path / "near", dtype=torch.bfloat16), "bfloat16")
    against.saved = probe(model)
    against(near, probe(near))
    assert len(against.warned) == 1 and "BF16, not F32" in against.warned[0]
    far = loaded(tiny_model(tmp_path / "far", 1, torch.bfloat16), "bfloat16")
    with pytest.raises(MismatchError, match="not the one"):
        against(far, probe(far))
    against(far, probe(far), trust=True)


@pytest.mark.parametrize(
    ("dtype", "error", "good"),
    [
        ("float32", 9e-4, True),
        ("float32", 2e-3, False),
        ("bfloat16", 0.09, True),
        ("bfloat16", 0.2, False),
        ("bfloat16", float("nan"), False),
    ],
)
def test_how_near_is_near(against: Check, tmp_path: Path, dtype: str, error: float, good: bool) -> None:
    other = loaded(tiny_model(tmp_path / "other", dtype=torch.bfloat16), dtype)
    keys, values = against.saved
    fresh = torch.stack([values[0], values[1] * (1 + error)])
    with nullcontext() if good else pytest.raises(MismatchError):
        against(other, (keys, fresh))


def test_a_probe_that_cannot_be_compared(against: Check, tmp_path: Path) -> None:
    other = loaded(tiny_model(tmp_path / "other", dtype=torch.bfloat16))
    keys, values = against.saved
    with pytest.raises(MismatchError):
        against(other, (keys[:, :, :7], values[:, :, :7]))
    against.saved = None
    with pytest.raises(MismatchError) as caught:
        against(other)
    assert "holds no probe" in caught.value.why
