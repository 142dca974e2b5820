#!/usr/bin/env bash
# Is soft-masked attention ahead of what else can be had? Parity with fp64, then beside FlexAttention, cuDNN and flash-attention 2.
# Nine minutes on one H100 or H200; ten seconds of it without a GPU, where the kernels run in Triton's interpreter: --device cpu.
#
#   OUT=results bash benchmarks/gpu/attention.sh [--device cpu]
set -u
source "$(dirname "$0")/steps.sh"

if [[ "$*" == "--device cpu" ]]; then
    parity=(-k alpha_0_is_causal)
else
    parity=(-k "as_exact_as_pytorch and not 32768")
    "$PYTHON" -c "import xdist" 2> /dev/null && parity+=(-n 8)  # compilation takes most of their time
fi
MOST=150 step parity "$PYTHON" -m pytest -q tests/kernels/test_soft_mask_attention.py "${parity[@]}"
step attention "$PYTHON" benchmarks/attn.py --quick --out "$OUT" --forms "Flex Triton" "Flex FLASH" "SDPA cuDNN" "SDPA flash" "flash-attn 2" varlen "padded SDPA cuDNN" "$@"
end
