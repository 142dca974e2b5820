#!/usr/bin/env bash
# Is soft-masked attention ahead of what else can be had? Parity with fp64, then beside FlexAttention, cuDNN and flash-attention 2.
# Nine minutes on one H100 or H200; ten seconds of it without a GPU, where the kernels run in Triton's interpreter: --device cpu.
#
#   OUT=results bash benchmarks/gpu/attention.sh [--device cpu]
set -u
source "$(dirname "$0")/steps.sh"

if [[ "$*" == "--device cpu" ]]; then
    parity=(-k alpha_0_is_causal) infonce=(--sizes 128 --width 64) ways="one_way_alone"
else
    infonce=(--sizes 4096 16384) ways="both_ways or one_way"
    parity=(-k "as_exact_as_pytorch and not 32768")
    "$PYTHON" -c "import xdist" 2> /dev/null && parity+=(-n 8)  # compilation takes most of their time
fi
MOST=150 step parity "$PYTHON" -m pytest -q tests/kernels/attention/test_api.py "${parity[@]}"
step attention "$PYTHON" benchmarks/attn.py --quick --out "$OUT" --forms "Flex Triton" "Flex FLASH" "SDPA cuDNN" "SDPA flash" "flash-attn 2" varlen "padded SDPA cuDNN" "$@"
# Is InfoNCE both ways right on this GPU, and what does it cost beside one way? (Predicted: at most 1.3 times as much.)
MOST=60 step infonce-parity "$PYTHON" -m pytest -q tests/kernels/info_nce/test_api.py -k "$ways"
MOST=60 step infonce "$PYTHON" benchmarks/infonce.py --out "$OUT" --forms ours "ours, both ways" "ours, twice" "${infonce[@]}"
end
