#!/usr/bin/env bash
# Install what the tests need into .venv and run them; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_venv.sh
install_project ".[test]"
exec .venv/bin/python -m pytest "$@"
