"""The paper's benchmarks as tasks of lm-evaluation-harness 0.4.13, and the suites made from them.

The paper (Section 6) names its benchmarks and gives no number of examples, metric or harness. Numbers of examples are
those that the benchmark or the harness is usually run with; where neither has one, the choice is ours and says so.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """A benchmark and how the harness runs it.

    Args:
        name: the paper's name.
        task: the harness' name of the task or group; None if it has none.
        num_fewshot: examples in the prompt.
        metrics: names of the harness' metrics; the first is averaged.
        filter: the harness' filter of the answers.
        source: where the number of examples comes from.
        missing: why it cannot be run.
    """

    name: str
    task: str | None = None
    num_fewshot: int = 0
    metrics: tuple[str, ...] = ("acc",)
    filter: str = "none"
    source: str = ""
    missing: str = ""


_HARNESS = "the harness' default"
_BENCHMARK = "the benchmark's own"

PAPER = (
    Benchmark("MMLU", "mmlu", 5, source=_BENCHMARK),
    Benchmark("MMLU-Pro", "mmlu_pro", 5, ("exact_match",), "custom-extract", source=_HARNESS),
    # The test split's answers are not public.
    Benchmark("C-Eval", "ceval-valid", 5, source=_BENCHMARK),
    Benchmark("Xiezhi", missing="not in lm-evaluation-harness 0.4.13"),
    Benchmark("LAMBADA", "lambada_openai", 0, source=_HARNESS),
    Benchmark("BBH", "bbh", 3, ("exact_match",), "get-answer", source=_HARNESS + ", chain of thought"),
    Benchmark("ARC-Challenge", "arc_challenge", 25, ("acc_norm",), source="the Open LLM Leaderboard's"),
    Benchmark("CommonsenseQA", "commonsense_qa", 7, source="ours, as in reports of base models"),
    Benchmark("Balanced COPA", missing="not in lm-evaluation-harness 0.4.13; its `copa` is the unbalanced original"),
    Benchmark("C3", missing="not in lm-evaluation-harness 0.4.13"),
    # The harness knows no split for examples.
    Benchmark("AGIEval", "agieval", 0, source=_HARNESS),
    Benchmark("GSM8k", "gsm8k", 5, ("exact_match",), "strict-match", source=_HARNESS),
    Benchmark("LCBench", missing="not in lm-evaluation-harness 0.4.13; it runs generated code"),
)

# Benchmarks that the paper averages for its dense models (Table 2) and its ablations (Tables 3, 7, 8).
DENSE = ("MMLU", "C-Eval", "BBH", "ARC-Challenge", "C3", "AGIEval", "LCBench")
ABLATIONS = ("MMLU", "MMLU-Pro", "CommonsenseQA", "BBH", "LCBench")

# Those that need one forward pass per answer and few documents.
QUICK = tuple(bench for bench in PAPER if bench.name in ("LAMBADA", "ARC-Challenge", "CommonsenseQA"))

LOCAL = (
    Benchmark("continuation", "local_continuation", 0, ("acc", "acc_norm"), source="ours"),
    Benchmark("text", "local_perplexity", 0, ("bits_per_byte", "byte_perplexity", "word_perplexity"), source="ours"),
)

BENCHMARKS = {"paper": PAPER, "quick": QUICK, "local": LOCAL}
SUITES = (*BENCHMARKS, "mteb")
