# Sourced by quickstart.sh and test.sh: a virtual environment with the project installed.

die() { echo "error: $*" >&2; exit 1; }

# install_project REQUIREMENT: create or reuse .venv and install, unless it is installed already.
install_project() {
    local python=${PYTHON:-python3} wanted stamp=.venv/.installed-for
    if [ ! -x .venv/bin/python ]; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
            || die "Python 3.11 or newer is needed; '$python' is not. Set PYTHON to one."
        "$python" -m venv .venv || die "could not create .venv with '$python' (is its venv module installed?)."
    fi
    wanted="$(cksum < pyproject.toml) $1"
    if ! grep -qsxF "$wanted" "$stamp"; then
        echo "Installing nitp-titan into .venv (once; torch is large) ..."
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable "$1" \
            || die "pip could not install $1; its message is above."
        echo "$wanted" >> "$stamp"
    fi
}
