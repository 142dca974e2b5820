"""Hand-written Triton kernels, importable as `conan_kernels`."""

from conan_kernels.info_nce import InfoNCE, Margin, info_nce  # noqa: F401
