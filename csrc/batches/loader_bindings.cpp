// The loader as Python sees it: arrays over the memory that the C++ side filled, without another copy.

#include "batches/loader_bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "batches/loader.h"

namespace py = pybind11;

namespace {

constexpr std::chrono::milliseconds kPatience{50};  // between two looks for Ctrl-C

template <typename T>
py::array view(T* data, size_t size, const py::capsule& owner) {
    return py::array(py::dtype::of<T>(), {size}, {sizeof(T)}, data, owner);
}

template <typename T>
py::array to_array(std::vector<T>&& values) {
    auto held = std::make_unique<std::vector<T>>(std::move(values));
    T* data = held->data();
    size_t size = held->size();
    py::capsule owner(held.release(), [](void* vector) { delete static_cast<std::vector<T>*>(vector); });
    return view(data, size, owner);
}

py::dict next(Loader& loader) {
    std::unique_ptr<Batch> batch;
    while (!batch) {
        {
            py::gil_scoped_release release;
            batch = loader.next(kPatience);
        }
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    }
    auto held = std::make_unique<std::shared_ptr<uint8_t>>(std::move(batch->memory));
    py::capsule owner(held.release(), [](void* memory) { delete static_cast<std::shared_ptr<uint8_t>*>(memory); });
    size_t count = batch->tokens_count;
    py::dict out;
    out["step"] = batch->step;
    out["source"] = batch->source;
    auto some = [&](auto* data, size_t size) { return data ? py::object(view(data, size, owner)) : py::none(); };
    bool language = !batch->rows.empty();
    out["tokens"] = some(batch->tokens, count);
    out["positions"] = some(batch->positions, count);
    out["targets"] = some(batch->targets, count);
    out["mask"] = some(reinterpret_cast<bool*>(batch->mask), count);
    out["width"] = batch->width;
    out["ids"] = some(batch->ids, count * batch->width);
    out["follow"] = batch->ids && language ? py::object(to_array(std::move(batch->follow))) : py::none();
    out["cu_seqlens"] = to_array(std::move(batch->cu_seqlens));
    out["fields"] = to_array(std::move(batch->fields));
    out["rows"] = language ? py::object(to_array(std::move(batch->rows))) : py::none();
    out["records"] = to_array(std::move(batch->records));
    out["groups"] = to_array(std::move(batch->groups));
    out["scores"] = to_array(std::move(batch->scores));
    out["state"] = to_array(std::move(batch->state));
    out["skipped"] = std::move(batch->skipped);
    return out;
}

std::vector<std::shared_ptr<const ShardSet>> constant(const std::vector<std::shared_ptr<ShardSet>>& sets) {
    return {sets.begin(), sets.end()};
}

}  // namespace

void bind_loader(py::module_& m) {
    py::class_<Mixture>(m, "Mixture")
        .def(py::init<const std::vector<double>&>())
        .def("drawn", [](Mixture& self, uint64_t steps) {
            self.seek(steps);
            return self.drawn();
        });

    py::enum_<Shape>(m, "Shape")
        .value("rows", Shape::rows)
        .value("records", Shape::records)
        .value("tokens", Shape::tokens);

    py::class_<Loader>(m, "Loader")
        .def(py::init([](const std::vector<std::shared_ptr<ShardSet>>& sets, const std::vector<double>& weights,
                         std::string kind, Shape shape, uint64_t batch, uint32_t max_tokens, uint32_t fields,
                         uint64_t multiple, uint64_t seed, uint32_t rank, uint32_t world, bool skip_bad_records,
                         bool raw, uint32_t threads, uint32_t ahead, uint64_t step,
                         const std::optional<std::vector<int64_t>>& state) {
                 py::gil_scoped_release release;
                 Settings settings{std::move(kind),  shape, batch, max_tokens, fields, multiple, seed, rank, world,
                                   skip_bad_records, raw};
                 Planner planner(settings, constant(sets), weights);
                 state ? planner.seek(*state) : planner.seek(step);
                 return std::make_unique<Loader>(settings, constant(sets), std::move(planner), threads, ahead);
             }),
             py::kw_only(), py::arg("sets"), py::arg("weights"), py::arg("kind"), py::arg("shape"), py::arg("batch"),
             py::arg("max_tokens"), py::arg("fields"), py::arg("multiple"), py::arg("seed"), py::arg("rank"),
             py::arg("world"), py::arg("skip_bad_records"), py::arg("raw"), py::arg("threads"), py::arg("ahead"),
             py::arg("step"), py::arg("state"))
        .def("next", &next)
        .def("close", &Loader::close, py::call_guard<py::gil_scoped_release>());
}
