"""Files of released formats stay readable, to the last bit."""

from pathlib import Path

import pytest
import torch
from xxhash import xxh3_64_hexdigest

from kvcli.errors import FormatError
from kvcli.storage import Reader, write_snapshot

GOLDEN = Path(__file__).parent.parent / "samples/golden-1.0.kv.safetensors"
LENS = [[21, 15], [16, 20]]
KV = ["1f079e484195cc08db479e0bb5eec25b", "145c94fe0634c1e86efcb430dc759e92"]
PARTS = ("38f46c8c83dd49f6", "dd05981c240e2d79", "2a2a69d3e92ffbd5")
STATS = ["q_last", "q_last_pos", "q_probe", "q_probe_pos", "attn_mass", "value_norm"]


def checksum(tensor: torch.Tensor) -> str:
    return xxh3_64_hexdigest(tensor.contiguous().view(torch.uint8).numpy().tobytes())


def test_format_1_0_is_read_as_it_was_written() -> None:
    snapshot = Reader(GOLDEN).snapshot()
    assert snapshot.meta.seq.tokens == 47 and snapshot.meta.requires == ("bias", "ragged", "span")
    assert [step["recipe"] for step in snapshot.meta.history] == ["kvmerger+adakv"]
    assert [rows.lens.tolist() for rows in snapshot.rows] == LENS
    assert [checksum(rows.k) + checksum(rows.v) for rows in snapshot.rows] == KV
    rows = snapshot.rows[1]
    assert rows.bias is not None and rows.span is not None
    assert (checksum(rows.pos), checksum(rows.bias), checksum(rows.span)) == PARTS
    assert snapshot.stats[0].present().keys() == set(STATS)


def test_format_1_0_is_written_byte_for_byte(tmp_path: Path) -> None:
    again = tmp_path / "again"
    write_snapshot(Reader(GOLDEN).snapshot(), again)
    assert again.read_bytes() == GOLDEN.read_bytes()


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_a_cut_golden_file_is_refused(cut: int, tmp_path: Path) -> None:
    (tmp_path / "cut").write_bytes(GOLDEN.read_bytes()[:cut])
    with pytest.raises(FormatError):
        Reader(tmp_path / "cut")
