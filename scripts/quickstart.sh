#!/usr/bin/env bash
# From nothing to a first comparison: install, make the corpus, train NTP and NITP, report.
#   ./scripts/quickstart.sh [--steps N] [--out outputs/quickstart]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_venv.sh
install_project .
exec .venv/bin/python scripts/quickstart.py "$@"
