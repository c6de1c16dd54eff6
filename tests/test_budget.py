"""Budgets: what they mean, and that sharing out is exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcli.budget import Budget, largest, share_out
from kvcli.errors import InfeasibleError, UsageError


@pytest.mark.parametrize(
    ("text", "N", "expected"),
    [
        ("0.29", 100, 29),
        ("29%", 100, 29),
        ("12.5%", 80, 10),
        ("0.35", 1001, 350),
        ("512", 4000, 512),
        ("512", 100, 100),
    ],
)
def test_entries_a_head(text: str, N: int, expected: int) -> None:
    assert Budget.parse(text).per_head(N, 6, lambda n: n) == expected


@pytest.mark.parametrize("text", ["0", "1", "101%", "1.5", "-5", "nan", "text", "", "0%", "0.0", "0MiB", "5e-1", "%"])
def test_absurd_budgets_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Budget.parse(text)


def test_bytes_are_the_largest_that_fits() -> None:
    budget = Budget.parse("1KiB")
    assert budget.per_head(1000, 6, lambda n: 100 + 10 * n) == 92
    with pytest.raises(InfeasibleError, match="no entry"):
        budget.per_head(1000, 6, lambda n: 2000 + n)
    assert Budget.parse("1.5 MB").bytes == 1_500_000


def test_too_small_a_share_names_the_smallest() -> None:
    with pytest.raises(InfeasibleError) as caught:
        Budget.parse("1%").per_head(50, 6, lambda n: n)
    assert "2%" in caught.value.fix


@given(limit=st.integers(0, 2000), most=st.integers(0, 300), slope=st.integers(1, 9))
def test_largest_is_exact(limit: int, most: int, slope: int) -> None:
    assert largest(limit, most, lambda n: slope * n) == min(most, limit // slope)


@settings(deadline=None)
@given(data=st.data())
def test_share_out_is_exact_and_within_bounds(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 12))
    low = torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=size, max_size=size)))
    high = low + torch.tensor(data.draw(st.lists(st.integers(0, 20), min_size=size, max_size=size)))
    want = torch.tensor(data.draw(st.lists(st.floats(0, 30), min_size=size, max_size=size)))
    total = data.draw(st.integers(int(low.sum()), int(high.sum())))
    count = share_out(want, total, low, high)
    assert int(count.sum()) == total
    assert bool((count >= low).all() and (count <= high).all())


def test_share_out_uses_largest_remainder_and_lower_index() -> None:
    low, high = torch.zeros(4), torch.full((4,), 9)
    assert share_out(torch.tensor([1.5, 1.5, 1.5, 1.5]), 6, low, high).tolist() == [2, 2, 1, 1]
    assert share_out(torch.tensor([4.6, 1.4, 0.0, 0.0]), 6, low, high).tolist() == [5, 1, 0, 0]
    with pytest.raises(InfeasibleError):
        share_out(torch.ones(4), 37, low, high)
