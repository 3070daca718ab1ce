"""Suite ``mteb``: the frozen model's states as text embeddings, the paper's tasks and protocol (App. E).

A text's embedding is the mean of its tokens' last hidden states, after the final norm, divided by its length. Nothing
is trained but what a task itself fits, such as the classifier of a classification task.
"""

from collections.abc import Sequence
from functools import cache, partial
from importlib.metadata import version

import torch
from torch import Tensor
from tqdm import tqdm

from nitp_titan.errors import nearest_choice, UserError
from nitp_titan.evaluation.models import LoadedModel
from nitp_titan.evaluation.plan import (
    Average,
    Plan,
    Row,
    Task,
)
from nitp_titan.evaluation.pretrained import require
from nitp_titan.evaluation.scores import Score
from nitp_titan.machine.failures import explained

# App. E, Table 6, which names tasks and groups.
GROUPS = {
    "classification": (
        "AmazonCounterfactualClassification",
        "AmazonReviewsClassification",
        "Banking77Classification",
        "EmotionClassification",
        "MTOPDomainClassification",
        "MTOPIntentClassification",
        "MassiveIntentClassification",
        "MassiveScenarioClassification",
        "ToxicConversationsClassification",
        "TweetSentimentExtractionClassification",
    ),
    "STS": ("BIOSSES", "SICK-R", "STS12", "STS13", "STS14", "STS15", "STS16", "STS17", "STSBenchmark"),
    "retrieval and duplicates": (
        "AskUbuntuDupQuestions",
        "SciDocsRR",
        "SprintDuplicateQuestions",
        "StackOverflowDupQuestions",
        "TwitterSemEval2015",
        "TwitterURLCorpus",
    ),
}
TASKS = tuple(name for names in GROUPS.values() for name in names)
# Longer texts are cut, as is usual for MTEB; the paper gives no length.
MAX_LENGTH = 512


def plan(names: Sequence[str]) -> Plan:
    """Tasks and rows of the suite.

    Args:
        names: tasks of the suite to run; all if empty.

    Raises:
        UserError: if a name is not in the suite.
    """
    require("mteb")
    for name in names:
        if name not in TASKS:
            raise UserError(f"--tasks {name}: the suite 'mteb' has no such task.{nearest_choice(name, [*TASKS])}")
    chosen = [name for name in TASKS if not names or name in names]
    settings = {"mteb": version("mteb"), "max_length": MAX_LENGTH}
    averages = [Average("mteb", group, members) for group, members in GROUPS.items()]
    note = (
        "MTEB on frozen states: the paper's 25 English tasks and groups (App. E, Table 6, with MTEB 2.12.0). Mean of "
        f"the last hidden states of at most {MAX_LENGTH} tokens (our choice, the paper gives no length), "
        "L2-normalised, no prompt. MTEB gives no standard errors."
    )
    return Plan(
        tasks=[Task(name, settings, partial(run, name), online=True) for name in chosen],
        rows=[Row("mteb", name, task_of(name).metadata.main_score, _group(name), (name,)) for name in chosen],
        averages=[*averages, Average("mteb", "all 25", TASKS)],
        notes=[note],
        versions=["mteb"],
    )


def _group(name: str) -> str:
    return next(group for group, members in GROUPS.items() if name in members)


@cache
def _benchmark() -> dict:
    import mteb

    return {task.metadata.name: task for task in mteb.get_benchmark("MTEB(eng, v1)").tasks}


def task_of(name: str):
    """The task as MTEB(eng, v1) has it: its English subset and test split. Reads no data."""
    return _benchmark()[name]


def run(name: str, loaded: LoadedModel) -> dict[str, Score]:
    """A model's score on a task by the task's main metric, from 0 to 1.

    Raises:
        UserError: if the task's data cannot be loaded.
    """
    task = task_of(name)
    try:
        task.load_data()
    except Exception as error:
        # Datasets, the hub and the network raise many types; each means that the task's data is not there.
        raise explained(error, "its data", "its data cannot be loaded") from error
    try:
        return {task.metadata.main_score: evaluate_task(task, loaded)}
    finally:
        task.unload_data()


def evaluate_task(task, loaded: LoadedModel) -> Score:
    """Main score of a model on an MTEB task whose data are loaded."""
    import mteb

    result = mteb.evaluate(
        Encoder(loaded),
        task,
        co2_tracker=False,
        cache=None,
        encode_kwargs={"batch_size": loaded.batch_size},
        show_progress_bar=False,
    )
    return Score(value=float(result.task_results[0].get_score()), stderr=None, size=1)


class Encoder:
    """MTEB's view of a frozen language model (its `EncoderProtocol`)."""

    def __init__(self, loaded: LoadedModel):
        from mteb.models.model_meta import ModelMeta

        self.loaded = loaded
        self.mteb_model_meta = ModelMeta.create_empty(overwrites={"name": "frozen/states"})

    def encode(self, inputs, *, task_metadata, hf_split, hf_subset, prompt_type=None, **kwargs) -> Tensor:
        """Embeddings of all texts of a loader of batches, [texts, dim], float32, unit length, on the CPU."""
        texts = [text for batch in inputs for text in batch["text"]]
        return self.embed(texts, name=task_metadata.name)

    def embed(self, texts: Sequence[str], name: str = "texts") -> Tensor:
        """Embeddings of texts in their order, [texts, dim], float32, unit length, on the CPU."""
        # Texts of one length together waste no work on padding; the longest first shows at once if memory is short.
        order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
        size = self.loaded.batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        bar = tqdm(batches, desc=name, unit=" batches", mininterval=1.0)
        parts = [self._embed_batch([texts[index] for index in batch]) for batch in bar]
        embeddings_ND = torch.cat(parts)
        return embeddings_ND[torch.tensor(order).argsort()]

    @torch.no_grad()
    def _embed_batch(self, texts: list[str]) -> Tensor:
        tokens_BL, mask_BL = self._tokenize(texts)
        model = self.loaded.model
        states_BLD = model.base_model(
            input_ids=tokens_BL.to(model.device), attention_mask=mask_BL.to(model.device), use_cache=False
        ).last_hidden_state
        # Of a model that is spread, the last device.
        weights_BL1 = mask_BL.to(states_BLD.device)[..., None].float()
        # An empty text has no token; its embedding is zero.
        mean_BD = (states_BLD.float() * weights_BL1).sum(1) / weights_BL1.sum(1).clamp(min=1)
        return torch.nn.functional.normalize(mean_BD, dim=-1).cpu()

    def _tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Tokens and mask, [texts, longest], padded on the right, where causal attention does not look."""
        limit = min(MAX_LENGTH, getattr(self.loaded.model.config, "max_position_embeddings", None) or MAX_LENGTH)
        rows = self.loaded.tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
        longest = max(1, *(len(row) for row in rows)) if rows else 1
        tokens_BL, mask_BL = torch.zeros(2, len(rows), longest, dtype=torch.long)
        for index, row in enumerate(rows):
            tokens_BL[index, : len(row)] = torch.tensor(row, dtype=torch.long)
            mask_BL[index, : len(row)] = 1
        return tokens_BL, mask_BL

    def similarity(self, embeddings1: Tensor, embeddings2: Tensor) -> Tensor:
        """Cosine of every pair, [first, second]."""
        from mteb.similarity_functions import cos_sim

        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Tensor, embeddings2: Tensor) -> Tensor:
        """Cosine of embeddings of the same index, [pairs]."""
        from mteb.similarity_functions import pairwise_cos_sim

        return pairwise_cos_sim(embeddings1, embeddings2)
