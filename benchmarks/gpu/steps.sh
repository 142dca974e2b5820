# What the scripts beside this share: sourced, not run. A script is a list of steps, most telling first; each writes its output to
# $OUT/NAME.log and its numbers to $OUT as JSON, row by row. A step that fails does not stop the rest. MINUTES bounds all of them together,
# MOST (seconds) one of them; the same command again goes on behind the rows that are there. PYTHON names another python.
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
OUT=$(realpath -m "${OUT:-runs/gpu}")
PYTHON=${PYTHON:-python}
mkdir -p "$OUT"
failed=()
set -o pipefail

step() { # name, command...
    local name=$1 left=$((${MINUTES:-9} * 60 - SECONDS))
    shift
    ((left > ${MOST:-$left})) && left=$MOST
    if ((left < 10)); then
        echo "== $name: no time left"
        failed+=("$name")
        return
    fi
    echo "== $name ($left s left): $*"
    if timeout "$left" "$@" 2>&1 | tee "$OUT/$name.log"; then
        echo "== $name: done after $SECONDS s"
    else
        echo "== $name: FAILED"
        failed+=("$name")
    fi
}

end() {
    if ((${#failed[@]})); then
        echo "failed: ${failed[*]}"
        exit 1
    fi
}
