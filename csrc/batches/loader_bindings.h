#pragma once

#include <pybind11/pybind11.h>

// Adds Mixture, Shape and Loader to the module.
void bind_loader(pybind11::module_& m);
