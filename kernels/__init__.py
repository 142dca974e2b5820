"""Hand-written Triton kernels, importable as `conan_kernels`."""
