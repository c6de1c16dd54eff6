"""All ops, for tests and benchmarks."""

from .adjacent import adjacent_cosine
from .attention import causal_attention, ragged_attention
from .banded import banded_attention
from .dense import dense_attention
from .error import output_error
from .mass import attention_mass
from .nearest import nearest_key
from .op import Op
from .packed import packed_attention
from .peak import attention_peak
from .runs import merge_runs
from .take import take_rows
from .window import window_scores

OPS: tuple[Op, ...] = (
    adjacent_cosine,
    attention_mass,
    attention_peak,
    banded_attention,
    causal_attention,
    dense_attention,
    merge_runs,
    nearest_key,
    output_error,
    packed_attention,
    ragged_attention,
    take_rows,
    window_scores,
)
