"""Prefill: read a document chunk by chunk, keep its cache, and observe what methods will need."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.linalg import vector_norm
from transformers import Cache

from ..errors import KvError, MismatchError
from ..kernels.mass import attention_mass
from ..layers import NAMES
from ..meta import Layout, Meta, Seq
from ..snapshot import Rows, Snapshot, Stats
from .attend import Law
from .cache import Layer, named, windows
from .load import Model
from .rope import frequencies
from .text import context_length, too_long

WINDOW = 64  # last queries saved
PROBES = 64  # queries saved evenly over the document
IDENTITY = 8  # tokens run on their own to recognise the model


class ObservedLayer(Layer):
    """A cache layer with room for the whole document that also collects the layer's statistics.

    A layer whose window is shorter than the document keeps its last window and no statistics: it is never compressed.
    """

    def __init__(self, tokens: int, window: int | None = None) -> None:
        self.slides = window is not None and window <= tokens
        super().__init__(room=1 if self.slides else tokens, window=window)
        self.tokens = tokens
        self.last = torch.arange(max(0, tokens - WINDOW), tokens)
        self.probe = torch.linspace(0, tokens - 1, min(PROBES, tokens)).round().long()
        self.queries: dict[str, list[Tensor]] = {"last": [], "probe": []}
        self.norms: list[Tensor] = []
        self.law = Law(0.0)
        self.finite = True

    def attend(self, q: Tensor, law: Law, module: nn.Module) -> Tensor:
        out, lse = self.attend_lse(q, law)
        self.law, self.q_heads = law, q.shape[0]
        here = slice(self.held - q.shape[1], self.held)
        self.finite &= bool(self.keys[:, here].isfinite().all() and self.values[:, here].isfinite().all())
        if not self.slides:
            self._observe(q, lse, module)
        return out

    def _observe(self, q: Tensor, lse: Tensor, module: nn.Module) -> None:
        past = self.length - q.shape[1]
        if not past:
            self.mass = torch.zeros(self.keys.shape[0], self.tokens, device=q.device)
        k_new = self.keys[:, past : self.length]
        self.mass[:, past : self.length] += attention_mass(q, k_new, lse, self.law.scale, True, self.law.softcap)
        if past:
            k_old = self.keys[:, :past]
            self.mass[:, :past] += attention_mass(q, k_old, lse, self.law.scale, False, self.law.softcap)
        for name, positions in (("last", self.last), ("probe", self.probe)):
            here = positions[(positions >= past) & (positions < self.length)] - past
            self.queries[name].append(q[:, here.to(q.device)])
        weight = _output_weight(module)
        if weight is not None:
            self.norms.append(value_norm(self.values[:, past : self.length], weight, q.shape[0]))

    def stats(self) -> Stats:
        """What was observed; complete when all tokens have been read."""
        if self.slides:
            return Stats()
        sinks = self.law.sink_logit
        return Stats(
            q_last=torch.cat(self.queries["last"], 1).cpu(),
            q_last_pos=self.last.int(),
            q_probe=torch.cat(self.queries["probe"], 1).cpu(),
            q_probe_pos=self.probe.int(),
            attn_mass=self.mass.cpu(),
            value_norm=torch.cat(self.norms, 1).cpu() if self.norms else None,
            sink_logit=None if sinks is None else sinks.float().cpu(),
        )

    def rows(self) -> Rows:
        """What later tokens will see of the layer as flat rows; the whole document is not copied on the CPU."""
        heads, count = self.keys.shape[0], self.tokens
        if self.slides and self.window:
            count = max(1, min(self.held, self.window - 1))
        pos = torch.arange(self.tokens - count, self.tokens, dtype=torch.int32).repeat(heads)
        k, v = (part[:, self.held - count : self.held].flatten(0, 1).cpu() for part in (self.keys, self.values))
        return Rows(k, v, pos, torch.full((heads,), count))


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
    if len(ids) > context_length(model.config):
        raise too_long(model.config, f"the document has {len(ids):,} tokens", "shorten it")
    layers = [ObservedLayer(len(ids), window) for window in windows(model.config)]
    tokens = torch.tensor(ids, dtype=torch.int32)
    hidden = _read(model.net, layers, tokens, chunk, tick)
    probe_k, probe_v = probe(model, tokens[:IDENTITY])
    for i, layer in enumerate(layers):
        if not layer.finite:
            raise KvError(f"layer {i} gave NaN or infinity", f"computed in {model.net.dtype}", "try --dtype float32")
    extra = {"stat.final_hidden": hidden[-1].cpu(), "stat.probe_k": probe_k, "stat.probe_v": probe_v}
    rows, stats = [layer.rows() for layer in layers], [layer.stats() for layer in layers]
    return Snapshot(_meta(model, tokens, seq, layers), tokens, rows, stats, extra)


@torch.inference_mode()
def probe(model: Model, ids: Tensor) -> tuple[Tensor, Tensor]:  # [P] -> [L, H, P, D], [L, H, P, Dv]
    """Keys and values of a few tokens run on their own: what the model's identity is checked by.

    Raises MismatchError for tokens that are not in the model's vocabulary.
    """
    largest, V = max(ids.tolist(), default=0), model.net.get_input_embeddings().num_embeddings
    if largest >= V:
        raise MismatchError(
            f"the snapshot holds the token {largest}, the model knows {V}", fix="give the model that made it"
        )
    layers = [Layer(room=len(ids), window=window) for window in windows(model.config)]
    _read(model.net, layers, ids, len(ids), lambda done, total: None)
    return torch.stack([layer.keys for layer in layers]).cpu(), torch.stack([layer.values for layer in layers]).cpu()


def _read(
    net: Any, layers: Sequence[Layer], ids: Tensor, chunk: int, tick: Callable[[int, int], None]
) -> Tensor:  # -> [M, d] hidden states of the last chunk after the final norm
    cache = Cache(layers=list(layers))
    for start in range(0, len(ids), chunk):
        part = ids[start : start + chunk].long()[None].to(net.device)
        out = net.base_model(input_ids=part, use_cache=True, **named(net.base_model, cache))
        hidden: Tensor = out.last_hidden_state[0]
        tick(min(start + chunk, len(ids)), len(ids))
    return hidden


def _meta(model: Model, ids: Tensor, seq: tuple[int, str, bool], layers: Sequence[ObservedLayer]) -> Meta:
    lead, tail, chat = seq
    config, layer = model.config, layers[0]
    layout = Layout(
        layers=config.num_hidden_layers,
        heads=layer.keys.shape[0],
        q_heads=layer.q_heads,
        head_dim=layer.keys.shape[-1],
        v_dim=layer.values.shape[-1],
        dtype=NAMES[layer.keys.dtype],
        scale=layer.law.scale,
        softcap=layer.law.softcap,
        kinds=tuple("sliding" if each.slides else "full" for each in layers),
    )
    digest = xxhash.xxh3_128_hexdigest(ids.numpy().tobytes())
    rope = {"head_dim": layer.keys.shape[-1], **(getattr(config, "rope_parameters", None) or {})}
    held = [i for i, each in enumerate(layers) if not each.slides]
    if freq := frequencies(model.net, held, ids):
        rope["inv_freq"] = freq
    return Meta(
        seq=Seq(len(ids), len(ids), digest, lead, tail, chat),
        model=model.identity,
        tokenizer=model.tokenizer_hash,
        layout=layout,
        rope=rope,
    )
