"""torchrun whose exit status tells a run that was told to stop from one that failed.

    python -m nitp_titan.torchrun --nproc_per_node 8 -m nitp_titan.train --recipe ...

torchrun itself exits with 1 in both cases. This one exits with 75 when training has saved its checkpoint after SIGTERM
or Ctrl-C: the same command resumes from it. Arguments are those of torchrun. Imports no TorchTitan.
"""

import os
import sys
import tempfile
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from nitp_titan.training.preemption import EXIT_PREEMPTED, PREEMPTED_FILE


def main(arguments: list[str] | None = None) -> None:
    with tempfile.TemporaryDirectory(prefix="nitp-titan-") as folder:
        marker = Path(folder) / "stopped"
        os.environ[PREEMPTED_FILE] = str(marker)
        try:
            run.main(arguments)
        except (SignalException, ChildFailedError) as error:
            # torchrun has passed a signal on and waited for its workers.
            if marker.exists():
                sys.exit(EXIT_PREEMPTED)
            if isinstance(error, SignalException):
                sys.exit(128 + error.sigval)
            # Its workers have printed the reason; torchrun's own traceback would bury it.
            sys.exit(str(error))


if __name__ == "__main__":
    main()
