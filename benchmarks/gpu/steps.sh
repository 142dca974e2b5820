# What the scripts beside this share: sourced, not run. A script is a list of steps, most telling first; each writes its output to
# $OUT/NAME.log and its numbers to $OUT as JSON, row by row. A step that fails does not stop the rest. MINUTES bounds all of them together,
# MOST (seconds) one of them; the same command again goes on behind the rows that are there. PYTHON names another python.
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
OUT=$(realpath -m "${OUT:-runs/gpu}")
PYTHON=${PYTHON:-python}
mkdir -p "$OUT"
failed=()
set -o pipefail

# For scripts about a config: CONFIG, RUN (its out_dir) and TASKS may be given; INPUT names a folder of pack.py's parts, for a machine without the
# texts. Sets the array `tasks`.
about() { # config, run
    CONFIG=${CONFIG:-$1}
    RUN=${RUN:-$2}
    [[ -z "${INPUT:-}" ]] || bash benchmarks/gpu/unpack.sh "$INPUT" || exit 1
    TASKS=${TASKS:-$RUN/tasks.json.xz}
    tasks=()
    [[ ! -e "$TASKS" ]] || tasks=(--tasks "$TASKS")
    mkdir -p "$RUN/data"
}

# RUN's shards and tokenizer in another run's folder, too.
share() { # folder
    local file
    mkdir -p "$1"
    for file in "$RUN"/data "$RUN"/tokenizer*; do
        [[ ! -e "$file" || -e "$1/$(basename "$file")" ]] || ln -s "$(realpath "$file")" "$1"
    done
}

train() { # name, folder, settings...
    share "$2"
    step "$1" "$PYTHON" conan_engine/train.py "$CONFIG" --out_dir="$2" "${@:3}"
}

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
    if timeout -k 15 "$left" "$@" 2>&1 | tee "$OUT/$name.log"; then
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
