"""Evaluation on a tiny model: anchors, laws at 100 %, numbers against a forward pass written out, logs and errors."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from kvcli.errors import InfeasibleError, MismatchError, UsageError
from kvcli.evaluate import FULL, NONE, Grid, Unit, Work, digest, evaluate, lines, logged
from kvcli.model.load import Model
from kvcli.model.text import document_ids
from kvcli.recipe import grid
from kvcli.tally import rows
from kvcli.tasks.task import Case, Question
from kvcli.trial import HELD, Reading, read_text

TEXT = "The ferry sailed at six and came back at nine. " * 5
ASKED = (Question("When?", "It sailed at", ("six",), n=6), Question("Who?", "", ("x", "y"), ("hit", "f1"), n=4))
QUESTIONS = Case("q", "d", TEXT, ASKED)
HELD_OUT = Case("ppl", "d", TEXT, hold_out=True)


def work(model: Model, case: Case, how: Reading | None = None) -> Work:
    return Work(case, partial(read_text, model, case, how or Reading(), warn=lambda text: None))


def measured(model: Model, cases: list[Case], methods: list[str], budgets: list[str], **options: object) -> list[Unit]:
    plan = Grid(grid(methods, budgets) if methods else (), **options)  # type: ignore[arg-type]
    return list(evaluate(model, [work(model, case) for case in cases], plan))


def values(units: list[Unit], name: tuple[str, str]) -> list[dict[str, list[float]]]:
    return [sample["values"] for unit in units for sample in unit.samples if unit.key[2:] == name]


def test_everything_is_measured_in_order_and_the_same_again(model: Model) -> None:
    units = measured(model, [QUESTIONS, HELD_OUT], ["h2o,random", "kvmerger:epsilon=0.9"], ["50%,8"])
    names = [FULL, NONE, ("h2o", "50%"), ("h2o", "8"), ("random", "50%"), ("random", "8"), ("kvmerger:epsilon=0.9", "")]
    assert [unit.key for unit in units] == [(case, "d", *name) for case in ("q", "ppl") for name in names]
    assert not any(unit.error for unit in units)
    assert [len(unit.samples) for unit in units] == [2] * 7 + [1] * 7
    assert rows(units) == rows(
        measured(model, [QUESTIONS, HELD_OUT], ["h2o,random", "kvmerger:epsilon=0.9"], ["50%,8"])
    )


@pytest.mark.parametrize("method", ["snapkv+adakv", "kvmerger", "random"])
def test_at_100_percent_nothing_is_lost(model: Model, method: str) -> None:
    units = measured(model, [QUESTIONS, HELD_OUT], [method], ["100%"])
    assert values(units, (method, "100%")) == values(units, FULL)
    for each in values(units, FULL):
        assert max(map(abs, each["kl"])) < 1e-6 and set(each["top1"]) == {1.0}


def test_less_costs_more(model: Model) -> None:
    units = measured(model, [HELD_OUT], ["streamingllm"], ["90%", "10%"])
    kl = [sum(values(units, name)[0]["kl"]) for name in (FULL, ("streamingllm", "90%"), ("streamingllm", "10%"), NONE)]
    assert kl == sorted(kl) and kl[1] > 1e-6
    sizes = [unit.bytes for unit in units]
    assert sizes[0] > sizes[2] > sizes[3] > sizes[1] == 0
    assert units[2].keep == pytest.approx(0.9, abs=0.02)


@torch.inference_mode()
def test_perplexity_and_divergence_against_a_pass_written_out(model: Model, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids, lead, _ = document_ids(model.tokenizer, TEXT, chat=True)
    count = (len(ids) - lead) // 4
    net = AutoModelForCausalLM.from_pretrained(folder).double()
    blank = [*ids[:lead], *model.tokenizer.encode("\n")]

    def expected(before: list[int]) -> torch.Tensor:
        logits = net(torch.tensor([[*before, *ids[-count:]]])).logits[0, len(before) - 1 : -1]
        return logits.log_softmax(-1)

    p, q = expected(ids[:-count]), expected(blank)
    nll = -p.gather(1, torch.tensor(ids[-count:])[:, None])[:, 0]
    units = measured(model, [HELD_OUT], [], [])
    full, none = values(units, FULL)[0], values(units, NONE)[0]
    torch.testing.assert_close(torch.tensor(full["nll"]).double(), nll, rtol=1e-4, atol=1e-4)
    kl = (p.exp() * (p - q)).sum(1)
    torch.testing.assert_close(torch.tensor(none["kl"]).double(), kl, rtol=1e-3, atol=1e-5)
    assert none["top1"] == (p.argmax(1) == q.argmax(1)).double().tolist()
    found = {row["metric"]: row["value"] for row in rows(units) if row["method"] == "full"}
    assert found["ppl"] == pytest.approx(math.exp(float(nll.mean())), rel=1e-4)


def test_long_ends_are_held_out_as_far_as_they_tell(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcli.trial.HELD", 20)
    assert HELD == 512
    assert len(values(measured(model, [HELD_OUT], [], []), FULL)[0]["nll"]) == 20


def test_a_given_continuation(model: Model) -> None:
    units = measured(model, [Case("c", "d", TEXT, continuation="It sailed.")], ["h2o"], ["50%"])
    ids = model.tokenizer.encode("It sailed.")
    assert [len(each["nll"]) for each in values(units, FULL)] == [len(ids)]


def test_what_is_done_is_not_done_again_and_rows_are_equal(model: Model) -> None:
    cases = [QUESTIONS, HELD_OUT]
    units = measured(model, cases, ["h2o,random"], ["50%"])
    written = [json.loads(json.dumps(line)) for unit in units for line in lines(unit)]
    for cut in range(len(written) + 1):
        found = logged(written[:cut])
        assert [unit.key for unit in found] == [unit.key for unit in units[: len(found)]]
    assert rows(found) == rows(units)
    half = logged(written[:5])  # the third unit has two samples, of which one is there
    done = {unit.key for unit in half}
    plan = Grid(grid(["h2o,random"], ["50%"]))
    rest = list(evaluate(model, [work(model, case) for case in cases], plan, done))
    assert rows([*half, *rest]) == rows(units)
    # A unit that was cut short and then measured again counts once.
    assert [unit.key for unit in logged([*written[:5], *written[4:]])] == [unit.key for unit in units]
    assert not list(evaluate(model, [Work(QUESTIONS, lambda: 1 / 0)], Grid(), {("q", "d", *FULL), ("q", "d", *NONE)}))  # type: ignore[arg-type,return-value]


def test_known_questions_are_compressed_for(model: Model) -> None:
    blind, known = (measured(model, [QUESTIONS], ["snapkv"], ["20%"], known=known) for known in (False, True))
    name = ("snapkv", "20%")
    assert len(values(known, name)) == 2 and values(known, name) != values(blind, name)
    assert values(known, FULL) == values(blind, FULL)
    with pytest.raises(UsageError, match="--known"):
        measured(model, [QUESTIONS, HELD_OUT], ["snapkv"], ["20%"], known=True)


def test_what_fails_does_not_stop_the_rest(model: Model) -> None:
    long = Case("q", "long", TEXT * 9, ASKED)
    units = measured(model, [long, QUESTIONS], ["h2o:sink=9,recent=9"], ["50%,4"])
    bad = [unit.key for unit in units if unit.error]
    assert bad == [("q", "long", *name) for name in Grid(grid(["h2o:sink=9,recent=9"], ["50%,4"])).names()] + [
        ("q", "d", "h2o:sink=9,recent=9", "4")
    ]
    assert {type(unit.error) for unit in units if unit.error} == {InfeasibleError}
    good = [unit.key[2:] for unit in units if not unit.error]
    assert good == [FULL, NONE, ("h2o:sink=9,recent=9", "50%")]


@pytest.mark.parametrize("cut", [True, False])
def test_what_is_too_long_can_be_cut(model: Model, cut: bool) -> None:
    told: list[str] = []
    case = Case("q", "d", "".join(f"{i}. " for i in range(400)), ASKED, cut="middle" if cut else "")
    document = read_text(model, case, Reading(truncate=not cut), told.append)
    text = model.tokenizer.decode(document.snapshot.ids)
    room = max(len(trial.ids) + trial.question.n for trial in document.trials if trial.question)
    assert document.prefix.tokens + room == 512 and len(told) == 1
    assert "0. 1. 2. " in text and ("399." in text) == cut and "200. " not in text


def test_a_model_that_breaks_off_is_no_unit(model: Model) -> None:
    def other() -> None:
        raise MismatchError("another model")

    with pytest.raises(ZeroDivisionError):
        list(evaluate(model, [Work(QUESTIONS, lambda: 1 / 0)], Grid()))  # type: ignore[arg-type,return-value]
    found = list(evaluate(model, [Work(QUESTIONS, other)], Grid()))  # type: ignore[arg-type]
    assert [unit.error and unit.error.what for unit in found] == ["another model"] * 2


def test_an_empty_prompt_lets_plain_text_go_on(model: Model) -> None:
    case = Case("q", "d", TEXT, (Question("", "", ("x",), n=3),), raw=True)
    units = measured(model, [case], ["h2o"], ["50%"])
    assert not any(unit.error for unit in units) and len(values(units, FULL)) == 1


def test_a_digest_is_of_what_is_asked_and_not_of_names() -> None:
    def of(case: Case) -> str:
        return digest([Work(case, lambda: 1 / 0)])  # type: ignore[arg-type,return-value]

    assert of(replace(QUESTIONS, name="e")) == of(QUESTIONS)
    assert len({of(QUESTIONS), of(HELD_OUT), of(replace(QUESTIONS, questions=ASKED[:1]))}) == 3
