"""How an answer is scored: a number in [0, 1] by metric name; the field's own libraries where it has them."""

import re
import string
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

from ..errors import InfeasibleError
from .task import Question

Score = Callable[[str, Question], float]

# Whole words and whole numbers: 48 is not in "148", "48.5" or "48,000". Scripts that put no space between words have no
# such edges: Thai to Khmer, kana, Chinese, Korean, whose particles join their nouns.
_LETTER = r"[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]"
_WHOLE = rf"(?<!{_LETTER})(?<!\d[.,:]){{}}(?!{_LETTER}|[.,:]\d)"
# What LongBench's metrics.py leaves out of Chinese words.
_PUNCTUATION = {
    *string.punctuation,
    *"！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、",  # noqa: RUF001
    *"〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏",  # noqa: RUF001
}


def label(metric: str) -> str:
    """The name a metric is reported under: one for all that differ only in how they cut the texts."""
    return "hit" if metric == "matched" else metric.removesuffix("_zh").removesuffix("_line")


def hit(text: str, answer: str | Sequence[str]) -> bool:
    """True if an accepted answer stands in the text as whole words or whole numbers, whatever its case."""
    answers = [answer] if isinstance(answer, str) else answer
    return any(re.search(_WHOLE.format(re.escape(a.strip().casefold())), text.casefold()) for a in answers)


def matched(text: str, question: Question) -> float:
    """The share of the expected strings that occur in the text, whatever their case (RULER's string_match_all)."""
    found = [answer.lower() in text.lower() for answer in question.answer]
    return sum(found) / max(1, len(found))


def em(text: str, answer: str) -> float:
    """Whether the two are equal without case, punctuation and articles (SQuAD)."""
    return float(_normal(text) == _normal(answer))


def f1(text: str, answer: str) -> float:
    """F1 of the words in common, without case, punctuation and articles (SQuAD)."""
    return _overlap(_normal(text).split(), _normal(answer).split())


def f1_zh(text: str, answer: str) -> float:
    """The same for Chinese, cut into words by jieba."""
    said, wanted = (["".join(_stripped(word).split()) for word in _words(one)] for one in (text, answer))
    return _overlap([word for word in said if word], [word for word in wanted if word])


def rouge(text: str, answer: str) -> float:
    """F1 of ROUGE-L by the package `rouge`, which LongBench uses; 0 for a text without a word."""
    if not text.strip(".") or not answer.strip("."):
        return 0.0
    scorer = _library("rouge").Rouge(metrics=["rouge-l"])
    with _recursion(len(text.split()) + len(answer.split())):
        return float(scorer.get_scores(text, answer)[0]["rouge-l"]["f"])


def rouge_zh(text: str, answer: str) -> float:
    """The same for Chinese, cut into words by jieba."""
    return rouge(" ".join(_words(text)), " ".join(_words(answer)))


def rouge_of(kind: str) -> Score:
    """F1 of `rouge1`, `rouge2` or `rougeL` by the package `rouge-score`, without stemming (SCROLLS, ZeroSCROLLS)."""

    def score(text: str, answer: str) -> float:
        scorer = _library("rouge_score.rouge_scorer").RougeScorer([kind], use_stemmer=False)
        return float(scorer.score(answer, text)[kind].fmeasure)

    return best(score)


def rouge_gm(text: str, question: Question) -> float:
    """The geometric mean of ROUGE-1, ROUGE-2 and ROUGE-L, each with the reference that suits it best.

    Of one answer: ZeroSCROLLS publishes the geometric mean of the three means over all answers, which is no smaller.
    """
    product = 1.0
    for kind in ("rouge1", "rouge2", "rougeL"):
        product *= SCORES[kind](text, question)
    return float(product ** (1 / 3))


def classification(text: str, question: Question) -> float:
    """1 / the number of classes named in the first line if the right one is among them, else 0 (LongBench).

    A class whose name is a part of the right one's does not count.
    """
    named = [name for name in question.classes if name in _first_line(text)]

    def share(answer: str) -> float:
        left, i = list(named), 0
        while i < len(left):  # as published: behind a class that is left out, the next one is passed over
            if left[i] in answer and left[i] != answer:
                del left[i]
            i += 1
        return 1 / len(left) if answer in left else 0.0

    return max(map(share, question.answer), default=0.0)


def retrieval(text: str, answer: str) -> float:
    """The share of the numbers in the text that are the right paragraph's, in English or Chinese (LongBench)."""
    right = re.search(r"(?:Paragraph |段落)(\d+)", answer)
    return count(text, right[1]) if right else 0.0


def count(text: str, answer: str) -> float:
    """The share of the numbers in the text that are the right one (LongBench)."""
    numbers = re.findall(r"\d+", text)
    return numbers.count(answer) / max(1, len(numbers))


def code_sim(text: str, answer: str) -> float:
    """Likeness of the first line that holds code, in whole percent (LongBench's fuzz.ratio, by rapidfuzz)."""
    lines = text.lstrip("\n").split("\n")
    code = next((line for line in lines if not re.search("[`#]|//", line)), "")
    return float(round(_library("rapidfuzz.fuzz").ratio(code, answer)) / 100)


def accuracy(text: str, answer: str) -> float:
    """Whether the first letter from A to D that stands alone is the right one (ZeroSCROLLS)."""
    said, right = (re.search(r"\b[A-D]\b", one) for one in (text, answer))
    return float(said is not None and right is not None and said[0] == right[0])


def exp_similarity(text: str, answer: str) -> float:
    """1 for the right percentage, half as much for each 10 points it is off (ZeroSCROLLS)."""
    said, right = (re.search(r"(\d+\.?\d*)%", one) for one in (text, answer))
    return float(0.5 ** (abs(float(said[1]) - float(right[1])) / 10)) if said and right else 0.0


def concordance(text: str, answer: str) -> float:
    """The share of pairs in the right order, 0 unless the text names exactly the right numbers (ZeroSCROLLS)."""
    said, right = (_numbers(one) for one in (text, answer))
    if not said or sorted(said) != sorted(right):
        return 0.0
    place = {number: i for i, number in enumerate(said)}
    ordered = [place[a] < place[b] for i, a in enumerate(right) for b in right[i + 1 :]]
    return sum(ordered) / len(ordered) if ordered else 1.0


def _first_line(text: str) -> str:
    return text.lstrip("\n").split("\n")[0]


def best(score: Callable[[str, str], float], of: Callable[[str], str] = str) -> Score:
    """The score against the accepted answer that suits the text best; `of` is the part of the text that is judged."""
    return lambda text, question: max((score(of(text), answer) for answer in question.answer), default=0.0)


SCORES: dict[str, Score] = {
    "hit": lambda text, question: float(hit(text, question.answer)),
    "matched": matched,
    "em": best(em),
    "f1": best(f1),
    "f1_line": best(f1, _first_line),
    "f1_zh": best(f1_zh),
    "rouge": best(rouge),
    "rouge_line": best(rouge, _first_line),
    "rouge_zh": best(rouge_zh),
    "rouge1": rouge_of("rouge1"),
    "rouge2": rouge_of("rouge2"),
    "rougeL": rouge_of("rougeL"),
    "rouge_gm": rouge_gm,
    "classification": classification,
    "retrieval": best(retrieval),
    "count": best(count),
    "code_sim": best(code_sim),
    "accuracy": best(accuracy),
    "exp_similarity": best(exp_similarity),
    "concordance": best(concordance),
}


def _normal(text: str) -> str:
    bare = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _stripped(word: str) -> str:
    return "".join(char for char in word.lower() if char not in _PUNCTUATION)


def _overlap(said: list[str], wanted: list[str]) -> float:
    same = (Counter(said) & Counter(wanted)).total()
    return 2 * same / (len(said) + len(wanted)) if same else 0.0


def _numbers(text: str) -> list[str]:
    kept = re.sub(r"[^0-9\s,]", "", text).replace(",", " ")
    return [number.lstrip("0") for number in kept.split()]


def _words(text: str) -> list[str]:
    return list(_cutter().cut(text))


@cache
def _cutter() -> Any:
    # By itself jieba logs to stderr, and unmarshals a file that any user may have put into the temporary folder.
    cutter = _library("jieba").Tokenizer()
    cutter.FREQ, cutter.total = cutter.gen_pfdict(cutter.get_dict_file())
    cutter.initialized = True
    return cutter


def _library(name: str) -> Any:
    """A metric library, loaded without the warnings of its sources; raises InfeasibleError where it is missing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module(name)
    except ImportError as cause:
        why = f"the library {name.split('.')[0]} is not installed"
        raise InfeasibleError("the answers cannot be scored", why, "pip install 'kvcli[eval]'") from cause


@contextmanager
def _recursion(depth: int) -> Iterator[None]:
    """Room for `depth` calls: `rouge` makes one a word, and an answer that repeats itself has no end of sentence."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(before + depth)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)
