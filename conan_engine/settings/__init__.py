"""Settings: read from a TOML file and the command line, checked, and listed for --help. config.py declares them."""

from conan_engine.settings.reading import from_dict, load

__all__ = ["from_dict", "load"]
