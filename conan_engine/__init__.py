"""Conan engine: trains text-embedding language models from scratch (Conan-embedding-v2, arXiv 2509.12892)."""

from importlib.metadata import version

__version__ = version("conan-engine")
