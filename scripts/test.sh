#!/usr/bin/env bash
# Install what the tests need into .venv and run them; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_venv.sh
# This checkout, where another one shares the environment.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
install_project ".[test]"
# Half of the time goes into starting processes. A file's tests share what they train.
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
