"""How many steps of a config's weak stage fit into some seconds, at most its own, by the rate that finetune.py has measured.

    python benchmarks/gpu/affordable.py CONFIG FINETUNE.json SECONDS [--section.key=value ...]

Prints the number. Without a measured rate it is the config's own.
"""

import json
import sys
from pathlib import Path

from conan_engine import errors
from conan_engine.config import load


def main():
    path, measured, seconds, *settings = sys.argv[1:]
    own = load(path, settings).weak.steps
    rows = json.loads(Path(measured).read_text(encoding="utf-8"))["rows"] if Path(measured).exists() else []
    rate = next((row["seconds_a_step"] for row in rows if (row["trainer"], row["question"]) == ("ours", "rate")), 0.0)
    print(max(1, min(own, int(float(seconds) / rate))) if rate else own)


if __name__ == "__main__":
    errors.run(main)
