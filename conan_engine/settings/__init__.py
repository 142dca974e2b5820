"""The settings of a run: read from a TOML file and the command line, checked, listed for --help. conan_engine/config.py
declares them."""

from conan_engine.settings.reading import from_dict, load

__all__ = ["from_dict", "load"]
