"""A run as other software loads it:
`python -m conan_engine.export RUN FOLDER [--format ...] [--dtype ...] [--instruction ...]`.

sentence-transformers  (the same folder is a transformers model)
gguf                   llama.cpp: llama-embedding, llama-server --embedding
onnx                   one graph from ids and mask to unit vectors
"""

from __future__ import annotations

import argparse
import importlib
import shutil
from pathlib import Path

from safetensors import SafetensorError

from conan_engine import __version__, command
from conan_engine.errors import UserError
from conan_engine.evaluation.encoder import Encoder

FORMATS = {  # name: (module, what it imports, its dtypes, the first one the default)
    "sentence-transformers": ("sentence_transformers", (), ("float32", "bfloat16", "float16")),
    "gguf": ("gguf", ("gguf",), ("float32", "bfloat16", "float16", "q8_0")),
    "onnx": ("onnx", ("onnx", "onnxscript"), ("float32",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"conan-engine {__version__}")
    parser.add_argument("run", help="a run folder, such as runs/demo, or one of its checkpoints")
    parser.add_argument("folder", type=lambda path: Path(path).absolute(), help="the folder to make")
    parser.add_argument("--format", choices=FORMATS, default="sentence-transformers")
    parser.add_argument(
        "--dtype", default="float32", help="of the weights: float32 (default), bfloat16, float16; in gguf also q8_0"
    )
    parser.add_argument(
        "--instruction",
        help="sentence-transformers: what queries were trained behind; `encode_query` puts it before them, and so "
        'does prompt_name="query"',
    )
    arguments = parser.parse_args()
    module, packages, dtypes = FORMATS[arguments.format]
    if arguments.dtype not in dtypes:
        raise UserError(f"--dtype is {arguments.dtype}; {arguments.format} has {', '.join(dtypes)}")
    if arguments.instruction is not None and arguments.format != "sentence-transformers":
        raise UserError(
            f"--instruction is for sentence-transformers; {arguments.format} has no place for it: put it, and a "
            "new line, before each query"
        )
    if arguments.folder.exists() and not (arguments.folder.is_dir() and not any(arguments.folder.iterdir())):
        raise UserError(f"{arguments.folder}: is there already; empty it, or name another folder")
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(
                f"--format={arguments.format} needs the package {package} ({error}); pip install {package}"
            ) from None
    encoder = Encoder.load(arguments.run)
    extra = {"instruction": arguments.instruction} if arguments.instruction else {}
    partial = arguments.folder.with_name(f".{arguments.folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        importlib.import_module(f"conan_engine.export.{module}").write(
            partial, arguments.run, encoder, arguments.dtype, **extra
        )
        partial.replace(arguments.folder)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{arguments.folder}: cannot write it ({error}); name a folder that can be made and has room"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    size = sum(path.stat().st_size for path in arguments.folder.rglob("*") if path.is_file())
    print(f"{arguments.folder}: {arguments.format}, {arguments.dtype}, {size / 1e6:,.1f} MB")


if __name__ == "__main__":
    command.run(main)
