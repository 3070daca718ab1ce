"""MTEB on frozen states."""

import mteb
import pytest
import torch
from datasets import Dataset, DatasetDict
from hf_models import load, save_llama
from mteb.mocks.mock_tasks.classification import MockClassificationTask
from mteb.mocks.mock_tasks.pair_classification import MockPairClassificationTask
from mteb.mocks.mock_tasks.reranking import MockRerankingTask
from mteb.mocks.mock_tasks.retrieval import MockRetrievalTask
from mteb.mocks.mock_tasks.sts import MockSTSTask
from scipy.stats import spearmanr
from torch.testing import assert_close

from nitp_titan.errors import UserError
from nitp_titan.evaluation import embeddings
from nitp_titan.evaluation.embeddings import (
    Encoder,
    evaluate_task,
    GROUPS,
    TASKS,
)

# Typed from the paper (App. E, Table 6): group, means of NTP and NITP, tasks.
TABLE_6 = [
    (
        "classification",
        (40.09, 42.29),
        "AmazonCounterfactualClassification AmazonReviewsClassification Banking77Classification EmotionClassification "
        "MTOPDomainClassification MTOPIntentClassification MassiveIntentClassification MassiveScenarioClassification "
        "ToxicConversationsClassification TweetSentimentExtractionClassification",
    ),
    ("STS", (35.66, 38.58), "BIOSSES SICK-R STS12 STS13 STS14 STS15 STS16 STS17 STSBenchmark"),
    (
        "retrieval and duplicates",
        (43.19, 44.83),
        "AskUbuntuDupQuestions SciDocsRR SprintDuplicateQuestions StackOverflowDupQuestions TwitterSemEval2015 "
        "TwitterURLCorpus",
    ),
]
ALL_25 = (39.24, 41.56)

TEXTS = [
    "def f(x):",
    "a longer text about the standard library of Python, its modules and classes",
    "import os",
]


@pytest.fixture(scope="module")
def loaded(assets, tmp_path_factory):
    return load(save_llama(tmp_path_factory.mktemp("models") / "llama", assets, seed=0), batch_size=2)


def _by_hand(loaded, text: str) -> torch.Tensor:
    tokens = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states = loaded.model(tokens, output_hidden_states=True).hidden_states[-1][0]
    return torch.nn.functional.normalize(states.mean(0), dim=0)


def test_an_embedding_is_the_mean_of_the_last_states_in_the_order_of_the_texts(loaded):
    found = Encoder(loaded).embed(TEXTS)
    assert_close(found, torch.stack([_by_hand(loaded, text) for text in TEXTS]))
    assert_close(found.norm(dim=-1), torch.ones(len(TEXTS)))


def test_the_states_are_those_after_the_final_norm(loaded):
    before = loaded.model.model.norm.weight.data.clone()
    loaded.model.model.norm.weight.data[0] = 50.0
    found = Encoder(loaded).embed(TEXTS[:1])
    loaded.model.model.norm.weight.data.copy_(before)
    assert found[0].abs().argmax() == 0 and found[0, 0].abs() > 0.9


def test_padding_changes_nothing(loaded):
    encoder = Encoder(loaded)
    tokens_BL, mask_BL = encoder._tokenize(TEXTS)
    assert mask_BL.sum(1).tolist() == [len(loaded.tokenizer(text)["input_ids"]) for text in TEXTS]
    assert (mask_BL.diff(dim=1) <= 0).all()
    assert_close(encoder._embed_batch(TEXTS), torch.cat([encoder._embed_batch([text]) for text in TEXTS]))


def test_long_texts_are_cut_and_empty_ones_are_finite(loaded, monkeypatch):
    monkeypatch.setattr(embeddings, "MAX_LENGTH", 7)
    encoder = Encoder(loaded)
    tokens_BL, mask_BL = encoder._tokenize(["x " * 100, ""])
    assert mask_BL.shape == (2, 7)
    assert encoder.embed(["", "x"]).isfinite().all()


def test_tasks_and_groups_are_those_of_the_papers_table():
    assert {group: " ".join(sorted(names)) for group, names in GROUPS.items()} == {
        group: " ".join(sorted(names.split())) for group, _, names in TABLE_6
    }
    assert [len(names) for names in GROUPS.values()] == [10, 9, 6] and len(set(TASKS)) == 25
    for variant, mean in enumerate(ALL_25):
        assert abs(sum(len(GROUPS[group]) * means[variant] for group, means, _ in TABLE_6) / 25 - mean) <= 0.01
    (note,) = embeddings.plan([]).notes
    assert "the paper's 25 English tasks" in note and [average.name for average in embeddings.plan([]).averages] == [
        *GROUPS,
        "all 25",
    ]


def test_every_task_is_english_and_in_its_group_of_mteb():
    kinds = {
        "classification": {"Classification"},
        "STS": {"STS"},
        "retrieval and duplicates": {"Reranking", "PairClassification"},
    }
    for group, names in GROUPS.items():
        for name in names:
            task = embeddings.task_of(name)
            assert task.metadata.type in kinds[group], name
            assert task.eval_splits == ["test"], name
            assert {language for subset in task.hf_subsets for language in _languages(task, subset)} == {"eng-Latn"}
            assert mteb.get_task(name).metadata.name == name


def _languages(task, subset: str) -> list[str]:
    languages = task.metadata.eval_langs
    return languages[subset] if isinstance(languages, dict) else languages


class LocalSTS(MockSTSTask):
    PAIRS = [("import os", "import sys", 5), ("def f(x):", "class A:", 2), ("a b c", "zzz", 0), ("for", "while", 3)]

    def load_data(self, num_proc=None, **kwargs):
        first, second, scores = zip(*self.PAIRS)
        columns = {"sentence1": list(first), "sentence2": list(second), "score": list(scores)}
        self.dataset = DatasetDict({"test": Dataset.from_dict(columns)})
        self.data_loaded = True


class LocalClassification(MockClassificationTask):
    def load_data(self, num_proc=None, **kwargs):
        kinds = ("import module_{}", "the {} words of a poem")
        texts = [kind.format(index) for kind in kinds for index in range(20)]
        split = Dataset.from_dict({"text": texts, "label": [0] * 20 + [1] * 20})
        self.dataset = DatasetDict({"train": split, "test": split})
        self.data_loaded = True


def _evaluate(task, loaded) -> float:
    task.load_data()
    score = evaluate_task(task, loaded)
    assert score.stderr is None
    return score.value


def test_similarity_is_scored_by_rank_correlation_of_cosines(loaded):
    first, second, scores = zip(*LocalSTS.PAIRS)
    cosines = [(_by_hand(loaded, a) @ _by_hand(loaded, b)).item() for a, b in zip(first, second)]
    assert_close(_evaluate(LocalSTS(), loaded), float(spearmanr(cosines, scores)[0]))


def test_classification_tells_two_kinds_of_text_apart(loaded):
    assert _evaluate(LocalClassification(), loaded) > 0.8


@pytest.mark.parametrize("task", [MockRetrievalTask, MockRerankingTask, MockPairClassificationTask])
def test_the_other_kinds_of_tasks_run(task, loaded):
    assert 0 <= _evaluate(task(), loaded) <= 1


def test_a_task_whose_data_are_not_there_is_named(loaded, monkeypatch):
    task = LocalSTS()
    monkeypatch.setattr(task, "load_data", lambda: (_ for _ in ()).throw(ConnectionError("no network\nat all")))
    monkeypatch.setattr(embeddings, "task_of", lambda name: task)
    with pytest.raises(UserError, match="^its data cannot be loaded: ConnectionError: no network$"):
        embeddings.run("STS12", loaded)


def test_an_unknown_task_gets_the_nearest_name():
    with pytest.raises(UserError, match="--tasks BIOSES: the suite 'mteb' has no such task. Did you mean 'BIOSSES'?"):
        embeddings.plan(["BIOSES"])
    plan = embeddings.plan(["SciDocsRR", "BIOSSES"])
    assert [task.name for task in plan.tasks] == ["BIOSSES", "SciDocsRR"]
    assert [(row.metric, row.setting) for row in plan.rows] == [
        ("cosine_spearman", "STS"),
        (mteb.get_task("SciDocsRR").metadata.main_score, "retrieval and duplicates"),
    ]
