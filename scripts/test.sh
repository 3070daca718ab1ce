#!/usr/bin/env bash
# Install what the tests need into .venv and run them; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_venv.sh
# This checkout, where another one shares the environment.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
install_project ".[test]"
# Three on two cores, since ranks wait for each other. A file's tests share what they train; tests/conftest.py has the
# order of files.
exec .venv/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
