"""The package and its C++ extension (csrc/ -> conan_engine._loader), compiled by ninja: only what changed is rebuilt."""

import os
import shlex
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class NinjaBuild(build_ext):
    """CXX names another compiler, CXXFLAGS adds to the flags. No -march=native: a wheel runs on any machine of its kind."""

    def build_extension(self, extension):
        # not build_temp: an editable install gives a fresh one each time, and everything would be compiled again
        folder = ROOT / "build" / f"loader-{sysconfig.get_config_var('SOABI')}"
        folder.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(extension.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        includes = {pybind11.get_include(), sysconfig.get_path("include"), sysconfig.get_path("platinclude")}
        flags = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
        flags += [f"-isystem{path}" for path in sorted(includes)] + shlex.split(os.environ.get("CXXFLAGS", ""))
        objects = {str(ROOT / source): f"{Path(source).stem}.o" for source in extension.sources}
        lines = [
            f"cxx = {os.environ.get('CXX', 'c++')}",
            f"flags = {_escape(shlex.join(flags))}",
            "rule compile",
            "  command = $cxx $flags -MMD -MF $out.d -c $in -o $out",  # the .d file names the headers: a change rebuilds
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $cxx -shared $in -o $out",
            *(f"build {_path(name)}: compile {_path(source)}" for source, name in objects.items()),
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
    version="0.1.0",
    description="Trains text-embedding language models from scratch (Conan-embedding-v2, arXiv 2509.12892)",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=["conan_engine", "conan_engine.data", "conan_engine.data.sources", "conan_kernels"],
    package_dir={"conan_kernels": "kernels"},  # a top-level `kernels` would shadow the PyPI package of that name
    ext_modules=[Extension("conan_engine._loader", sorted(glob("csrc/*.cpp")), depends=sorted(glob("csrc/*.h")))],
    cmdclass={"build_ext": NinjaBuild},
    install_requires=["torch>=2.11", "numpy", "sentencepiece", "safetensors", "tqdm", "bm25s", "matplotlib"],
    extras_require={
        "gpu": ["triton>=3.6", "faiss-gpu", "mteb", "tensorboard"],
        "cpu": ["faiss-cpu"],
        "test": ["pytest", "hypothesis", "mteb", "pyarrow", "triton"],
        # The demo reads the message catalogues of Django, Wagtail, Sphinx and plone.app.locales, nothing else of them:
        # they are installed without their dependencies (pip install --no-deps), which an extra cannot say.
        "demo": [],
    },
)
