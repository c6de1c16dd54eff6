"""The Python interface: the same snapshots and answers as the command line, and caches that transformers can use."""

import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from make import same_snapshot
from test_architectures import build
from tiny import nudge, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import kvcli
from kvcli.cli import run
from kvcli.errors import FormatError, InfeasibleError, KvError, MismatchError, StorageError, UsageError
from kvcli.model.answer import Sampling, answer
from kvcli.model.cache import named
from kvcli.model.convert import quiet
from kvcli.model.load import Model
from kvcli.model.prefix import Prefix
from kvcli.model.text import question_ids

TEXT = "The harbour opened at six. " * 12 + "The new ferry is called Kestrel.\n"
QUESTION = "What is the ferry called?"
IDS = torch.randint(5, 290, (150,), generator=torch.Generator().manual_seed(0)).tolist()


def network(folder: Path, attention: str = kvcli.ATTENTION, **options: Any) -> Any:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, **options)


def filled(net: Any, ids: list[int]) -> DynamicCache:
    cache = DynamicCache(config=net.config)
    net(torch.tensor([ids]), use_cache=True, **named(net, cache))  # with gradients, as the careless do
    return cache


def test_the_main_job_as_at_the_command_line(folder: Path, model: Model, tmp_path: Path) -> None:
    (tmp_path / "doc.txt").write_text(TEXT)
    run(f"prefill {tmp_path}/doc.txt --model {folder} --dtype float32 -o {tmp_path}/a".split())
    run(f"compress {tmp_path}/a -m kvmerger -b 35% -o {tmp_path}/b".split())
    snapshot = kvcli.prefill(TEXT, model)
    snapshot.save(tmp_path / "c")
    small = kvcli.compress(kvcli.open(tmp_path / "c"), "kvmerger", "35%")
    assert small.save(tmp_path / "d") == (tmp_path / "d").stat().st_size
    for ours, theirs in ("ca", "db"):
        assert (tmp_path / ours).read_bytes() == (tmp_path / theirs).read_bytes()
    assert (
        kvcli.open(tmp_path / "d").save(tmp_path / "e")
        and (tmp_path / "e").read_bytes() == (tmp_path / "d").read_bytes()
    )
    for budget in (0.35, "0.35"):
        same_snapshot(kvcli.compress(snapshot, "snapkv", budget), kvcli.compress(snapshot, "snapkv", "0.35"))


@pytest.mark.parametrize("recipe", [None, "snapkv+adakv", "kvmerger"])
def test_generate_takes_its_cache_and_answers_as_resume_does(model: Model, recipe: str | None) -> None:
    snapshot = kvcli.prefill(TEXT, model)
    snapshot = kvcli.compress(snapshot, recipe, "30%") if recipe else snapshot
    ids = question_ids(model.tokenizer, QUESTION, "It is", snapshot.meta.seq.tail)
    expected = answer(model, Prefix.read(snapshot, model), ids, Sampling(n=12)).ids
    stops = {"eos_token_id": [0, 2], "pad_token_id": 2}
    for _ in range(2):  # a cache of its own each time
        out = model.net.generate(**snapshot.inputs(model, QUESTION, "It is"), max_new_tokens=12, **stops)
        assert out[0, len(ids) :].tolist() == expected
    mask = torch.ones(1, snapshot.meta.seq.next_pos + len(ids), dtype=torch.long)
    cache = named(model.net, snapshot.cache(model))
    out = model.net.generate(torch.tensor([ids]), attention_mask=mask, max_new_tokens=12, **stops, **cache)
    assert out[0, len(ids) :].tolist() == expected


def test_caches_share_what_the_snapshot_holds(model: Model, tmp_path: Path) -> None:
    kvcli.prefill(TEXT, model).save(tmp_path / "a")
    snapshot = kvcli.open(tmp_path / "a")
    one, other = snapshot.cache(model), snapshot.cache(model)
    assert all(a.prefix.k.data_ptr() == b.prefix.k.data_ptr() for a, b in zip(one.layers, other.layers, strict=True))


def test_documents_appended_aimed_and_cut(model: Model) -> None:
    first = kvcli.prefill("One. ", model)
    both = kvcli.prefill("Two.", model, onto=first)
    assert model.tokenizer.decode(both.ids[first.meta.seq.lead :]) == "One.\nTwo.\n"
    aimed = kvcli.prefill("One. ", model, probe=QUESTION)
    assert torch.equal(aimed.ids, first.ids) and aimed.stats[0].q_last_pos[0] == first.meta.seq.tokens
    with pytest.warns(UserWarning, match="cut to 448 tokens"):
        assert len(kvcli.prefill(TEXT * 8, model, truncate=True).ids) == 448
    assert kvcli.prefill(IDS, model).ids.tolist() == IDS == kvcli.prefill(torch.tensor([IDS]), model).ids.tolist()
    with pytest.raises(InfeasibleError, match="512"):
        kvcli.prefill(TEXT * 8, model)


def test_what_is_replaced_is_not_what_was_opened(model: Model, tmp_path: Path) -> None:
    kvcli.prefill(TEXT, model).save(tmp_path / "a")
    snapshot = kvcli.open(tmp_path / "a")
    changed = replace(snapshot, rows=[replace(rows, k=rows.k * 2) for rows in snapshot.rows])
    changed.save(tmp_path / "b")
    assert torch.equal(kvcli.open(tmp_path / "b").rows[1].k, snapshot.rows[1].k * 2)


def test_files_are_never_replaced_unasked_and_damage_is_not_passed_on(model: Model, tmp_path: Path) -> None:
    kvcli.prefill(TEXT, model).save(tmp_path / "a")
    snapshot, before = kvcli.open(tmp_path / "a"), (tmp_path / "a").read_bytes()
    with pytest.raises(StorageError, match="exists"):
        kvcli.prefill("x", model).save(tmp_path / "a")
    with (tmp_path / "a").open("r+b") as file:
        file.seek(len(before) // 2)
        file.write(bytes([before[len(before) // 2] ^ 1]))
    with pytest.raises(FormatError, match="damaged"):
        snapshot.save(tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_network_that_is_loaded_already(folder: Path, model: Model, tmp_path: Path) -> None:
    wrapped = kvcli.load(network(folder))
    assert wrapped.identity == model.identity and wrapped.tokenizer_hash == model.tokenizer_hash
    same_snapshot(kvcli.prefill(TEXT, wrapped), kvcli.prefill(TEXT, model))
    half = kvcli.load(network(folder, dtype=torch.bfloat16), tiny_tokenizer())
    assert kvcli.prefill(TEXT, half).meta.layout.dtype == "BF16"
    changed = network(folder)
    changed.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    nameless = network(folder)
    nameless.name_or_path = ""
    for net, says in ((changed, "other weights"), (network(folder).train(), "training mode")):
        with pytest.raises(InfeasibleError, match=says):
            kvcli.load(net)
    for thing in (nameless, 5):
        with pytest.raises(KvError):
            kvcli.load(thing)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "mixtral", "gpt_oss", "gemma2"])
def test_networks_of_other_architectures_are_recognised(name: str, tmp_path: Path) -> None:
    net = network(build(name, tmp_path))
    assert kvcli.load(net).identity["weights"] == kvcli.load(tmp_path).identity["weights"]
    next(net.base_model.parameters()).data[0] += 1
    with pytest.raises(InfeasibleError, match="other weights"):
        kvcli.load(net)


def test_only_the_own_model_gets_a_cache(folder: Path, model: Model, tmp_path: Path) -> None:
    snapshot = kvcli.prefill(TEXT, model)
    nudge(tiny_model(tmp_path / "other"))
    other = kvcli.load(tmp_path / "other", dtype="float32")
    with pytest.raises(MismatchError, match="not the one"):
        snapshot.cache(other)
    with pytest.warns(UserWarning, match="trusted"):
        snapshot.cache(other, trust=True)
    with pytest.raises(UsageError, match="no model of kvcli"):
        snapshot.cache(model.net)
    plain = kvcli.load(network(folder, "sdpa"))
    for work in (snapshot.cache, lambda model: kvcli.prefill(TEXT, model)):
        with pytest.raises(InfeasibleError, match="sdpa"):
            work(plain)
    plain.net.set_attn_implementation(kvcli.ATTENTION)
    assert snapshot.cache(plain).get_seq_length() == snapshot.meta.seq.tokens


@pytest.mark.parametrize("count", [1, 64, 65, 150])
def test_a_cache_that_transformers_made(folder: Path, model: Model, count: int, tmp_path: Path) -> None:
    ids, net = IDS[:count], network(folder, "sdpa")
    snapshot = kvcli.from_cache(filled(net, ids), torch.tensor([ids]), model)
    whole = kvcli.prefill(ids, model)
    assert snapshot.meta == whole.meta and torch.equal(snapshot.ids, whole.ids)
    assert not snapshot.rows[0].k.requires_grad
    for i in range(2):
        torch.testing.assert_close(snapshot.rows[i].k, whole.rows[i].k, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(snapshot.stats[i].q_last, whole.stats[i].q_last, atol=1e-5, rtol=1e-4)
        assert (snapshot.stats[i].attn_mass is None) == (count > 64)
    assert snapshot.extra.keys() == whole.extra.keys()
    snapshot.save(tmp_path / "a")
    same_snapshot(kvcli.open(tmp_path / "a"), snapshot)
    if count > 4:
        kvcli.compress(snapshot, "snapkv+adakv", "50%")


def test_what_does_not_belong_together_is_refused(folder: Path, model: Model) -> None:
    net = network(folder, "sdpa")
    cache = filled(net, IDS)
    early, late, twice = ([*IDS], [*IDS], filled(net, IDS))
    early[3], late[-2] = IDS[4], IDS[5]
    twice.layers[0].batch_repeat_interleave(2)
    static = StaticCache(config=net.config, max_cache_len=200)
    with torch.no_grad():
        net(torch.tensor([IDS]), use_cache=True, **named(net, static))
    half = filled(net, IDS)
    half.layers[1].keys = half.layers[1].keys.half()
    short = filled(net, IDS)
    del short.layers[1]
    damaged = filled(net, IDS)
    damaged.layers[1].values.data[0, 0, 40, 3] = torch.nan
    for made, ids, says in (
        (cache, early, "belong together"),
        (cache, late, "belong together"),
        (cache, IDS[:-1], "150 tokens, there are 149 ids"),
        (twice, IDS, "one sequence"),
        (static, IDS, "StaticLayer"),
        (half, IDS, "float16"),
        (short, IDS, "1 layers"),
        (damaged, IDS, "layer 1: v holds NaN"),
        (DynamicCache(), IDS, "0 layers"),
        (cache, [IDS, IDS], "not one sequence"),
    ):
        with pytest.raises(KvError, match=says):
            kvcli.from_cache(made, ids, model)


def test_a_cache_of_a_chat(folder: Path, model: Model) -> None:
    ids = kvcli.prefill(TEXT, model).ids.tolist()
    cache = filled(network(folder, "sdpa"), ids)
    snapshot = kvcli.from_cache(cache, ids, model, chat=True)
    assert snapshot.meta == kvcli.prefill(TEXT, model).meta and "assistant" in snapshot.meta.seq.tail
    with pytest.raises(UsageError, match="template"):
        kvcli.from_cache(filled(network(folder, "sdpa"), IDS), IDS, model, chat=True)


def test_windows_in_caches(tmp_path: Path) -> None:
    model = kvcli.load(build("gemma3_text", tmp_path), dtype="float32")
    net = network(tmp_path, "eager")
    with pytest.raises(InfeasibleError, match="window"):
        kvcli.from_cache(filled(net, IDS[:90]), IDS[:90], model)
    assert kvcli.from_cache(filled(net, IDS[:20]), IDS[:20], model).meta == kvcli.prefill(IDS[:20], model).meta


def test_importing_it_is_light_and_shows_what_there_is() -> None:
    code = (
        "import sys, kvcli; names = dir(kvcli); assert {*kvcli.__all__} <= {*names}; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert all(getattr(kvcli, name) is not None for name in kvcli.__all__)
    with pytest.raises(AttributeError, match="prefil"):
        kvcli.prefil  # noqa: B018
    assert (Path(kvcli.__file__).parent / "py.typed").is_file()


def test_no_warning_without_a_reason(model: Model) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kvcli.prefill(TEXT, model)
