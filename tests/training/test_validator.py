"""Validation: each rank reads its own part, all ranks agree, a hub that is away ends nothing; the last step counts."""

import json
import os
import signal
from functools import partial

import httpx
import pytest
from datasets import Dataset, IterableDataset
from helpers import make_config
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from recipe_files import GOOD_TRAIN_CONFIG
from simulated_ranks import SimulatedRanks

from nitp_titan import config_registry
from nitp_titan.cli import catalog
from nitp_titan.config import recipe
from nitp_titan.config.trained import validation_config
from nitp_titan.data.loader import TextDataLoader
from nitp_titan.errors import UserError
from nitp_titan.report.runs import read_variants
from nitp_titan.step_files import read_records
from nitp_titan.training.preemption import EXIT_PREEMPTED
from nitp_titan.training.validator import ValidationData, ValidationSkipped, ValidationStopped

SEQ_LEN, GLOBAL_BATCH = 32, 24


class CountingTokenizer:
    """One token per byte; counts what it made."""

    def __init__(self):
        self.num_tokens = 0

    def encode(self, text, add_bos, add_eos):
        tokens = [256] * add_bos + list(text.encode()) + [257] * add_eos
        self.num_tokens += len(tokens)
        return tokens


class World:
    """The validation data of all ranks of a run, each in a thread."""

    def __init__(
        self, monkeypatch, num_ranks, *, global_batch=GLOBAL_BATCH, microbatches=1, pauses=(1, 2, 4), **config
    ):
        config = TextDataLoader.Config(**{"infinite": False, **config})
        self.ranks, self.waited = SimulatedRanks(num_ranks), []
        monkeypatch.setattr(
            "nitp_titan.training.validator.largest", lambda value, rank: self.ranks.largest(rank, value)
        )
        monkeypatch.setattr(ValidationData, "_any", lambda data, reason: next(filter(None, self._gather(data, reason))))
        self.tokenizers = [CountingTokenizer() for _ in range(num_ranks)]
        self.data = [
            ValidationData(config, rank, microbatches, pauses=pauses, sleep=self.waited.append).build(
                dp_world_size=num_ranks,
                dp_rank=rank,
                tokenizer=self.tokenizers[rank],
                seq_len=SEQ_LEN,
                local_batch_size=global_batch // num_ranks // microbatches,
            )
            for rank in range(num_ranks)
        ]

    def _gather(self, data, reason):
        return self.ranks.gather(data.group, reason)

    def validate(self, num_batches=None):
        """Labels of all sequences in their order, without rows that have none, and a rank's number of batches."""

        def one(data):
            batches = []
            for batch in data:
                batches.append(batch)
                if len(batches) == num_batches:
                    break
            return batches

        by_rank = self.ranks.run([partial(one, data) for data in self.data])
        counts = {len(batches) for batches in by_rank}
        assert len(counts) == 1
        shapes = {
            tuple(tensor.shape)
            for batches in by_rank
            for inputs, labels in batches
            for tensor in (*inputs.values(), labels)
        }
        assert len(shapes) == 1
        rows = [row for step in zip(*by_rank) for rows in zip(*(labels for _, labels in step)) for row in rows]
        return [row[row != -100].tolist() for row in rows if (row != -100).any()], counts.pop()

    def tokens(self):
        """Tokens that each rank has tokenized since the last call."""
        counts = [tokenizer.num_tokens for tokenizer in self.tokenizers]
        for tokenizer in self.tokenizers:
            tokenizer.num_tokens = 0
        return counts


def _write(path, count):
    rows = [{"text": f"{index:05} " + "x" * (7 * index % 150)} for index in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.mark.parametrize("streaming", [None, True])
@pytest.mark.parametrize("num_streams", [1, 4, 12])
@pytest.mark.parametrize("bounded", [True, False])
def test_every_number_of_ranks_validates_the_same_sequences_each_time(
    tmp_path, monkeypatch, streaming, num_streams, bounded
):
    rows = _write(tmp_path / "a.jsonl", 90)
    config = {"dataset_path": str(tmp_path / "a.jsonl"), "streaming": streaming, "num_streams": num_streams}
    steps = 3 if bounded else None
    expected, _ = World(monkeypatch, 1, **config).validate(steps)
    if not bounded:
        labels = sorted(label for row in expected for label in row)
        assert labels == sorted(label for row in rows for label in [*row["text"].encode(), 257])
    for num_ranks in (1, 2, 3, 4, 6):
        world = World(monkeypatch, num_ranks, **config)
        assert world.validate(steps)[0] == expected
        assert world.validate(steps)[0] == expected


def test_a_pipeline_gets_all_its_microbatches_at_the_end_of_the_data_too(tmp_path, monkeypatch):
    _write(tmp_path / "a.jsonl", 50)
    config = {"dataset_path": str(tmp_path / "a.jsonl"), "num_streams": 4}
    expected, _ = World(monkeypatch, 1, **config).validate()
    found, num_batches = World(monkeypatch, 2, microbatches=4, **config).validate()
    assert sorted(found) == sorted(expected) and num_batches % 4 == 0


def test_a_rank_tokenizes_its_own_part_only(tmp_path, monkeypatch):
    """Measurements of this test, before and after: recipes/LOG.md."""
    _write(tmp_path / "a.jsonl", 6000)
    config = {"dataset_path": str(tmp_path / "a.jsonl"), "num_streams": 64, "global_batch": 512}
    for num_ranks in (1, 8, 64):
        world = World(monkeypatch, num_ranks, **config)
        for _ in range(2):
            world.validate(4)
            tokens, own = world.tokens(), 4 * 512 * SEQ_LEN // num_ranks
            print(f"{num_ranks} ranks: {max(tokens):,} tokens tokenized on a rank for {own:,} that it validates")
            # What is left over of a stream's last document, of at most 158 tokens.
            assert max(tokens) < 1.1 * own + 64 // num_ranks * 158


@pytest.mark.parametrize("name", recipe.available("train_configs"))
def test_each_rank_has_streams_of_its_own_in_every_shipped_train_config(name):
    for recipe_name in [one for one in recipe.available("recipes") if name in catalog.machines_for(one)]:
        config = config_registry.load(f"{recipe_name}@{name}")
        parallelism = config.parallelism
        others = parallelism.tensor_parallel_degree * parallelism.context_parallel_degree
        degree = config.machine.num_ranks // others // parallelism.pipeline_parallel_degree
        for data in (config.dataloader, validation_config(config).dataloader):
            assert (data.num_streams or 1) % degree == 0, recipe_name


def _http_error(status, kind=HfHubHTTPError):
    return kind("no", response=httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co")))


AWAY = {
    "429": _http_error(429),
    "503": _http_error(503),
    "no connection": httpx.ConnectError("no route"),
    "closed": ConnectionError("Server Disconnected"),
}


class Hub:
    """Opens one streamed data set; fails as often as it is told, when it is opened or after some documents."""

    def __init__(self, monkeypatch, error, *, opening=0, reading=0, rows=90):
        self.opened, self.error, self.opening, self.reading, self.rows = 0, error, opening, reading, rows
        monkeypatch.setattr("nitp_titan.data.sources.load_dataset", self._load)

    def _load(self, *args, **options):
        self.opened += 1
        if self.opening:
            self.opening -= 1
            raise self.error
        return IterableDataset.from_generator(self._documents)

    def _documents(self):
        for index in range(self.rows):
            if index == 30 and self.reading:
                self.reading -= 1
                raise self.error
            yield {"text": f"{index:05} " + "x" * (7 * index % 150)}


@pytest.mark.parametrize("error", AWAY.values(), ids=AWAY)
def test_a_hub_that_is_away_is_waited_for_and_gives_the_same_sequences(monkeypatch, error):
    config = {"dataset": "owner/name", "num_streams": 4}
    hub = Hub(monkeypatch, error)
    expected = World(monkeypatch, 1, **config).validate()
    for failures in ({"opening": 2}, {"reading": 2}, {"opening": 1, "reading": 1}):
        hub = Hub(monkeypatch, error, **failures)
        world = World(monkeypatch, 1, **config)
        assert world.validate() == expected and world.waited == [1, 2]
        # The sources stay open from one validation to the next, the pauses begin again.
        opened, hub.reading = hub.opened, 1
        assert opened == 1 + failures.get("opening", 0)
        assert world.validate() == expected and world.waited == [1, 2, 1] and hub.opened == opened


def test_a_validation_that_one_rank_cannot_read_is_left_out_on_all(monkeypatch, tmp_path):
    config = {"dataset": "owner/name", "num_streams": 4}
    hub = Hub(monkeypatch, AWAY["429"])
    world = World(monkeypatch, 2, **config)
    expected = world.validate()
    hub.reading = 4

    def one(data):
        with pytest.raises(ValidationSkipped) as skipped:
            list(data)
        return str(skipped.value)

    # Whichever rank comes first meets all failures or both some; the others wait.
    hub.reading = 8
    said = world.ranks.run([partial(one, data) for data in world.data])
    assert len(set(said)) == 1 and "owner/name" in said[0] and "429" in said[0]
    hub.reading = 0
    assert world.validate() == expected


def test_a_validation_in_which_one_rank_is_told_to_stop_ends_on_all_after_the_same_batch(tmp_path, monkeypatch):
    _write(tmp_path / "a.jsonl", 90)
    world = World(monkeypatch, 3, dataset_path=str(tmp_path / "a.jsonl"), num_streams=3)
    expected, asked = world.validate(), []
    # Told between its second and its third batch.
    world.data[1].told_to_stop = lambda: asked.append(1) or len(asked) > 2

    def one(data):
        found = []
        with pytest.raises(ValidationStopped):
            for batch in data:
                found.append(batch)
        return len(found)

    assert world.ranks.run([partial(one, data) for data in world.data]) == [2, 2, 2]
    world.data[1].told_to_stop = lambda: False
    assert world.validate() == expected


@pytest.mark.parametrize(
    "error", [_http_error(404, RepositoryNotFoundError), OfflineModeIsEnabled("HF_HUB_OFFLINE=1"), ValueError("no")]
)
def test_an_error_that_waiting_does_not_mend_ends_the_run(monkeypatch, error):
    Hub(monkeypatch, error, opening=1)
    world = World(monkeypatch, 1, dataset="owner/name")
    with pytest.raises(UserError, match=r"\[validator.dataloader\] dataset = 'owner/name'"):
        world.validate()
    assert world.waited == []


def test_data_without_text_are_named(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    tokenizer = type("Silent", (CountingTokenizer,), {"encode": lambda *args, **options: []})
    world = World(monkeypatch, 1, dataset_path=str(tmp_path / "a.jsonl"))
    world.data[0]._options["tokenizer"] = tokenizer()
    with pytest.raises(UserError, match=r"\[validator.dataloader\] holds no text"):
        world.validate()


def test_endless_validation_of_all_the_data_is_refused(files):
    text = '\n[validator]\nenable = true\nsteps = -1\n[validator.dataloader]\ninfinite = true\ndataset_path = "x"\n'
    with pytest.raises(UserError, match=r"machine.toml: \[validator.dataloader\] infinite = true, but \[validator\]"):
        files(train_config=(GOOD_TRAIN_CONFIG, text))


@pytest.mark.parametrize("infinite", [False, True])
def test_infinite_is_honoured_where_the_data_end_before_the_steps(tmp_path, monkeypatch, infinite):
    _write(tmp_path / "a.jsonl", 40)
    world = World(monkeypatch, 1, dataset_path=str(tmp_path / "a.jsonl"), infinite=infinite)
    found, num_batches = world.validate(20)
    assert (num_batches == 20) == infinite
    assert len(found) == (20 * GLOBAL_BATCH if infinite else -(-sum(6 + 7 * i % 150 + 1 for i in range(40)) // SEQ_LEN))


def _run(folder, assets, **sections):
    validation = TextDataLoader.Config(dataset_path=str(assets / "validation.jsonl"), infinite=False)
    sections = {
        "metrics": {"log_freq": 100},
        "validator": {"enable": True, "freq": 100, "steps": 2, "dataloader": validation},
        "geometry": {"enable": True, "interval": 100},
        "training": {"steps": 3, "seq_len": 128, "global_batch_size": 4, "local_batch_size": 2},
        **sections,
    }
    return make_config(folder, generated_data=False, **sections)


FILES = ("metrics", "validation", "geometry", "validation_geometry")


def test_the_last_step_is_logged_measured_and_validated_once(assets, tmp_path):
    sections = {"checkpoint": {"enable": True, "interval": 100, "last_save_model_only": False}}
    for _ in range(2):
        # The second time the run is complete: nothing is left to do, and nothing is done twice.
        trainer = _run(tmp_path / "run", assets, **sections).build()
        trainer.train()
        trainer.close()
        for file in FILES:
            steps = [record["step"] for record in read_records(tmp_path / f"run/{file}.jsonl")]
            assert steps == [1, 3], file
    assert trainer.validator.should_validate(3)
    _, problems = read_variants([str(tmp_path / "run")])
    assert problems == []


def test_the_last_step_is_logged_where_nothing_else_is_due(assets, tmp_path):
    trainer = _run(tmp_path, assets, geometry={"enable": False}).build()
    trainer.close()
    assert [step for step in range(1, 6) if trainer.metrics_processor.should_log(step)] == [1, 3]


def test_a_run_of_the_paper_ends_with_figures_of_its_last_step(assets, tmp_path):
    trainer = _run(tmp_path, assets, training={"steps": 47_684}).build()
    trainer.close()
    for step, due in ((47_683, False), (47_684, True), (47_685, False)):
        assert trainer.metrics_processor.should_log(step) is due
        assert trainer.tracker.due(step) is due
        assert trainer.validator.should_validate(step) is due


def test_validation_projects_only_what_is_measured(assets, tmp_path):
    trainer = _run(tmp_path, assets).build()
    calls = []
    trainer.model_parts[0].nitp.projector.register_forward_hook(lambda module, args, output: calls.append(output.shape))
    trainer.validator.validate(trainer.model_parts, 1)
    trainer.close()
    # One global batch of four sequences, though two are validated.
    assert sum(shape[0] * shape[1] for shape in calls) == 4 * 128
    (probed,) = read_records(tmp_path / "validation_geometry.jsonl")
    assert probed["hidden"]["tokens"] == 4 * 128


def test_steps_are_global_batches_whatever_a_rank_takes_at_once(assets, tmp_path):
    losses, probes = [], []
    for local in (1, 2, 4):
        training = {"steps": 1, "seq_len": 128, "global_batch_size": 4, "local_batch_size": local}
        trainer = _run(tmp_path / str(local), assets, training=training).build()
        trainer.validator.validate(trainer.model_parts, 1)
        trainer.close()
        losses += [read_records(tmp_path / f"{local}/validation.jsonl")[0]["ntp_loss"]]
        probes += [read_records(tmp_path / f"{local}/validation_geometry.jsonl")[0]["hidden"]]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)
    assert [probe["tokens"] for probe in probes] == [4 * 128] * 3
    assert [probe["cosine"] for probe in probes] == pytest.approx([probes[0]["cosine"]] * 3, abs=1e-5)


def test_training_continues_after_a_validation_that_was_left_out(assets, tmp_path, monkeypatch, caplog):
    caplog.set_level("WARNING")
    rows, opened, now = Dataset.from_json(str(assets / "validation.jsonl")), [], {"step": 0}

    def documents():
        for row in rows:
            if now["step"] == 2:
                raise AWAY["429"]
            yield row

    def load(path, *args, **options):
        opened.append(path)
        if path == "owner/name":
            return IterableDataset.from_generator(documents)
        return Dataset.from_json(options["data_files"])

    monkeypatch.setattr("nitp_titan.data.sources.load_dataset", load)
    validation = TextDataLoader.Config(dataset="owner/name", infinite=False)
    validator = {"enable": True, "freq": 2, "steps": 2, "dataloader": validation}
    trainer = _run(tmp_path, assets, validator=validator).build()
    waited, validate = [], trainer.validator.validate
    trainer.validator.dl_config.sleep = waited.append
    trainer.validator.validate = lambda parts, step: now.update(step=step) or validate(parts, step)
    trainer.train()
    trainer.close()
    assert waited == [1, 2, 4, 8, 16, 32]
    records = read_records(tmp_path / "validation.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3]
    assert "owner/name: it asks to wait (429" in records[1].pop("skipped") and records[1] == {"step": 2}
    assert "ntp_loss" in records[2]
    assert [record["step"] for record in read_records(tmp_path / "validation_geometry.jsonl")] == [1, 3]
    assert all(part.training for part in trainer.model_parts)
    assert "step 2: the validation is left out, training continues. owner/name: it asks to wait (429" in caplog.text
    assert opened.count("owner/name") == 1


def test_a_run_that_is_told_to_stop_while_it_validates_saves_at_once_and_validates_again(assets, tmp_path, monkeypatch):
    monkeypatch.setattr("torchtitan.trainer.time.sleep", lambda seconds: None)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)
    checkpoint = {"enable": True, "interval": 100, "last_save_model_only": False}
    validation = TextDataLoader.Config(dataset_path=str(assets / "validation.jsonl"), infinite=False)
    validator = {"enable": True, "freq": 2, "steps": 4, "dataloader": validation}

    def train(folder, *, stop_at=None):
        trainer = _run(tmp_path / folder, assets, checkpoint=checkpoint, validator=validator).build()
        loss, model = trainer.validator.loss_fn, trainer.model_parts[0]

        def stopped(*arguments):
            if trainer.step == stop_at and not model.training:
                os.kill(os.getpid(), signal.SIGINT)
            return loss(*arguments)

        trainer.validator.loss_fn = stopped
        try:
            trainer.train()
        except SystemExit as end:
            return end.code, [trainer.step, model.training]
        finally:
            trainer.close()
        return 0, [trainer.step, model.training]

    assert train("whole") == (0, [3, True])
    assert train("stopped", stop_at=2) == (EXIT_PREEMPTED, [2, True])
    steps = [[record["step"] for record in read_records(tmp_path / f"stopped/{file}.jsonl")] for file in FILES]
    assert steps == [[1]] * 4 and (tmp_path / "stopped/checkpoint/step-2/.metadata").exists()
    # After the last step only its validation is left, which is finished.
    assert train("stopped", stop_at=3) == (0, [3, True])
    for file in ("validation", "validation_geometry"):
        assert read_records(tmp_path / f"stopped/{file}.jsonl") == read_records(tmp_path / f"whole/{file}.jsonl")
