#!/usr/bin/env bash
# Are the kernels for Hopper right, and are they as fast as cuDNN's? Parity with fp64, 200 runs of the same bits, compute-sanitizer where it is
# installed, then beside the plain kernels and their peers. Nine minutes on one H100 or H200; without a GPU its simulator: --device cpu.
#
#   OUT=results bash benchmarks/gpu/hopper.sh [--device cpu]
set -u
source "$(dirname "$0")/steps.sh"

tests=tests/kernels/attention/hopper/test_parity.py
if [[ "$*" == "--device cpu" ]]; then
    step parity "$PYTHON" -m pytest -q $tests -k "any_lengths"
    end
    exit
fi
# eight processes, since compilation takes most of the time
MOST=200 step parity bash -c "set -o pipefail; \"\$0\" -m pytest --collect-only -q -m gpu $tests | grep :: |
    xargs -d '\n' -P 8 -n 5 \"\$0\" -m pytest -q" "$PYTHON"
step attention "$PYTHON" benchmarks/attn.py --quick --out "$OUT" --forms "Flex Triton" "SDPA cuDNN" "padded SDPA cuDNN"
if command -v compute-sanitizer > /dev/null; then
    MOST=90 step sanitizer compute-sanitizer --error-exitcode 1 "$PYTHON" -m pytest -q -m gpu $tests -k opcheck
fi
end
