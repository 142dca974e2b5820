#!/usr/bin/env bash
# The attention kernels for Hopper: parity with fp64, 200 runs of the same bits; then beside the plain kernels and their peers, the step of the 1.4B
# model with and without them, kernel by kernel, and InfoNCE; at last compute-sanitizer, where it is installed. Nine minutes on one H100 or H200;
# without a GPU the simulator: --device cpu.
#
#   OUT=results bash benchmarks/gpu/hopper.sh [--device cpu]
set -u
source "$(dirname "$0")/steps.sh"

hopper=tests/kernels/attention/hopper/test_parity.py
if [[ "$*" == "--device cpu" ]]; then
    step parity "$PYTHON" -m pytest -q $hopper -k "any_lengths"
    end
    exit
fi
# eight processes, since compilation takes most of the time
MOST=200 step parity bash -c "set -o pipefail; \"\$0\" -m pytest --collect-only -q -m gpu $hopper tests/parallel/test_sharded_adamw.py tests/kernels/test_products.py |
    grep :: | xargs -d '\n' -P 8 -n 6 \"\$0\" -m pytest -q --tb=short" "$PYTHON"
MOST=200 step attention "$PYTHON" benchmarks/attn.py --quick --out "$OUT" --forms "Flex Triton" "SDPA cuDNN" "padded SDPA cuDNN"
MOST=60 step step "$PYTHON" benchmarks/step.py --forms ours --profile --out "$OUT"
CONAN_HOPPER=0 MOST=60 step step-plain "$PYTHON" benchmarks/step.py --forms ours --out "$OUT/plain"
[[ ! -e "$OUT/plain/step.json" ]] || cp "$OUT/plain/step.json" "$OUT/step-plain.json"
MOST=90 step infonce "$PYTHON" benchmarks/infonce.py --sizes 4096 16384 --out "$OUT" --forms ours "ours, both ways" "textbook, compiled" --profile
if command -v compute-sanitizer > /dev/null; then
    MOST=90 step sanitizer compute-sanitizer --error-exitcode 1 "$PYTHON" -m pytest -q -m gpu $hopper -k opcheck
fi
end
