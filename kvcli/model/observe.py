"""Prefill: read a document chunk by chunk, keep its cache, and observe what methods will need."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.linalg import vector_norm
from transformers import Cache

from ..errors import InfeasibleError, KvError
from ..kernels.mass import attention_mass
from ..layers import NAMES
from ..meta import Layout, Meta, Seq
from ..snapshot import Rows, Snapshot, Stats
from .cache import Layer
from .load import Model
from .text import context_length

WINDOW = 64  # last queries saved
PROBES = 64  # queries saved evenly over the document
IDENTITY = 8  # tokens run on their own to recognise the model


class ObservedLayer(Layer):
    """A cache layer with room for the whole document that also collects the layer's statistics."""

    def __init__(self, tokens: int) -> None:
        super().__init__(room=tokens)
        self.tokens = tokens
        self.last = torch.arange(max(0, tokens - WINDOW), tokens)
        self.probe = torch.linspace(0, tokens - 1, min(PROBES, tokens)).round().long()
        self.queries: dict[str, list[Tensor]] = {"last": [], "probe": []}
        self.norms: list[Tensor] = []
        self.scale = 0.0

    def attend(self, q: Tensor, scale: float, module: nn.Module) -> Tensor:
        out, lse = self.attend_lse(q, scale)
        past, self.scale = self.length - q.shape[1], scale
        if not past:
            self.mass = torch.zeros(self.keys.shape[0], self.tokens, device=q.device)
        k_new = self.keys[:, past : self.length]
        self.mass[:, past : self.length] += attention_mass(q, k_new, lse, scale, True)
        if past:
            self.mass[:, :past] += attention_mass(q, self.keys[:, :past], lse, scale, False)
        for name, positions in (("last", self.last), ("probe", self.probe)):
            here = positions[(positions >= past) & (positions < self.length)] - past
            self.queries[name].append(q[:, here.to(q.device)])
        weight = _output_weight(module)
        if weight is not None:
            self.norms.append(value_norm(self.values[:, past : self.length], weight, q.shape[0]))
        return out

    def stats(self) -> Stats:
        """What was observed; complete when all tokens have been read."""
        return Stats(
            q_last=torch.cat(self.queries["last"], 1).cpu(),
            q_last_pos=self.last.int(),
            q_probe=torch.cat(self.queries["probe"], 1).cpu(),
            q_probe_pos=self.probe.int(),
            attn_mass=self.mass.cpu(),
            value_norm=torch.cat(self.norms, 1).cpu() if self.norms else None,
        )

    def rows(self) -> Rows:
        """The whole cache of the layer as flat rows, without a copy on the CPU."""
        heads = self.keys.shape[0]
        pos = torch.arange(self.tokens, dtype=torch.int32).repeat(heads)
        k, v = self.keys.flatten(0, 1).cpu(), self.values.flatten(0, 1).cpu()
        return Rows(k, v, pos, torch.full((heads,), self.tokens))


def _output_weight(module: nn.Module) -> Tensor | None:  # -> [d_model, Hq * Dv]
    for name in ("o_proj", "out_proj", "dense", "wo"):
        weight = getattr(getattr(module, name, None), "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point():
            return weight
    return None


def value_norm(v: Tensor, weight: Tensor, q_heads: int) -> Tensor:  # [H, M, Dv], [d, Hq * Dv] -> [H, M] float32
    """1-norm of each value behind the output projection, mean over the queries' heads of its group."""
    heads = weight.view(-1, len(v), q_heads // len(v), v.shape[-1])  # [d, H, G, Dv]
    norms: Tensor = torch.zeros(v.shape[:2], device=v.device)
    for h, g in product(range(len(v)), range(heads.shape[2])):
        norms[h] += vector_norm(v[h] @ heads[:, h, g].T, 1, -1, dtype=torch.float32)
    return norms / heads.shape[2]


@torch.inference_mode()
def prefill(
    model: Model,
    ids: Sequence[int],
    seq: tuple[int, str, bool],
    *,
    chunk: int = 1024,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Snapshot:
    """The model's memory of `ids` with all statistics; memory is the cache plus one chunk.

    seq: the lead and tail of `text.document_ids`, and whether the chat template was used.
    Raises InfeasibleError for more tokens than the model reads, KvError where a layer is not finite.
    """
    if len(ids) > (most := context_length(model.config)):
        raise InfeasibleError(f"the document has {len(ids):,} tokens, the model reads {most:,}", fix="shorten it")
    layers = [ObservedLayer(len(ids)) for _ in range(model.config.num_hidden_layers)]
    tokens = torch.tensor(ids, dtype=torch.int32)
    hidden = _read(model.net, layers, tokens, chunk, tick)
    probe_k, probe_v = probe(model, tokens[:IDENTITY])
    for i, layer in enumerate(layers):
        if not bool(layer.keys.isfinite().all() and layer.values.isfinite().all()):
            raise KvError(f"layer {i} gave NaN or infinity", f"computed in {model.net.dtype}", "try --dtype float32")
    extra = {"stat.final_hidden": hidden[-1].cpu(), "stat.probe_k": probe_k, "stat.probe_v": probe_v}
    rows, stats = [layer.rows() for layer in layers], [layer.stats() for layer in layers]
    return Snapshot(_meta(model, tokens, seq, layers[0]), tokens, rows, stats, extra)


@torch.inference_mode()
def probe(model: Model, ids: Tensor) -> tuple[Tensor, Tensor]:  # [P] -> [L, H, P, D], [L, H, P, Dv]
    """Keys and values of a few tokens run on their own: what the model's identity is checked by."""
    layers = [Layer(room=len(ids)) for _ in range(model.config.num_hidden_layers)]
    _read(model.net, layers, ids, len(ids), lambda done, total: None)
    return torch.stack([layer.keys for layer in layers]).cpu(), torch.stack([layer.values for layer in layers]).cpu()


def _read(
    net: Any, layers: Sequence[Layer], ids: Tensor, chunk: int, tick: Callable[[int, int], None]
) -> Tensor:  # -> [M, d] hidden states of the last chunk after the final norm
    cache = Cache(layers=list(layers))
    for start in range(0, len(ids), chunk):
        part = ids[start : start + chunk].long()[None].to(net.device)
        hidden: Tensor = net.base_model(input_ids=part, past_key_values=cache, use_cache=True).last_hidden_state[0]
        tick(min(start + chunk, len(ids)), len(ids))
    return hidden


def _meta(model: Model, ids: Tensor, seq: tuple[int, str, bool], layer: ObservedLayer) -> Meta:
    lead, tail, chat = seq
    config = model.config
    layout = Layout(
        layers=config.num_hidden_layers,
        heads=layer.keys.shape[0],
        q_heads=layer.queries["last"][0].shape[0],
        head_dim=layer.keys.shape[-1],
        v_dim=layer.values.shape[-1],
        dtype=NAMES[layer.keys.dtype],
        scale=layer.scale,
        kinds=("full",) * config.num_hidden_layers,
    )
    digest = xxhash.xxh3_128_hexdigest(ids.numpy().tobytes())
    rope = getattr(config, "rope_parameters", None) or {}
    return Meta(
        seq=Seq(len(ids), len(ids), digest, lead, tail, chat),
        model=model.identity,
        tokenizer=model.tokenizer_hash,
        layout=layout,
        rope={**rope, "head_dim": layer.keys.shape[-1]},
    )
