#!/usr/bin/env bash
# A transformer from nothing: configs/small.toml's four stages, what each brings, and the same without the two of language modelling. Nine minutes
# on one H100 or H200.
#
#   OUT=results bash benchmarks/gpu/small.sh [--section.key=value ...]
#
# INPUT names a folder of pack.py's parts, for a machine without the texts. First a few steps of the pretrain stage measure its rate; it then has as many
# steps as TRAIN_SECONDS allow, at most its own. Settings go to every training; CONFIG, RUN and TASKS name others than configs/small.toml and what
# belongs to it. Its stages are in stages.json and rates.json, those of the run without language modelling in stages-without.json.
set -u
source "$(dirname "$0")/steps.sh"
about configs/small.toml runs/small

if [[ ! -e "$OUT/rate.jsonl" ]]; then
    MOST=90 train rate "$OUT/rate" "$@" --stages="['pretrain']" --pretrain.steps="${RATE_STEPS:-10}" --validation.data={}
    cp "$OUT/rate/metrics.jsonl" "$OUT/rate.jsonl"
    rm -rf "$OUT/rate"
fi
steps=$("$PYTHON" benchmarks/gpu/affordable.py "$CONFIG" pretrain "${TRAIN_SECONDS:-240}" "$OUT/rate.jsonl" "$@")
train train "$RUN" "$@" --pretrain.steps="$steps"
cp "$RUN"/metrics.jsonl "$RUN"/loss.png "$RUN"/report.html "$OUT"
step rates "$PYTHON" benchmarks/rates.py "$RUN" --out "$OUT"
step stages "$PYTHON" benchmarks/stages.py "$RUN" "${tasks[@]}" --out "$OUT"
train without "$RUN-without" "$@" --stages="['weak', 'supervised']"
step stages-without "$PYTHON" benchmarks/stages.py "$RUN-without" "${tasks[@]}" --out "$OUT/without"
[[ ! -e "$OUT/without/stages.json" ]] || cp "$OUT/without/stages.json" "$OUT/stages-without.json"
end
