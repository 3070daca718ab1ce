"""TorchTitan's refusals as one line with the table. Imports no torch."""

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from nitp_titan.errors import UserError

# Packages of TorchTitan, and the table whose settings they refuse.
_TABLES = {
    "torchtitan.components.checkpointer": "checkpoint",
    "torchtitan.components.loss": "loss",
    "torchtitan.components.metrics": "metrics",
    "torchtitan.components.optimizer": "optimizer",
    "torchtitan.components.optimizer.lr_scheduler": "lr_scheduler",
    "torchtitan.components.quantization": "float8",
    "torchtitan.components.validate": "validator",
    "torchtitan.distributed": "parallelism",
    "torchtitan.distributed.activation_checkpoint": "activation_checkpoint",
    "torchtitan.distributed.compile": "compile",
    "torchtitan.tools.profiler": "profiler",
}
# Tables without a package of their own.
_OTHER_TABLES = {"training", "debug", "comm", "model"}
_SETTING = re.compile(r"\b([a-z_]+)\.([a-z_]+)\b")


@contextmanager
def upstream_refusals() -> Iterator[None]:
    """Turn what TorchTitan refuses or asserts of the settings into a `UserError` with their table.

    Errors that are raised outside of TorchTitan, and assertions without a message, stay as they are.
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, AssertionError, NotImplementedError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        module = frame.f_globals.get("__name__", "")
        if not module.startswith("torchtitan.") or not str(error):
            raise
        # A message may name the setting as flags do.
        named = _SETTING.search(str(error))
        table, key = named.groups() if named else (None, None)
        place = ""
        if table not in {*_TABLES.values(), *_OTHER_TABLES}:
            names = [name for name in _TABLES if module == name or module.startswith(f"{name}.")]
            table, key = (_TABLES[max(names, key=len)], None) if names else (None, None)
            place = f"[{table}] " if table else ""
        raise UserError(f"{place}{error}", table=table, key=key) from error
