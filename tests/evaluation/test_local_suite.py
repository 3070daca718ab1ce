"""The benchmark made from any text."""

import yaml
from datasets import load_dataset
from hf_models import write_text

from nitp_titan.evaluation import local_suite


def test_passages_have_one_true_continuation_and_three_of_other_documents():
    documents = [f"{name} " * 400 for name in ("alpha", "beta", "gamma", "delta", "eps")]
    passages = local_suite.continuations(documents)
    assert passages == local_suite.continuations(documents)
    assert {passage["answer"] for passage in passages} == {0, 1, 2, 3}
    for passage in passages:
        word = passage["context"].split()[-1]
        assert [word in choice for choice in passage["choices"]].index(True) == passage["answer"]
        assert sum(word in choice for choice in passage["choices"]) == 1
        assert len({choice.split()[0] for choice in passage["choices"]}) == 4
        # The harness moves spaces at the end of a context.
        assert not passage["context"][-1].isspace() and passage["choices"][0][0].isspace()


def test_the_truth_follows_its_context_in_the_document_with_and_without_spaces():
    documents = ["".join(chr(0x4E00 + i * 2000 + n) for n in range(1500)) for i in range(4)]
    for passage in local_suite.continuations(documents):
        truth = passage["context"] + passage["choices"][passage["answer"]]
        assert sum(truth in document for document in documents) == 1 and len(truth) == 500


def test_the_suite_is_made_again_when_its_text_changes(tmp_path):
    documents = [f"{name} " * 400 for name in ("alpha", "beta", "gamma", "delta")]
    text = write_text(tmp_path / "text.jsonl", documents)
    first = local_suite.prepare(text, tmp_path / "suite")
    assert first["new"] and first["documents"] == 4
    assert not local_suite.prepare(text, tmp_path / "suite")["new"]
    identity = local_suite.ensure(tmp_path / "suite")
    write_text(text, [*documents, "eps " * 400])
    assert local_suite.ensure(tmp_path / "suite") != identity
    assert len((tmp_path / "suite/documents.jsonl").read_text().splitlines()) == 5
    text.unlink()
    local_suite.ensure(tmp_path / "suite")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["suite"]


def test_a_suite_may_lie_in_a_folder_of_any_name(tmp_path):
    documents = [f"{name} " * 400 for name in ("alpha", "beta", "gamma", "delta")]
    folder = tmp_path / "my [1] suite: #a* 'b'"
    local_suite.prepare(write_text(tmp_path / "text.jsonl", documents), folder)
    for name, rows in (("perplexity", 4), ("continuation", None)):
        task = yaml.safe_load((folder / f"local_{name}.yaml").read_text())
        data = load_dataset("json", data_files=task["dataset_kwargs"]["data_files"], split="test")
        assert len(data) == rows or rows is None and "choices" in data.column_names


def test_a_text_without_words_has_no_perplexity_by_word(tmp_path):
    documents = ["".join(chr(0x4E00 + (i * 1000 + n) % 20000) for n in range(1500)) for i in range(4)]
    local_suite.prepare(write_text(tmp_path / "text.jsonl", documents), tmp_path / "suite")
    task = (tmp_path / "suite/local_perplexity.yaml").read_text()
    assert "byte_perplexity" in task and "word_perplexity" not in task
