#!/usr/bin/env bash
# An embedding model from SmolLM2-135M: trained, evaluated after each stage, and beside sentence-transformers' own trainer. Nine minutes on one
# H100 or H200.
#
#   OUT=results bash benchmarks/gpu/smollm.sh [--section.key=value ...]
#
# INPUT names a folder of pack.py's parts, for a machine without the texts. First both trainers' rates are measured; then configs/smollm.toml is
# trained for as many steps of its weak stage as TRAIN_SECONDS allow, at most its own. PROBE="2e-4 1e-3": before that, so many short runs with
# these learning rates. Settings go to every training; CONFIG, RUN and TASKS name others than configs/smollm.toml and what belongs to it.
set -u
source "$(dirname "$0")/steps.sh"
about configs/smollm.toml runs/smollm

for lr in ${PROBE:-}; do
    MOST=60 train "probe-$lr" "$OUT/probe-$lr" "$@" --stages="['weak']" --weak.steps="${PROBE_STEPS:-60}" --weak.lr="$lr"
    cp "$OUT/probe-$lr/metrics.jsonl" "$OUT/probe-$lr.jsonl"
    rm -rf "${OUT:?}/probe-$lr"
done
share "$OUT/finetune/start"
MOST=110 step rates "$PYTHON" benchmarks/finetune.py "$CONFIG" "$@" --steps "${RATE_STEPS:-12}" "${tasks[@]}" --out "$OUT"
steps=$("$PYTHON" benchmarks/gpu/affordable.py "$CONFIG" weak "${TRAIN_SECONDS:-240}" "$OUT/finetune.json" "$@")
train train "$RUN" "$@" --weak.steps="$steps"
cp "$RUN"/metrics.jsonl "$RUN"/loss.png "$RUN"/report.html "$OUT"
step stages "$PYTHON" benchmarks/stages.py "$RUN" "${tasks[@]}" --out "$OUT"
step finetune "$PYTHON" benchmarks/finetune.py "$CONFIG" "$@" --steps "${RATE_STEPS:-12}" --minutes "${BESIDE_MINUTES:-0.75}" --compiled "${tasks[@]}" --out "$OUT"
rm -rf "$OUT/finetune"
end
