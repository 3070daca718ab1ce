"""Text sources, and the mixtures of them that a train config can name.

    [dataloader]
    mixture = "paper_like"

Every source is open, needs no account and loads without remote code. Imports no torch.
"""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True, frozen=True)
class TextSource:
    """One data set of a mixture and its share."""

    dataset: str = "json"
    """``json`` (JSON lines, also gzipped, and ``.txt``) or ``parquet`` for local files, ``tokens`` for a folder that
    scripts/tokenize_data.py made, else a Hugging Face dataset ``owner/name``."""

    weight: float = 1.0
    """Share of the packed sequences, hence of the tokens, relative to the other sources."""

    dataset_path: str | None = None
    """File, folder or pattern of local files, or a folder of tokens."""

    text_field: str | list[str] = "text"
    """Field of a document that holds its text; of several fields the texts are joined by an empty line."""

    subset: str | None = None
    """Configuration of a Hugging Face dataset, for example ``en`` of allenai/c4."""

    split: str = "train"
    """Split of a Hugging Face dataset."""

    streaming: bool | None = None
    """Read on the fly instead of preparing an indexed copy first. Default: Hugging Face datasets yes, local
    files no."""


# ODC-By 1.0. Common Crawl of April 2019, cleaned; published as gzipped JSON lines.
C4 = TextSource(dataset="allenai/c4", subset="en")
C4_VALIDATION = TextSource(dataset="allenai/c4", subset="en", split="validation")

# ODC-By 1.0. Educational web pages, a sample of 350B tokens (GPT-2's); published as parquet.
FINEWEB_EDU = TextSource(dataset="HuggingFaceFW/fineweb-edu", subset="sample-350BT")

# The paper names five kinds of text and neither sources nor proportions (Section 4): both are ours.
# The weights follow the sizes, so that 330B tokens, the longest run of the paper, read no source
# much more than once: 34B tokens of FineMath-3+ are a tenth of them.
PAPER_LIKE = [
    TextSource(weight=0.50, dataset="HuggingFaceFW/fineweb-edu", subset="sample-350BT"),
    # ODC-By 1.0. Chinese web pages of FineWeb2.
    TextSource(weight=0.20, dataset="HuggingFaceFW/fineweb-2", subset="cmn_Hani"),
    # Openly licensed code only, the licence of each file in its metadata; educational subset of the Stack v2.
    TextSource(weight=0.15, dataset="common-pile/stackv2_edu_filtered"),
    # ODC-By 1.0. Mathematical web pages.
    TextSource(weight=0.10, dataset="HuggingFaceTB/finemath", subset="finemath-3plus"),
    # CC BY 4.0. Competition problems with chains of thought; `cot` is the split's name.
    TextSource(
        weight=0.05,
        dataset="nvidia/OpenMathReasoning",
        split="cot",
        text_field=["problem", "generated_solution"],
    ),
]

MIXTURES: dict[str, list[TextSource]] = {
    "c4": [C4],
    "c4_validation": [C4_VALIDATION],
    "fineweb_edu": [FINEWEB_EDU],
    "paper_like": PAPER_LIKE,
}
