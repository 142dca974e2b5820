"""Export a run for other software. FOLDER holds no code of ours.

    sentence-transformers   FOLDER is a model of transformers, too
    gguf                    a file for llama.cpp
    onnx                    a graph from ids and mask to unit vectors

Examples:
    python -m conan_engine.export runs/demo demo-model
    python -m conan_engine.export runs/demo demo-gguf --format gguf --dtype q8_0
"""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

from safetensors import SafetensorError

from conan_engine import command
from conan_engine.errors import UserError
from conan_engine.evaluation.encoder import Encoder

FORMATS = {  # name: (module, packages that it imports, dtypes, the first one the default)
    "sentence-transformers": ("sentence_transformers", (), ("float32", "bfloat16", "float16")),
    "gguf": ("gguf", ("gguf",), ("float32", "bfloat16", "float16", "q8_0")),
    "onnx": ("onnx", ("onnx", "onnxscript"), ("float32",)),
}


def main() -> None:
    parser = command.Parser("export", __doc__)
    parser.add_argument("run", metavar="RUN", help="a run's folder, such as runs/demo, or a checkpoint's")
    parser.add_argument(
        "folder", metavar="FOLDER", type=lambda path: Path(path).absolute(), help="the folder to create"
    )
    parser.add_argument("--format", choices=FORMATS, default="sentence-transformers", help="which software it is for")
    parser.add_argument(
        "--dtype",
        default="float32",
        metavar="DTYPE",
        help="of the weights: float32, bfloat16 or float16; for gguf also q8_0; for onnx float32 alone",
    )
    parser.add_argument(
        "--instruction",
        metavar="TEXT",
        help="for sentence-transformers: encode_query puts TEXT and a new line before each query",
    )
    arguments = parser.parse_args()
    module, packages, dtypes = FORMATS[arguments.format]
    if arguments.dtype not in dtypes:
        raise UserError(f"--dtype is {arguments.dtype}; expected {' or '.join(dtypes)} for {arguments.format}")
    if arguments.instruction is not None and arguments.format != "sentence-transformers":
        raise UserError(
            f"--instruction is for sentence-transformers; {arguments.format} has no place for it: put it and a new "
            "line before each query yourself"
        )
    if arguments.folder.exists() and not (arguments.folder.is_dir() and not any(arguments.folder.iterdir())):
        raise UserError(f"{arguments.folder}: exists already; empty it, or name another folder")
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
            f"{arguments.folder}: cannot write it ({error}); name a folder that can be created and has room"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    size = sum(path.stat().st_size for path in arguments.folder.rglob("*") if path.is_file())
    print(f"{arguments.folder}: {arguments.format}, {arguments.dtype}, {size / 1e6:,.1f} MB")


if __name__ == "__main__":
    command.run(main)
