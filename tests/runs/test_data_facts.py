"""The data of a run are known by content: what may change between two starts, and what may not."""

import dataclasses
import json
import shutil

import pytest
from helpers import make_config

from nitp_titan.config import recipe
from nitp_titan.data.loader import TextDataLoader
from nitp_titan.data.mixtures import TextSource
from nitp_titan.errors import UserError
from nitp_titan.runs.data_facts import compare, data_facts, with_documents
from nitp_titan.runs.run_folder import plan_resume


def _lines(numbers):
    return "".join(json.dumps({"text": f"document {number}"}) + "\n" for number in numbers)


@pytest.fixture
def corpus(assets, tmp_path):
    """Text, tokenizer and validation text of a run, which tests change."""
    shutil.copytree(assets, tmp_path / "tokenizer")
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.jsonl").write_text(_lines(range(50)))
    (tmp_path / "text/b.jsonl").write_text(_lines(range(50, 80)))
    (tmp_path / "validation.jsonl").write_text(_lines(range(5)))
    return tmp_path


def _config(corpus, *, text="text", tokenizer="tokenizer", validation="validation.jsonl", flags=None, **settings):
    checkpoint = {"enable": True, **settings.pop("checkpoint", {})}
    data = {"dataset_path": str(corpus / text), **settings}
    data = {"sources": settings["sources"]} if "sources" in settings else data
    validator = {"enable": True, "dataloader": TextDataLoader.Config(dataset_path=str(corpus / validation))}
    config = make_config(
        corpus / "run",
        generated_data=False,
        dataloader=TextDataLoader.Config(**data),
        validator=validator,
        checkpoint=checkpoint,
    )
    return dataclasses.replace(config, hf_assets_path=str(corpus / tokenizer), **(flags or {}))


@pytest.fixture
def run(corpus):
    """A run of one step with a checkpoint."""
    config = _config(corpus)
    start = plan_resume(config)
    start.write_start(config, documents=[80])
    (corpus / "run/checkpoint/step-1").mkdir(parents=True)
    (corpus / "run/checkpoint/step-1/.metadata").touch()
    return corpus / "run"


RESUME = {"resume": True}


def test_files_may_be_moved_and_renamed(corpus, run):
    (corpus / "text").rename(corpus / "new")
    (corpus / "new/a.jsonl").rename(corpus / "new/0.jsonl")
    (corpus / "tokenizer").rename(corpus / "words")
    (corpus / "validation.jsonl").rename(corpus / "held_out.jsonl")
    moved = _config(corpus, text="new", tokenizer="words", validation="held_out.jsonl")
    assert plan_resume(moved).from_step == 1
    # As the default of local text has it.
    assert plan_resume(dataclasses.replace(moved, dataloader=dataclasses.replace(moved.dataloader, streaming=False)))


def _grown(corpus):
    with (corpus / "text/b.jsonl").open("a") as stream:
        stream.write(_lines(range(80, 90)))


def _more_files(corpus):
    (corpus / "text/c.jsonl").write_text(_lines(range(80, 90)))


@pytest.mark.parametrize("grow", [_grown, _more_files])
def test_data_that_grew_at_their_end_are_allowed_with_resume_which_says_from_where_the_order_changes(corpus, run, grow):
    grow(corpus)
    said = (
        f"[dataloader] '{corpus}/text' grew at its end: the order of documents changes from document 80 (counted from "
        "0) on and in later epochs"
    )
    with pytest.raises(UserError) as refused:
        plan_resume(_config(corpus))
    assert str(refused.value).startswith(f"{run} holds a run on other data: {said}. ")
    assert str(refused.value).endswith("or resume all the same with --resume.")
    assert plan_resume(_config(corpus, flags=RESUME)).message == f"{run}: the run resumes from step 1; {said}"
    (run / "checkpoint").rename(run / "away")
    with pytest.raises(UserError, match="grew at its end"):
        plan_resume(_config(corpus, flags=RESUME))


def test_shuffled_data_that_grew_are_in_another_order_at_once(corpus):
    config = _config(corpus, shuffle=True)
    before = with_documents(data_facts(config), [80])
    _grown(corpus)
    (said,) = compare(before, data_facts(config), shuffle=True).allowed
    assert said.endswith("grew at its end: the order of all documents changes, as they are shuffled")


def _edited(corpus):
    path = corpus / "text/a.jsonl"
    path.write_text(path.read_text().replace("document 7", "document 0"))


def _longer(corpus):
    (corpus / "text/a.jsonl").write_text(_lines(range(51)))


def _swapped(corpus):
    (corpus / "text/a.jsonl").rename(corpus / "text/z.jsonl")


def _missing(corpus):
    (corpus / "text/b.jsonl").unlink()


def _in_between(corpus):
    (corpus / "text/aa.jsonl").write_text(_lines(range(3)))


def _rebuilt(corpus):
    path = corpus / "tokenizer/tokenizer.json"
    path.write_text(path.read_text() + "\n")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_edited, r"\[dataloader\] '.*/text': .*/a.jsonl has 1,\d+ bytes, hash \w{8} instead of 1,\d+ bytes, hash"),
        (_longer, r"\[dataloader\] '.*/text': .*/a.jsonl has [\d,]+ bytes, hash \w{8} instead of [\d,]+ bytes"),
        (_swapped, r"\[dataloader\] '.*/text' has the same files in another order"),
        (_missing, r"\[dataloader\] '.*/text': .*/b.jsonl is not there"),
        (_in_between, r"\[dataloader\] '.*/text': .*/aa.jsonl \(.*/b.jsonl before\) has"),
        (_rebuilt, r"the tokenizer: .*/tokenizer.json has [\d,]+ bytes, hash \w{8} instead of [\d,]+ bytes"),
    ],
)
def test_changed_data_are_refused_unless_they_begin_again(corpus, run, change, said):
    change(corpus)
    for flags in ({}, RESUME):
        with pytest.raises(UserError, match=f"holds a run on other data: {said}.* Restore them, choose another") as one:
            plan_resume(_config(corpus, flags=flags))
        assert "\n" not in str(one.value)
    again = _config(corpus, flags=RESUME, checkpoint={"exclude_from_loading": ["dataloader"]})
    assert plan_resume(again).message.endswith(": the data begin again")


def test_streaming_is_part_of_a_run_because_it_changes_the_order(corpus, run):
    for flags in ({}, RESUME):
        with pytest.raises(UserError, match=r"/text' was indexed and is streamed \(streaming\)"):
            plan_resume(_config(corpus, streaming=True, flags=flags))


@pytest.mark.parametrize(("num_streams", "fits"), [(1, True), (2, True), (3, False), (4, False), (5, True), (6, False)])
def test_streamed_data_that_grew_resume_unless_files_are_dealt_in_another_way(corpus, num_streams, fits):
    config = _config(corpus, streaming=True)
    before = data_facts(config)
    _more_files(corpus)
    changes = compare(before, data_facts(config), num_streams=num_streams)
    grown = f"[dataloader] '{corpus}/text' grew at its end: the order of documents changes from its former end on and"
    new = f"[dataloader] '{corpus}/text': {corpus}/text/c.jsonl is new"
    assert changes.other == ([] if fits else [new])
    assert [text[: len(grown)] for text in changes.allowed] == ([grown] if fits else [])


def test_other_data_are_those_of_the_run_once_a_checkpoint_has_their_state(corpus, run):
    _edited(corpus)
    begins = _config(corpus, flags=RESUME, checkpoint={"exclude_from_loading": ["dataloader"]})
    start = plan_resume(begins)
    assert start.message.endswith("the data begin again")
    start.write_start(begins, documents=[80])
    # Killed before its first checkpoint: the newest one has the state of the old data.
    with pytest.raises(UserError, match="holds a run on other data: .*a.jsonl has .* or let the new data begin"):
        plan_resume(_config(corpus))
    start.note_checkpoint(2, documents=[80])
    (run / "checkpoint/step-1").rename(run / "checkpoint/step-2")
    assert plan_resume(_config(corpus)).from_step == 2


def test_data_that_begin_again_say_so_whether_or_not_they_have_changed(corpus, run):
    again = _config(corpus, checkpoint={"exclude_from_loading": ["dataloader"]})
    assert plan_resume(again).message.endswith("resumes from step 1; the data begin again")


def test_each_checkpoint_is_compared_with_its_own_data(corpus, run):
    old = (corpus / "text/a.jsonl").read_text()
    _edited(corpus)
    begins = _config(corpus, flags=RESUME, checkpoint={"exclude_from_loading": ["dataloader"]})
    start = plan_resume(begins)
    start.write_start(begins, documents=[80])
    shutil.copytree(run / "checkpoint/step-1", run / "checkpoint/step-2")
    start.note_checkpoint(2, documents=[80])
    assert plan_resume(_config(corpus)).from_step == 2
    # Step 1 is of the text as it was.
    earlier = _config(corpus, checkpoint={"load_step": 1})
    with pytest.raises(UserError, match=r"holds a run on other data: .*a.jsonl has .* Restore them"):
        plan_resume(earlier)
    (corpus / "text/a.jsonl").write_text(old)
    branch = plan_resume(earlier)
    assert branch.from_step == 1
    with pytest.raises(UserError, match="holds a run on other data"):
        plan_resume(_config(corpus))
    branch.claim()
    branch.write_start(earlier, documents=[80])
    branch.note_checkpoint(2, documents=[80])
    assert [one["first_step"] for one in json.loads((run / "data.json").read_text())] == [0]


def test_another_number_of_sources_does_not_fit_the_state_of_the_data(corpus, run):
    sources = [TextSource(dataset_path=str(corpus / f"text/{name}.jsonl")) for name in "ab"]
    with pytest.raises(UserError, match=r"\[dataloader\] has 2 sources instead of 1"):
        plan_resume(_config(corpus, sources=sources, flags=RESUME))


def test_other_validation_data_are_allowed_with_resume(corpus, run):
    (corpus / "validation.jsonl").write_text(_lines(range(4)))
    with pytest.raises(UserError, match=r"\[validator.dataloader\] .*validation.jsonl has .* or resume all the same"):
        plan_resume(_config(corpus))
    assert plan_resume(_config(corpus, flags=RESUME)).from_step == 1


@pytest.mark.parametrize("damage", [None, "", "{}", "[]", '{"tokenizer": 1}'])
def test_a_run_whose_data_are_unknown_is_refused(corpus, run, damage):
    (run / "data.json").unlink() if damage is None else (run / "data.json").write_text(damage)
    with pytest.raises(UserError, match="holds a run without a readable data.json, so that its data may be others"):
        plan_resume(_config(corpus))
    assert "its data are not compared" in plan_resume(_config(corpus, flags=RESUME)).message


def test_the_facts_are_kept_beside_the_settings_and_no_path_identifies_a_run(corpus, run):
    (record,) = json.loads((run / "data.json").read_text())
    kept = record["facts"]
    assert record["first_step"] == 0 and kept == with_documents(data_facts(_config(corpus)), [80])
    assert [path.rpartition("/")[2] for path, _ in kept["dataloader"][0]["files"]] == ["a.jsonl", "b.jsonl"]
    assert kept["dataloader"][0]["documents"] == 80
    assert recipe.read_toml(run / "resolved.toml")["dataloader"]["dataset_path"] == str(corpus / "text")
