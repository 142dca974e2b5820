#!/usr/bin/env bash
# What comes before and after training, on a GPU: batches widened there (unpack.cu), a million texts encoded beside sentence-transformers, and hard
# negatives mined among a million documents. Nine minutes on one H100 or H200.
#
#   OUT=results bash benchmarks/gpu/encode.sh
#
# INPUT names a folder of pack.py's parts of configs/smollm.toml. Where RUN, runs/smollm, holds no trained model, one of two steps stands in for it:
# speed does not depend on what was learnt. For unpack.cu the engine has to be installed with nvcc at hand. TEXTS, BESIDE and DOCUMENTS: smaller numbers of
# them; DEVICE=cpu.
set -u
source "$(dirname "$0")/steps.sh"
about configs/smollm.toml runs/smollm
model=$RUN
if [[ ! -e "$RUN/checkpoints" ]]; then
    model=$OUT/two-steps
    [[ -e "$model/checkpoints" ]] || MOST=90 train two-steps "$model" --stages="['weak']" --weak.steps=2 --validation.data={}
fi
[[ "${DEVICE:-cuda}" == cpu ]] || MOST=120 step unpack "$PYTHON" -m pytest -q -m gpu tests/data/test_unpack.py tests/negatives/test_mining.py
MOST=240 step encode "$PYTHON" benchmarks/encode.py "$model" --texts "${TEXTS:-1000000}" --beside "${BESIDE:-50000}" "${tasks[@]}" --out "$OUT"
step mining "$PYTHON" benchmarks/mining.py --only index --index Flat --search "" --documents "${DOCUMENTS:-1000000}" --device "${DEVICE:-cuda}" --out "$OUT"
end
