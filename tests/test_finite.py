"""Numbers that are not finite are named wherever a command meets them, and prefill never writes them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from make import make_snapshot
from tiny import tiny_model
from torch import nn

from kvcli.cli import run
from kvcli.errors import KvError
from kvcli.model import observed
from kvcli.model.load import load
from kvcli.model.observe import prefill
from kvcli.snapshot import Stats
from kvcli.storage import Reader, write_snapshot

STATS = ("q_last", "q_probe", "attn_mass", "value_norm")
LINES = ("verify nan", "compress nan -m random -b 50% -o x", "diff nan nan")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", [*STATS, "stat.final_hidden"])
def test_statistics_that_are_not_finite_are_damage(
    name: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    full = make_snapshot()
    part = full.extra[name] if name in full.extra else getattr(full.stats[1], name)
    part.view(-1)[-2] = value
    write_snapshot(full, Path("nan"))
    where = f"tensor {name}" if name in full.extra else f"layer 1: {name}"
    for line in LINES:
        assert run(line.split()) == 4
        assert f"{where} holds NaN or infinity" in capsys.readouterr().err and not Path("x").exists()


def test_a_sink_that_is_switched_off_is_no_damage(tmp_path: Path) -> None:
    full = make_snapshot()
    off = torch.full((full.meta.layout.q_heads,), -torch.inf)
    write_snapshot(replace(full, stats=[replace(stats, sink_logit=off) for stats in full.stats]), tmp_path / "a")
    with Reader(tmp_path / "a") as reader:
        found: Stats = reader.stats(1)
    assert found.sink_logit is not None and torch.equal(found.sink_logit, off)


def test_prefill_writes_no_statistic_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, own = load(str(tiny_model(tmp_path)), dtype="float32"), observed.value_norm

    def overflown(v: torch.Tensor, weight: nn.Parameter, q_heads: int) -> torch.Tensor:
        return own(v, weight, q_heads) / 0.0

    monkeypatch.setattr(observed, "value_norm", overflown)
    with pytest.raises(KvError, match="NaN or infinity in layer 0"):
        prefill(model, [5, 6, 7, 8], (0, "", False))
