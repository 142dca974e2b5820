// The device's arrays as Python sees them: __cuda_array_interface__, which torch.as_tensor takes without a copy.

#include "unpack/unpack_bindings.h"

#ifndef CONAN_CUDA

void bind_unpack(pybind11::module_& m) { m.attr("has_cuda") = false; }

#else

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>

#include "unpack/unpack.h"

namespace py = pybind11;

namespace {

using Int32s = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

struct DeviceArray {
    std::shared_ptr<const Unpacked> owner;
    const void* data;
    size_t size;
    const char* type;

    py::dict interface() const {
        py::dict out;
        out["shape"] = py::make_tuple(size);
        out["typestr"] = type;
        out["data"] = py::make_tuple(reinterpret_cast<uintptr_t>(data), false);
        out["version"] = 2;
        return out;
    }
};

void require(bool holds, const std::string& message) {
    if (!holds) throw std::invalid_argument(message);
}

py::dict upload(Unpacker& self, const py::array_t<uint8_t, py::array::c_style>& ids, uint32_t width,
                const Int32s& cu_seqlens, const std::optional<Int32s>& follow, uintptr_t stream) {
    require(width == 2 || width == 3, "width: expected 2 or 3, got " + std::to_string(width));
    require(cu_seqlens.ndim() == 1 && cu_seqlens.size() >= 2,
            "cu_seqlens: expected one dimension and at least one sequence");
    const int32_t* starts = cu_seqlens.data();
    py::ssize_t sequences = cu_seqlens.size() - 1;
    bool ascends = starts[0] == 0;
    for (py::ssize_t i = 0; i < sequences; ++i) ascends &= starts[i] <= starts[i + 1];
    require(ascends && int64_t{starts[sequences]} * width == ids.size(),
            "cu_seqlens: expected to ascend from 0 to the number of ids, which take " + std::to_string(ids.size()) +
                " bytes");
    require(!follow || follow->size() == sequences, "follow: expected one number a sequence");

    Narrow batch{ids.data(), starts, follow ? follow->data() : nullptr, width, static_cast<int32_t>(sequences)};
    std::shared_ptr<const Unpacked> on_device;
    {
        py::gil_scoped_release release;
        on_device = self.upload(batch, reinterpret_cast<void*>(stream));
    }
    size_t count = on_device->tokens;
    py::dict out;
    out["tokens"] = DeviceArray{on_device, on_device->wide.tokens, count, "<i4"};
    out["cu_seqlens"] = DeviceArray{on_device, on_device->cu_seqlens, static_cast<size_t>(sequences) + 1, "<i4"};
    out["positions"] = DeviceArray{on_device, on_device->wide.positions, count, "<i4"};
    if (follow) {
        out["targets"] = DeviceArray{on_device, on_device->wide.targets, count, "<i4"};
        out["mask"] = DeviceArray{on_device, on_device->wide.mask, count, "|b1"};
    }
    return out;
}

}  // namespace

void bind_unpack(py::module_& m) {
    m.attr("has_cuda") = true;
    py::class_<DeviceArray>(m, "DeviceArray")
        .def_property_readonly("__cuda_array_interface__", &DeviceArray::interface);
    py::class_<Unpacker>(m, "Unpacker")
        .def(py::init<int, uint32_t>(), py::arg("device"), py::arg("slots"))
        .def("upload", &upload, py::arg("ids"), py::arg("width"), py::arg("cu_seqlens"), py::arg("follow"),
             py::arg("stream"));
}

#endif
