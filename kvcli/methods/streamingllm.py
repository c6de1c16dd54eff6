"""StreamingLLM: attention sinks and a recent window. The sinks are the pipeline's `sink=`."""

from ..registry import Ask, Scored, Source, score
from ..snapshot import LayerKV, Stats

SOURCE = Source("arXiv:2309.17453", 2023, question=True, checked="worked examples, kvpress")


@score(source=SOURCE)
def streamingllm(kv: LayerKV, stats: Stats, ask: Ask) -> Scored:
    """The first tokens and the newest; everything between is dropped. Positions stay as they were."""
    return Scored(kv.pos.float())
