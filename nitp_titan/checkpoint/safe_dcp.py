"""Checkpoints (DCP) read without running what they contain.

Their ``.metadata`` and each entry that is not a tensor are pickles, which torch's own reader and planner load as they
come: whoever wrote a checkpoint could run code where it is read. Here both may hold plain data only.
"""

import os
import pickle
import re
import warnings
from functools import cached_property
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torchtitan.tools.filesystem import is_remote

from nitp_titan.errors import UserError
from nitp_titan.machine.failures import explained

_CAN_RUN_CODE = "a checkpoint of this kind can run code and is not read"


class _Refused(pickle.UnpicklingError):
    """A pickle names what plain data does not need."""


def _path(*parts: str) -> str:
    """In place of the path that a checkpoint was written to."""
    return os.path.join(*parts)


_LAYOUTS = {str(layout): layout for layout in vars(torch).values() if isinstance(layout, torch.layout)}


def _layout(name: str) -> torch.layout:
    return _LAYOUTS[name]


# All types of metadata besides those of tensors. Stand-ins for the two that are more than records: a pickle may
# set attributes of whatever it names.
_KNOWN = {
    **{(dcp_metadata.__name__, name): getattr(dcp_metadata, name) for name in dcp_metadata.__all__},
    (dcp_metadata.__name__, "_MEM_FORMAT_ENCODING"): dcp_metadata._MEM_FORMAT_ENCODING,
    (_StorageInfo.__module__, "_StorageInfo"): _StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _layout,
    ("pathlib", "PosixPath"): _path,
    # Where Python 3.13 has it.
    ("pathlib._local", "PosixPath"): _path,
}


class _Unpickler(pickle.Unpickler):
    """Python's own way to restrict a pickle ("Restricting Globals")."""

    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get((module, name))
        if known is None and module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            known = vars(torch)[name]
        if known is None:
            raise _Refused(repr(f"{module}.{name}"))
        return known


def _ends(metadata: Metadata) -> dict[str, int]:
    """Files of a checkpoint, with the bytes that each must have; raises what damaged metadata happens to cause."""
    for entry in metadata.state_dict_metadata.values():
        if isinstance(entry, TensorStorageMetadata):
            torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
    ends: dict[str, int] = {}
    for place in metadata.storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    return dict(sorted(ends.items()))


class _Reader:
    """Mixin for torch's local and fsspec readers: restricted unpickling, file checks, errors that name the file."""

    _file: str | None = None

    @cached_property
    def metadata(self) -> Metadata:
        """The checkpoint's metadata; UserError if it cannot be read. Read once, since a large model has much of it."""
        path = self._get_metadata_path()
        try:
            with self.fs.create_stream(path, "rb") as file:
                metadata = _Unpickler(file).load()
            _ends(metadata)
        except _Refused as error:
            raise UserError(f"{path} names {error}: {_CAN_RUN_CODE}.") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or type(error).__name__}.") from None
        except Exception as error:
            # A damaged pickle raises whatever its bytes happen to mean.
            raise UserError(f"{path} is damaged ({type(error).__name__}).") from error
        return metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata

    def check_files(self) -> None:
        """Raise UserError, naming the file, unless every file of the checkpoint is there and long enough."""
        for name, end in _ends(self.metadata).items():
            path = self.fs.concat_path(self.path, name)
            try:
                size = self._size(path)
            except FileNotFoundError:
                raise UserError(f"{path} is missing: the checkpoint is incomplete.") from None
            if size < end:
                raise UserError(f"{path} has {size:,} bytes instead of {end:,}: the checkpoint is incomplete.")

    def read_data(self, plan, planner):
        try:
            return super().read_data(plan, planner)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            reason = f"names '{found[1]}': {_CAN_RUN_CODE}" if found else "is damaged"
            raise UserError(f"{self.fs.concat_path(self.path, self._file)} {reason}.") from None

    def _slice_file(self, file, sinfo):
        # An error in what is read next is one of this file.
        self._file = sinfo.relative_path
        return super()._slice_file(file, sinfo)


class _LocalReader(_Reader, FileSystemReader):
    def _size(self, path: str | os.PathLike) -> int:
        return os.stat(path).st_size


class _RemoteReader(_Reader, FsspecReader):
    def _size(self, path: str) -> int:
        return self.fs.fs.size(path)


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item, value) -> None:
        """As upstream for the nested states that it flattens, which are all; there with ``weights_only=False``."""
        loaded = torch.load(value, weights_only=True)
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], loaded)


def reader(folder: str | os.PathLike) -> _LocalReader | _RemoteReader:
    """Reader of a checkpoint in a local or remote (fsspec) folder, with ``metadata`` and ``check_files()``."""
    if not is_remote(folder):
        return _LocalReader(folder)
    try:
        return _RemoteReader(folder)
    except (ImportError, ValueError) as error:
        # fsspec has no driver for it, or knows no such protocol.
        raise UserError(f"{folder} cannot be read: {error}") from None


def load(
    state_dict: dict[str, Any],
    source: str | os.PathLike | _LocalReader | _RemoteReader,
    *,
    allow_partial: bool = False,
    no_dist: bool = False,
) -> None:
    """As ``dcp.load``, for plain data and tensors only.

    Args:
        state_dict: filled in place.
        source: folder of the checkpoint, or its `reader`.
        allow_partial: leave alone what the checkpoint does not have.
        no_dist: this process reads by itself.

    Raises:
        UserError: naming the file, if the checkpoint is damaged or could run code; naming the entry, if it lacks one.
    """
    opened = source if isinstance(source, _Reader) else reader(source)
    # Here and not within dcp.load, which would log a traceback and look for metadata of single ranks.
    opened.read_metadata()
    try:
        with warnings.catch_warnings():
            # A process without a group may be intended.
            warnings.filterwarnings("ignore", message="torch.distributed is", category=UserWarning)
            planner = _Planner(allow_partial_load=allow_partial)
            dcp.load(state_dict, storage_reader=opened, planner=planner, no_dist=no_dist)
    except CheckpointException as error:
        # A missing file, a short one and one that is not an archive raise different types.
        reason = next(iter(error.failures.values()))[0]
        if isinstance(reason, UserError):
            raise reason from None
        raise explained(reason, str(opened.path), f"{opened.path} cannot be read") from error
