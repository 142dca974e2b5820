"""A run as a model of mteb: `from conan_engine.mteb_adapter import Model`."""

from conan_engine.evaluation.mteb_adapter import Model

__all__ = ["Model"]
