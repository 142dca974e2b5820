#!/usr/bin/env bash
# Everything that only a GPU can tell, in one go: the tests that need one, then every benchmark.
#
#   OUT=results bash benchmarks/gpu_all.sh [--quick]
#
# --quick goes to attn.py. Each step writes to $OUT (runs/gpu by default) as it goes: its output as NAME.log, its numbers as
# JSON. A step that fails does not stop the rest; at the end the script says which failed, and exits with 1 if any did.
# STEP_SECONDS bounds each step (by default 3600). With pytest-xdist the tests share the GPU in 8 processes, most of whose time
# is compilation.
set -u
cd "$(dirname "$0")/.."
OUT=$(realpath -m "${OUT:-runs/gpu}")
PYTHON=${PYTHON:-python}
mkdir -p "$OUT"
failed=()

step() { # name, command...
    local name=$1
    shift
    echo "== $name: $*"
    if timeout "${STEP_SECONDS:-3600}" "$@" 2>&1 | tee "$OUT/$name.log"; then
        echo "== $name: done"
    else
        echo "== $name: FAILED"
        failed+=("$name")
    fi
}
set -o pipefail

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv > "$OUT/gpu.csv" || echo "nvidia-smi gives nothing"
processes=()
"$PYTHON" -c "import xdist" 2> /dev/null && processes=(-n 8)
step tests "$PYTHON" -m pytest -m gpu -q -k "not 32768" "${processes[@]}" --junitxml "$OUT/tests.xml"
step tests_large "$PYTHON" -m pytest -m gpu -q -k 32768  # 60 GB: one after another
step step "$PYTHON" benchmarks/step.py --out "$OUT"
step attn "$PYTHON" benchmarks/attn.py --out "$OUT" "$@"
step infonce "$PYTHON" benchmarks/infonce.py
step loader "$PYTHON" benchmarks/loader.py --out "$OUT"
step checkpoints "$PYTHON" benchmarks/checkpoints.py --parameters 1000 --out "$OUT"
step memory "$PYTHON" benchmarks/memory.py --config configs/conan-1.4b.toml --layers 8 --out "$OUT"
find runs/benchmarks -name 'infonce.*' -newer "$OUT/gpu.csv" -exec cp {} "$OUT" \;  # not those of an earlier run

if ((${#failed[@]})); then
    echo "failed: ${failed[*]}"
    exit 1
fi
