# Sourced by the other scripts. `ensure_environment EXTRA` provides a `python` that has this project installed with EXTRA.
# An active virtual environment is used; otherwise one is created in .venv.

ensure_environment() {
    local extra=$1 venv=${VIRTUAL_ENV:-} stamp
    if [ -z "$venv" ] || [ ! -x "$venv/bin/python" ]; then
        venv=$PWD/.venv
        # venv writes activate last. Without it, an earlier creation was interrupted.
        [ -f "$venv/bin/activate" ] || make_environment "$venv" || return 1
    fi
    export VIRTUAL_ENV=$venv PATH="$venv/bin:$PATH"
    hash -r
    # The installation is repeated only if one of its inputs has changed.
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
    echo "creating a virtual environment in $1 with $("$python" --version)" >&2
    if ! "$python" -m venv --clear "$1"; then
        rm -rf "$1"
        echo "$python cannot create virtual environments: install its venv module (Debian: python3-venv)" >&2
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
    echo "expected Python 3.11 or newer, found none; set PYTHON to its path" >&2
    return 1
}
