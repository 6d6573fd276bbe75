# Sourced by the scripts beside it: a Python environment with this project in it, for `ensure_environment EXTRA`.
# An active virtual environment is used as it is; otherwise one is made in .venv.

ensure_environment() {
    local extra=$1
    if [ -z "${VIRTUAL_ENV:-}" ]; then
        if [ ! -x .venv/bin/python ]; then
            local python
            python=$(find_python) || return 1
            echo "making a virtual environment in .venv with $("$python" --version)" >&2
            if ! "$python" -m venv .venv; then
                rm -rf .venv
                echo "$python cannot make virtual environments: install its venv module (Debian: python3-venv)" >&2
                return 1
            fi
        fi
        . .venv/bin/activate
    fi
    echo "installing into $VIRTUAL_ENV" >&2
    python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extra]"
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.12 python3.11 python3 python; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return 0
        fi
    done
    echo "Python 3.11 or newer is needed, and none was found; set PYTHON to one" >&2
    return 1
}
