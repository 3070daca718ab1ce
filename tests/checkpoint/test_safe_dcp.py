"""Checkpoints that would run code, are damaged or incomplete: nothing of them runs, and one line says why."""

import io
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import export_of, make_config, saved_run
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from nitp_titan.checkpoint import safe_dcp
from nitp_titan.checkpoint.initial_load import check_initial_load
from nitp_titan.checkpoint.stored import Checkpoint
from nitp_titan.config.trained import trained
from nitp_titan.errors import UserError
from nitp_titan.models import meta_tensors

SETTINGS = {"generated_data": False, "training": {"seq_len": 128, "local_batch_size": 2, "global_batch_size": 2}}


@pytest.fixture(scope="module")
def run(assets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    saved_run(folder, **SETTINGS)
    return folder


@pytest.fixture(scope="module")
def trainer(assets, tmp_path_factory):
    """A trainer to load checkpoints with."""
    folder = tmp_path_factory.mktemp("loads")
    made = make_config(folder, checkpoint={"enable": True, "initial_load_model_only": False}, **SETTINGS).build()
    yield made
    made.close()


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run, its last checkpoint alone."""
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("step-2"))
    return tmp_path / "run"


class _Code:
    """Makes a folder where it is unpickled as it comes."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def _in_metadata(step: Path, marker: Path) -> None:
    metadata = pickle.loads((step / ".metadata").read_bytes())
    metadata.planner_data["train_state.step"] = _Code(marker)
    (step / ".metadata").write_bytes(pickle.dumps(metadata))


def _in_entry(name: str):
    def change(step: Path, marker: Path) -> None:
        torch.save(_Code(marker), step / "code.distcp")
        metadata = pickle.loads((step / ".metadata").read_bytes())
        (index,) = [index for index in metadata.storage_data if index.fqn == name]
        metadata.storage_data[index] = _StorageInfo("code.distcp", 0, (step / "code.distcp").stat().st_size)
        (step / ".metadata").write_bytes(pickle.dumps(metadata))

    return change


def _resume(trainer, step: Path):
    trainer.checkpointer.folder = str(step.parent)
    trainer.checkpointer.load(step=3)


def _start_from(trainer, step: Path | str):
    trainer.checkpointer.folder, trainer.checkpointer.initial_load_path = str(step) + "/nothing", str(step)
    trainer.checkpointer.load(step=-1)


def _start_from_remote(trainer, step: Path):
    _start_from(trainer, f"file://{step}")


def _check_start(trainer, step: Path):
    config = make_config(step / "nothing", checkpoint={"enable": True, "initial_load_path": str(step)}, **SETTINGS)
    spec = trained(config).model_spec
    check_initial_load(config, spec, meta_tensors(spec))


def _export(trainer, step: Path):
    export_of(step).write(step.parent / "hf")


PLACES = {"metadata": _in_metadata, "state": _in_entry("train_state.step"), "tensor": _in_entry("norm.weight")}
LOADS = (_resume, _start_from, _start_from_remote)


@pytest.mark.parametrize(
    "place, door",
    [
        *[("metadata", door) for door in (*LOADS, _check_start, _export)],
        *[("state", door) for door in LOADS],
        *[("tensor", door) for door in (*LOADS, _export)],
    ],
)
def test_code_in_a_checkpoint_does_not_run(trainer, copy, tmp_path, place, door):
    step, marker = copy / "checkpoint/step-3", tmp_path / "ran"
    PLACES[place](step, marker)
    with pytest.raises(UserError) as refused:
        door(trainer, step)
    assert not marker.exists()
    file = ".metadata" if place == "metadata" else "code.distcp"
    reason = f"{step}/{file} names 'posix.mkdir': a checkpoint of this kind can run code and is not read."
    assert str(refused.value).removeprefix("[checkpoint] initial_load_path: ").removeprefix("file://") == reason


@pytest.mark.parametrize("place", ["metadata", "state"])
def test_the_same_code_runs_in_torchs_own_loader(copy, tmp_path, place):
    """Or the test above could not fail."""
    step, marker = copy / "checkpoint/step-3", tmp_path / "ran"
    PLACES[place](step, marker)
    dcp.load({"train_state": {"step": 0}}, checkpoint_id=step, no_dist=True)
    assert marker.is_dir()


def test_a_class_of_the_metadata_cannot_be_reached_through_another_name():
    """Nor can what depends on an allowed one: a pickle may name a path of attributes."""
    for module, name in (
        ("torch.distributed.checkpoint.metadata", "Metadata.__init__"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch", "load"),
        ("torch", "float32.__reduce__"),
        ("pathlib", "Path"),
    ):
        stream = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
        with pytest.raises(pickle.UnpicklingError, match=name):
            safe_dcp._Unpickler(io.BytesIO(stream + b"\x93.")).load()


def test_all_types_of_tensors_pass(tmp_path):
    """What checkpoints of other layouts and precisions name as well."""
    types = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    layouts = (torch.strided, torch.sparse_coo)
    formats = (torch.contiguous_format, torch.channels_last, torch.preserve_format)
    properties = [TensorProperties(dtype=dtype) for dtype in types]
    properties += [TensorProperties(layout=layout, memory_format=format) for layout in layouts for format in formats]
    entry = TensorStorageMetadata(properties, torch.Size([2]), [])
    assert safe_dcp._Unpickler(io.BytesIO(pickle.dumps(entry))).load() == entry


def _zeroed(value):
    if isinstance(value, dict):
        return {key: _zeroed(inner) for key, inner in value.items()}
    return torch.zeros_like(value) if isinstance(value, torch.Tensor) else None


def _assert_same(ours, upstream):
    assert type(ours) is type(upstream)
    if isinstance(ours, dict):
        assert ours.keys() == upstream.keys()
        for key in ours:
            _assert_same(ours[key], upstream[key])
    elif isinstance(ours, torch.Tensor):
        assert ours.dtype == upstream.dtype and torch.equal(ours, upstream)
    else:
        assert ours == upstream


@pytest.mark.parametrize("place", ["{}", "file://{}"])
def test_what_is_loaded_is_what_torch_loads(run, place):
    """Model, optimizer with its settings, schedule, data and step, from a local and from a remote folder."""
    step = run / "checkpoint/step-3"
    upstream = _load_state_dict_from_keys(checkpoint_id=step)
    ours = _zeroed(upstream)
    safe_dcp.load(ours, place.format(step), no_dist=True)
    _assert_same(ours, upstream)
    settings = upstream["optimizer"]
    kinds = {type(value).__name__ for key, value in settings.items() if key.startswith("param_groups.")}
    assert {"float", "tuple", "bool"} <= kinds, kinds
    assert ours["train_state"]["step"] == 3


def test_metadata_is_what_torch_reads(run):
    ours = safe_dcp.reader(run / "checkpoint/step-3").metadata
    upstream = dcp.FileSystemReader(run / "checkpoint/step-3").read_metadata()
    for name in ("state_dict_metadata", "planner_data", "storage_data", "version"):
        assert getattr(ours, name) == getattr(upstream, name), name
    assert str(ours.storage_meta.checkpoint_id) == str(upstream.storage_meta.checkpoint_id)


def test_a_missing_entry_is_named_and_may_be_left_alone(run):
    step = run / "checkpoint/step-3"
    state = {"norm.weight": torch.zeros(96), "nobody": torch.full([3], 7.0)}
    with pytest.raises(UserError, match="step-3 cannot be read: .*Missing key in checkpoint state_dict: nobody"):
        safe_dcp.load(dict(state), step, no_dist=True)
    safe_dcp.load(state, step, allow_partial=True, no_dist=True)
    assert state["nobody"].tolist() == [7.0] * 3 and state["norm.weight"].count_nonzero() > 0


@pytest.mark.parametrize("door", [*LOADS, _check_start, _export])
def test_a_file_that_is_cut_short_is_named_before_anything_is_loaded(trainer, copy, door):
    (data,) = (copy / "checkpoint/step-3").glob("*.distcp")
    size = data.stat().st_size
    os.truncate(data, size - 1)
    before = trainer.model_parts[0].norm.weight.detach().clone()
    with pytest.raises(UserError, match=f"{data} has {size - 1:,} bytes instead of {size:,}: the checkpoint is incom"):
        door(trainer, data.parent)
    data.unlink()
    with pytest.raises(UserError, match=f"{data} is missing: the checkpoint is incomplete"):
        door(trainer, data.parent)
    assert torch.equal(trainer.model_parts[0].norm.weight, before)


def test_damaged_metadata_is_read_or_refused_in_one_line(copy):
    """Cut short, with a byte changed, and with a few bytes replaced, 100 times each."""
    step, draw, refused = copy / "checkpoint/step-3", random.Random(0), 0
    whole = (step / ".metadata").read_bytes()
    for number in range(300):
        data, place = bytearray(whole), draw.randrange(len(whole))
        if number % 3 == 0:
            data = data[:place]
        else:
            data[place : place + 1 + number % 3 // 2 * 8] = draw.randbytes(1 + number % 3 // 2 * 5)
        (step / ".metadata").write_bytes(data)
        try:
            Checkpoint(step).load(["norm.weight"])
        except UserError as error:
            refused += 1
            assert str(error).startswith(str(step)) and "\n" not in str(error)
    assert refused > 200


def test_metadata_that_is_no_metadata_is_refused(copy):
    for content in (b"", b"?", pickle.dumps({"state_dict_metadata": {}}), pickle.dumps(MetadataIndex("a"))):
        (copy / "checkpoint/step-3/.metadata").write_bytes(content)
        with pytest.raises(UserError, match="step-3/.metadata is damaged [(][A-Za-z]+[)][.]$"):
            Checkpoint(copy / "checkpoint/step-3")
