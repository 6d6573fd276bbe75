# Sourced by the scripts beside it: `ensure_environment EXTRA` makes `python` one that has this project installed.
# An active virtual environment is used as it is; otherwise one is made in .venv.

ensure_environment() {
    local extra=$1 venv=${VIRTUAL_ENV:-} stamp
    if [ -z "$venv" ] || [ ! -x "$venv/bin/python" ]; then
        venv=$PWD/.venv
        # activate is written last: without it the environment was left half made.
        [ -f "$venv/bin/activate" ] || make_environment "$venv" || return 1
    fi
    export VIRTUAL_ENV=$venv PATH="$venv/bin:$PATH"
    hash -r
    # What the installation depends on; as long as it is the same, nothing is asked of the network again.
    stamp=$(cat setup.cfg pyproject.toml constraints.txt; echo "$PWD")
    if [ "$stamp" != "$(cat "$venv/.dense-retriever-$extra" 2>/dev/null)" ]; then
        echo "installing into $venv" >&2
        python -m pip --version >/dev/null 2>&1 || python -m ensurepip >/dev/null || return 1
        python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extra]" || return 1
        printf '%s\n' "$stamp" > "$venv/.dense-retriever-$extra"
    fi
}

make_environment() {
    local python
    python=$(find_python) || return 1
    echo "making a virtual environment in $1 with $("$python" --version)" >&2
    if ! "$python" -m venv --clear "$1"; then
        rm -rf "$1"
        echo "$python cannot make virtual environments: install its venv module (Debian: python3-venv)" >&2
        return 1
    fi
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
