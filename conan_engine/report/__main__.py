"""Write RUN/report.html: settings, curves, scores, sample searches and a map.

One file, which a browser shows without network. train.py writes it when a run
ends, and evaluate writes it again with its scores. This command writes it at
any time, also while the run trains.

Example:
    python -m conan_engine.report runs/demo
"""

from __future__ import annotations

from conan_engine import command
from conan_engine.report import page


def main() -> None:
    parser = command.Parser("report", __doc__)
    parser.add_argument("run", metavar="RUN", help="a run's folder, such as runs/demo")
    print(page.write(parser.parse_args().run))


if __name__ == "__main__":
    command.run(main)
