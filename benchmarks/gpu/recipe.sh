#!/usr/bin/env bash
# The ablation from a real language model: as many rows of recipe.py as nine minutes on one H100 or H200 allow, most telling arms first.
#
#   OUT=results bash benchmarks/gpu/recipe.sh [--seeds 3] [--arm ARM ...]
#
# INPUT names a folder of pack.py's parts, for a machine without the texts. Its rows go on behind those of $OUT/recipe-smollm.json, or of
# benchmarks/results/recipe-smollm.json where that is not there yet. CONFIG, RUN and TASKS name others than configs/recipe-smollm.toml and what
# belongs to it.
set -u
source "$(dirname "$0")/steps.sh"
about configs/recipe-smollm.toml runs/recipe-smollm
rows=$(basename "$CONFIG" .toml).json
[[ -e "$OUT/$rows" || ! -e "benchmarks/results/$rows" ]] || cp "benchmarks/results/$rows" "$OUT"
hours=$("$PYTHON" -c "print((${MINUTES:-9} * 60 - $SECONDS - ${LAST_SECONDS:-60}) / 3600)")  # an arm that has begun is to end
step recipe "$PYTHON" benchmarks/recipe.py --config "$CONFIG" --seeds 3 "${tasks[@]}" --hours "$hours" --out "$OUT" "$@"
end
