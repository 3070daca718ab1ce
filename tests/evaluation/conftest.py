"""Two tiny models, a text and its local suite, shared by the tests of the evaluation."""

import json

import pytest
from hf_models import one_thread, save_llama, write_text


@pytest.fixture(scope="package", autouse=True)
def threads():
    with one_thread():
        yield


@pytest.fixture(scope="package")
def texts(assets):
    """Beginnings of documents that fit into one window, one of them not ASCII."""
    lines = (assets / "validation.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    return [json.loads(line)["text"][:1100] for line in lines] + ["Grüße, 世界! " * 5]


@pytest.fixture(scope="package")
def workplace(assets, texts, tmp_path_factory):
    """Two models, a text and its local suite."""
    from nitp_titan.evaluation import local_suite

    folder = tmp_path_factory.mktemp("evaluation")
    for seed, name in enumerate(("ntp", "nitp")):
        save_llama(folder / name, assets, seed)
    local_suite.prepare(write_text(folder / "text.jsonl", texts), folder / "suite")
    return folder
