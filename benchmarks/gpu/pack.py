"""What a run needs of this machine, for one that has neither the packages with the texts nor a network: parts of at
most 60 MB.

    python benchmarks/gpu/pack.py CONFIG FOLDER [--section.key=value ...] [--with PATH ...]
    bash benchmarks/gpu/unpack.sh FOLDER          # there, where FOLDER's parts have come together

Packs CONFIG's token shards and tokenizer (made first where they are not there), its init_from where that is a file, the
held-out tasks (as OUT_DIR/tasks.json.xz) and each PATH, by their names under the repository.
"""

import argparse
import lzma
import tarfile
from pathlib import Path

from conan_engine import command
from conan_engine.data import datasets
from conan_engine.errors import UserError
from conan_engine.evaluation import tasks
from conan_engine.settings import load

ROOT = Path(__file__).resolve().parent.parent.parent
PART = 60_000_000  # bytes
# one dictionary over all of it: the shards of two stages hold the same texts
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 2**29}]


class Parts:
    """A file for writing that is cut into parts."""

    def __init__(self, folder):
        self.folder, self.count, self.room, self.file = folder, 0, 0, None

    def write(self, content):
        view = memoryview(content)
        while view:
            if not self.room:
                self.close()
                self.file = open(self.folder / f"part-{self.count:02}", "wb")
                self.count, self.room = self.count + 1, PART
            done = self.file.write(view[: self.room])
            self.room, view = self.room - done, view[done:]
        return len(content)

    def close(self):
        if self.file:
            self.file.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--with", dest="paths", nargs="+", default=[], type=Path, metavar="PATH")
    arguments, settings = parser.parse_known_args()
    config = load(arguments.config, settings)
    run = Path(config.out_dir)
    datasets.prepare(config)
    tasks.save(tasks.load(), run / "tasks.json.xz")
    paths = [run / "data", run / "tasks.json.xz", *run.glob("tokenizer*"), *arguments.paths]
    paths += [Path(config.init_from)] if Path(config.init_from).is_file() else []
    outside = [path for path in paths if not path.resolve().is_relative_to(ROOT)]
    if outside:
        raise UserError(f"{outside[0]}: is not under {ROOT}, where it is unpacked; move it there")
    if arguments.folder.exists() and any(arguments.folder.iterdir()):
        raise UserError(f"{arguments.folder}: holds something already; empty it, or name another folder")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    parts = Parts(arguments.folder)
    with (
        lzma.open(parts, "wb", format=lzma.FORMAT_XZ, filters=FILTERS) as packed,
        tarfile.open(fileobj=packed, mode="w|", dereference=True) as tar,
    ):
        for path in paths:
            tar.add(path, path.absolute().relative_to(ROOT))
    parts.close()
    sizes = [path.stat().st_size for path in sorted(arguments.folder.iterdir())]
    print(f"{arguments.folder}: {len(sizes)} parts, {sum(sizes) / 1e6:.1f} MB")


if __name__ == "__main__":
    command.run(main)
