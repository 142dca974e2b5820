#pragma once

#include <pybind11/pybind11.h>

// Adds has_cuda and, where that is true, Unpacker to the module.
void bind_unpack(pybind11::module_& m);
