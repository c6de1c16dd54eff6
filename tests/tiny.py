"""A two-layer random Llama with a byte-level tokenizer and a chat template, as an ordinary model folder."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvcli.model.convert import quiet

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("e", "r"), ("o", "n")]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(extra: tuple[str, ...] = (), chat_template: str | None = CHATML) -> Any:
    """A vocabulary of all bytes, six merges and three special tokens; `extra` words make it another one."""
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, MERGES), *extra]
    core = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=MERGES))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    end, start, stop = SPECIAL
    roles = {"unk_token": end, "bos_token": start, "eos_token": stop, "pad_token": stop}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=chat_template, **roles)


def tiny_model(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """Write the model to `folder` and return it: equal seeds, equal weights; `config` changes fields of LlamaConfig."""
    fields = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 300}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = LlamaForCausalLM(LlamaConfig(**{**fields, **heads, **tokens, **config}))
    with quiet():
        net.to(dtype).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    return folder


def nudge(folder: Path, name: str = "model.norm.weight") -> None:
    """Change the last bit of one weight."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights[name].view(torch.int32).flatten()[0] += 1
    save_file(weights, file, {"format": "pt"})
