"""Train where rank 1 reads another recipe and has other code than rank 0, as on a node of its own."""

import os
import sys

from nitp_titan import train
from nitp_titan.runs import provenance

if os.environ["RANK"] == "1":
    os.environ["LOCAL_RANK"] = "0"
    sys.argv += ["--training.steps", "7"]
    provenance.code_hash = lambda: "0123456789abcdef"
train.main()
