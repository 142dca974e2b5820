#!/usr/bin/env bash
# Is the forward kernel for Hopper right, and is it as fast as cuDNN's? Parity with fp64, 200 runs of the same bits, compute-sanitizer where it is
# installed, then beside the plain kernel and its peers. Nine minutes on one H100 or H200; without a GPU its simulator: --device cpu.
#
#   OUT=results bash benchmarks/gpu/hopper.sh [--device cpu]
set -u
source "$(dirname "$0")/steps.sh"

tests=tests/kernels/attention/test_hopper.py
if [[ "$*" == "--device cpu" ]]; then
    step parity "$PYTHON" -m pytest -q $tests -k "any_lengths"
    end
    exit
fi
processes=()
"$PYTHON" -c "import xdist" 2> /dev/null && processes=(-n 8)  # compilation takes most of their time
MOST=200 step parity "$PYTHON" -m pytest -q -m gpu $tests "${processes[@]}"
step attention "$PYTHON" benchmarks/attn.py --quick --out "$OUT" --forms "Flex Triton" "SDPA cuDNN" "padded SDPA cuDNN"
if command -v compute-sanitizer > /dev/null; then
    MOST=90 step sanitizer compute-sanitizer --error-exitcode 1 "$PYTHON" -m pytest -q -m gpu $tests -k opcheck
fi
end
