#!/usr/bin/env bash
# What one GPU shows of the path for several: two processes that share it, beside one; and what of the exchange with NCCL hides behind the backward
# pass. Five minutes on one H100 or H200. Reads the documentation of installed packages and needs no INPUT.
#
#   OUT=results bash benchmarks/gpu/ranks.sh
#
# DEVICE=cpu with --quick rehearses it.
set -u
source "$(dirname "$0")/steps.sh"
step ranks "$PYTHON" benchmarks/ranks.py --device "${DEVICE:-cuda}" --out "$OUT" "$@"
end
