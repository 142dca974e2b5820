#!/usr/bin/env bash
# Everything that only a GPU can tell, in one go: the tests that need one, then every benchmark. Hours.
#
#   OUT=results bash benchmarks/gpu/all.sh [--quick]
#
# --quick goes to attn.py. With pytest-xdist the tests share the GPU in 8 processes, most of whose time is compilation.
set -u
MINUTES=${MINUTES:-600}
source "$(dirname "$0")/steps.sh"

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
end
