"""How many steps of a config's stage fit into some seconds, at most its own, by a rate that was measured.

    python benchmarks/gpu/affordable.py CONFIG STAGE SECONDS RATES [--section.key=value ...]

RATES: a finetune.json (of ours), or the metrics.jsonl of a short run. Prints the number. Where RATES is not there it is
the config's own.
"""

import json
import statistics
import sys
from pathlib import Path

from conan_engine import command
from conan_engine.settings import load


def seconds_a_step(path, stage):
    """By a file of rates, or 0."""
    if not path.exists():
        return 0.0
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return next(
            (
                row["seconds_a_step"]
                for row in json.loads(text)["rows"]
                if (row["trainer"], row["question"]) == ("ours", "rate")
            ),
            0.0,
        )
    found = [row["seconds"] for row in map(json.loads, text.splitlines()) if row["stage"] == stage]
    return statistics.median(found[len(found) // 4 :]) if found else 0.0  # the first ones compile kernels


def main():
    path, stage, seconds, rates, *settings = sys.argv[1:]
    own, rate = getattr(load(path, settings), stage).steps, seconds_a_step(Path(rates), stage)
    print(max(1, min(own, int(float(seconds) / rate))) if rate else own)


if __name__ == "__main__":
    command.run(main)
