"""What a model or a caller asks for and no snapshot can give is refused by name, never ignored."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from test_architectures import build
from tiny import tiny_tokenizer
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

import kvcli
from kvcli.errors import InfeasibleError, MismatchError
from kvcli.model.cache import named
from kvcli.model.convert import quiet
from kvcli.model.load import Model

IDS = torch.randint(5, 290, (60,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("token", [300, 10**6, -1])
def test_tokens_that_the_model_does_not_know(model: Model, token: int) -> None:
    snapshot = kvcli.prefill(IDS, model)
    works: list[Callable[[], Any]] = [
        lambda: kvcli.prefill([*IDS, token], model),
        lambda: kvcli.prefill([token], model, onto=snapshot),
    ]
    for work in works:
        with pytest.raises(MismatchError, match=f"{token}.* 300"):
            work()


def test_layers_of_several_shapes(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 300, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "global_head_dim": 16, "sliding_window": 9}
    more = {"layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 0}
    with quiet():
        Gemma4ForCausalLM(Gemma4TextConfig(**sizes, **heads, **more)).save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InfeasibleError, match="not of one shape") as caught:
        kvcli.prefill(IDS, kvcli.load(tmp_path, dtype="float32"))
    assert "layer 1 has keys [2, 16]" in caught.value.why and "layer 0 has keys [2, 8]" in caught.value.why


def test_a_mask_that_hides_tokens(model: Model) -> None:
    snapshot = kvcli.prefill(IDS, model)
    for hidden in (slice(0, 3), slice(59, 60), slice(61, 62)):
        asked = snapshot.inputs(model, "Who?")
        asked["attention_mask"][:, hidden] = 0
        with pytest.raises(InfeasibleError, match="attention_mask"):
            model.net.generate(**asked, max_new_tokens=2, pad_token_id=2)
    out = model.net.generate(**snapshot.inputs(model, "Who?"), max_new_tokens=2, pad_token_id=2)
    asked = {name: part for name, part in snapshot.inputs(model, "Who?").items() if name != "attention_mask"}
    with torch.no_grad():
        assert int(model.net(**asked).logits[0, -1].argmax()) == out[0, -2]


@pytest.mark.parametrize("name", ["phi3 longrope", "llama dynamic"])
def test_positions_that_change_with_the_length_while_generating(name: str, tmp_path: Path) -> None:
    model = kvcli.load(build(name, tmp_path), dtype="float32")  # changes at 120
    snapshot = kvcli.prefill(IDS + IDS[:50], model, warn=lambda text: None)
    ids = torch.tensor([[7, 8, 9]])
    for n, fits in ((8, True), (9, False)):
        asked = {"input_ids": ids, "attention_mask": torch.ones(1, 113), **named(model.net, snapshot.cache(model))}
        with nullcontext() if fits else pytest.raises(InfeasibleError, match="120"):
            model.net.generate(**asked, max_new_tokens=n, eos_token_id=None, pad_token_id=2)
