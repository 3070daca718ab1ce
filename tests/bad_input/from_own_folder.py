"""The entry point, each rank in a folder of its own, as on a node of its own.

python tests/bad_input/from_own_folder.py FOLDER [arguments]
"""

import os
import sys

from nitp_titan.train import main

if __name__ == "__main__":
    os.environ["LOCAL_RANK"] = "0"
    os.chdir(f"{sys.argv.pop(1)}/{os.environ['RANK']}")
    main()
