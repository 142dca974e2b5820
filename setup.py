"""The package and its C++ extension (csrc/ -> conan_engine._loader), compiled by ninja: only what changed is
rebuilt."""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
COMMANDS = "train prepare mine translate encode evaluate search report export follow".split()
NVCC = os.environ.get("NVCC", shutil.which("nvcc") or "")


class NinjaBuild(build_ext):
    """CXX names another compiler, CXXFLAGS adds to the flags. No -march=native: a wheel runs on any machine of its
    kind.

    Where nvcc is found (NVCC names it; empty: leave it out) unpack.cu is built too, for sm_80, sm_90 and, by its PTX,
    newer ones. The CUDA runtime is linked in, so that the same file loads on a machine without CUDA.
    """

    def build_extension(self, extension):
        # not build_temp: an editable install gives a fresh one each time, and everything would be compiled again
        folder = ROOT / "build" / f"loader-{sysconfig.get_config_var('SOABI')}"
        folder.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(extension.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        includes = {pybind11.get_include(), sysconfig.get_path("include"), sysconfig.get_path("platinclude")}
        flags = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", f"-I{ROOT / 'csrc'}"]
        flags += [f"-isystem{path}" for path in sorted(includes)] + shlex.split(os.environ.get("CXXFLAGS", ""))
        flags += ["-DCONAN_CUDA"] if NVCC else []
        objects = {
            str(ROOT / source): str(Path(source).relative_to("csrc").with_suffix(".o")) for source in extension.sources
        }
        lines = [
            f"cxx = {os.environ.get('CXX', 'c++')}",
            f"nvcc = {_escape(shlex.quote(NVCC))} -ccbin $cxx",
            f"flags = {_escape(shlex.join(flags))}",
            "rule compile",
            # the .d file names the headers: a change rebuilds
            "  command = $cxx $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule compile_cuda",
            f"  command = $nvcc -O3 -std=c++17 -I{_escape(shlex.quote(str(ROOT / 'csrc')))} -Xcompiler "
            "-fPIC,-fvisibility=hidden,-Wall -gencode arch=compute_80,code=compute_80 "
            "-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {'$nvcc -cudart static' if NVCC else '$cxx'} -shared $in -o $out",
            *(
                f"build {_path(name)}: {'compile_cuda' if source.endswith('.cu') else 'compile'} {_path(source)}"
                for source, name in objects.items()
            ),
            f"build {_path(output)}: link {' '.join(map(_path, objects.values()))}",
            "",
        ]
        (folder / "build.ninja").write_text("\n".join(lines), encoding="utf-8")
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], check=True)


def _escape(text):
    return text.replace("$", "$$")


def _path(path):
    return _escape(str(path)).replace(" ", "$ ").replace(":", "$:")


setup(
    name="conan-engine",
    description="Trains text-embedding language models from scratch (Conan-embedding-v2, arXiv 2509.12892)",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["conan_engine*"]),
        "conan_kernels",
        *(f"conan_kernels.{name}" for name in find_packages("kernels")),
        "conan_engine.configs",
    ],
    package_data={
        "conan_engine": ["py.typed", "_loader.pyi", "report/page.html"],
        "conan_kernels": ["py.typed"],
        "conan_engine.configs": ["*.toml"],
    },
    # a top-level `kernels` would shadow the PyPI package of that name
    package_dir={"conan_kernels": "kernels", "conan_engine.configs": "configs"},
    entry_points={"console_scripts": [f"conan-{name} = conan_engine.command:script" for name in COMMANDS]},
    ext_modules=[
        Extension(
            "conan_engine._loader",
            sorted(glob("csrc/**/*.cpp", recursive=True)) + ["csrc/unpack/unpack.cu"] * bool(NVCC),
            depends=sorted(glob("csrc/**/*.h", recursive=True)),
        )
    ],
    cmdclass={"build_ext": NinjaBuild},
    install_requires=[
        "torch>=2.11",
        "numpy",
        "sentencepiece",
        "safetensors",
        "tokenizers",
        "loky",
        "tqdm",
        "bm25s",
        "matplotlib",
        "scikit-learn",
        "polib",
        "pyyaml",
        "jinja2",
    ],
    extras_require={
        "gpu": ["triton>=3.6", "faiss-gpu", "mteb", "tensorboard"],
        "cpu": ["faiss-cpu"],
        "gguf": ["gguf"],
        "export": ["gguf", "onnx", "onnxscript"],
        "hub": ["datasets"],
        "zstd": ["zstandard"],
        "ray": ["ray"],
        "teacher": ["sentence-transformers"],
        "translate": ["httpx"],
        "test": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "mteb",
            "datasets",
            "pyarrow",
            "zstandard",
            "httpx",
            "triton",
            "sentence-transformers",
            "gguf",
            "accelerate",
            "onnx",
            "onnxscript",
            "onnxruntime",
        ],
        "check": ["ruff", "clang-format", "codespell", "mypy"],
        "docs": ["mkdocs-material", "mkdocstrings[python]"],
        # Text of the demo. It also reads packages that are installed without their dependencies, which an extra cannot
        # say: see the Makefile.
        "demo": ["scipy", "scikit-learn", "pandas", "polars", "sentence-transformers", "mteb"],
    },
)
