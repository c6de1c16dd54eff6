"""Whose memory a snapshot is: hashes of config and tokenizer, the model's record, and the check before a resume."""

import json
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor

from ..errors import MismatchError
from ..kernels.error import relative_error
from ..layers import NAMES
from ..meta import Json, Layout, Meta
from .convert import weight_files
from .weights import weights_dtype, weights_hash

if TYPE_CHECKING:
    from .load import Model

# The fields of a config that shape keys and values beside the weights; a field that is absent or None is left out.
SHAPING = """
    model_type num_hidden_layers num_kv_shared_layers hidden_size num_attention_heads num_key_value_heads head_dim
    v_head_dim qk_nope_head_dim qk_rope_head_dim kv_lora_rank attention_bias qk_norm use_qk_norm hidden_act
    hidden_activation rope_parameters partial_rotary_factor no_rope_layers rms_norm_eps layer_norm_eps
    layer_norm_epsilon norm_eps layer_types sliding_window attn_logit_softcapping query_pre_attn_scalar
    attention_multiplier embedding_multiplier residual_multiplier
"""
NEAR, NEAR_16_BIT = 1e-3, 0.1  # largest relative error of the probe

Pair = tuple[Tensor, Tensor]
Shape = tuple[int, int, int, int]  # L, Hq, H, D


def config_hash(config: Any) -> str:
    """XXH3-128 over the fields that shape keys and values, whole numbers and floats alike."""
    fields = {name: getattr(config, name, None) for name in SHAPING.split()}
    return _digest({name: _plain(value) for name, value in fields.items() if value is not None})


def tokenizer_hash(tokenizer: Any) -> str:
    """XXH3-128 over everything that decides how text becomes ids; truncation, padding and chat template left out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # Truncation and padding stand before the added tokens. To parse a megabyte only to drop them takes half a second.
    text = backend.to_str().partition('"added_tokens":')[2] if backend else sorted(tokenizer.get_vocab().items())
    return _digest([text, {name: str(token) for name, token in tokenizer.special_tokens_map.items()}])


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items() if part is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return float(value) if type(value) is int else value


def _digest(value: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True, default=str).encode())


def record(model: "Model") -> dict[str, Any]:
    """The `model` block of a snapshot's metadata: what `check` compares, and by what names the model can be found."""
    quantized = getattr(model.net.config, "quantization_config", None)
    weights, stored = _stored(model)
    return {
        "id": model.id,
        "revision": model.revision,
        "architecture": type(model.net).__name__,
        "weights": weights,
        "config": config_hash(model.config),
        "dtype": str(model.net.dtype).removeprefix("torch."),
        "weights_dtype": f"{stored}+{_quantization(quantized)}" if quantized else stored,
        "adapters": sorted(getattr(model.net, "peft_config", None) or {}),
    }


def _stored(model: "Model") -> tuple[str, str]:
    """Hash and dtype of the weights: of the files, or as loaded where these are of an older format."""
    if model.folder and weight_files(model.folder):
        return weights_hash(model.folder), weights_dtype(model.folder)
    digest = xxhash.xxh3_128()
    for name, weight in sorted(model.net.state_dict().items()):
        digest.update(json.dumps([name, str(weight.dtype), list(weight.shape)]).encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest(), NAMES[model.net.dtype]


def _quantization(config: Any) -> str:
    table = config if isinstance(config, dict) else config.to_dict()
    method = table.get("quant_method", "unknown")
    return f"{getattr(method, 'value', method)}{table.get('bits', '')}"


def check(
    meta: Meta,
    model: "Model",
    probe: Callable[[], Pair],
    saved: Pair | None,
    trust: bool = False,
    warn: Callable[[str], None] = warnings.warn,
) -> None:
    """Raise MismatchError unless `model` is the one the snapshot was made with.

    probe, saved: keys and values of the document's first tokens run on their own, from this model and from the file;
    they decide where the weights are stored in another dtype or quantisation. `trust` turns all differences but
    those of shape into warnings.
    """
    shape, given = _file_shape(meta.layout), _model_shape(model.config)
    mine = model.identity
    if meta.model.get("config") != mine["config"] and shape != given:
        raise MismatchError(
            f"the snapshot was made with {_name(meta.model, shape)}",
            f"the model is {_name(mine, given)}",
            "give the model that made it with --model",
        )
    reasons = _differences(meta, model) + _weights_differ(meta, mine, probe, saved, warn)
    for reason in reasons if trust else ():
        warn(f"{reason}; trusted all the same")
    if reasons and not trust:
        raise MismatchError(
            f"the model {mine['id']} is not the one the snapshot was made with ({meta.model.get('id')})",
            "; ".join(reasons),
            "give that one with --model; resume also takes --trust-model, if you know that they agree",
        )


def _differences(meta: Meta, model: "Model") -> list[str]:
    theirs, mine = meta.model, model.identity
    same = {
        "its config differs in what shapes keys and values": theirs.get("config") == mine["config"],
        "its tokenizer differs": meta.tokenizer == model.tokenizer_hash,
        "its adapters differ": theirs.get("adapters", []) == mine["adapters"],
    }
    return [reason for reason, agrees in same.items() if not agrees]


def _weights_differ(
    meta: Meta, mine: dict[str, Any], probe: Callable[[], Pair], saved: Pair | None, warn: Callable[[str], None]
) -> list[str]:
    theirs = meta.model
    if theirs.get("weights") == mine["weights"]:
        return []
    if theirs.get("weights_dtype") == mine["weights_dtype"]:
        return ["its weights differ"]
    stored = f"its weights are stored as {mine['weights_dtype']}, not {theirs.get('weights_dtype')}"
    if saved is None:
        return [f"{stored}, and the snapshot holds no probe to compare by"]
    error = max(map(_error, probe(), saved))
    limit = NEAR if {mine["dtype"], theirs.get("dtype")} == {"float32"} else NEAR_16_BIT
    if not error <= limit:
        return [f"{stored}, and its keys and values are {error:.2g} off, more than {limit:g}"]
    warn(f"{stored}; its keys and values are within {error:.2g} of the snapshot's")
    return []


def _error(ours: Tensor, theirs: Tensor) -> float:  # [L, H, P, D] twice
    """Relative Frobenius error of the worst layer; infinite for NaN and for other shapes."""
    if ours.shape != theirs.shape:
        return float("inf")
    error = relative_error(ours.cpu(), theirs.cpu(), (1, 2, 3))
    return float(error.nan_to_num(float("inf"), float("inf")).max())


def _file_shape(layout: Layout) -> Shape:
    return layout.layers, layout.q_heads, layout.heads, layout.head_dim


def _model_shape(config: Any) -> Shape:
    q_heads = config.num_attention_heads
    head_dim = (
        getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // q_heads
    )
    return config.num_hidden_layers, q_heads, getattr(config, "num_key_value_heads", None) or q_heads, head_dim


def _name(model: Json, shape: Shape) -> str:
    layers, q_heads, heads, head_dim = shape
    kind = f"{model.get('architecture')}, {layers} layers, {q_heads} query and {heads} KV heads of {head_dim}"
    return f"{model.get('id')} ({kind})"
