// conan_engine._loader: what conan_engine/data/shards.py needs of the C++ side.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <optional>

#include "batches/loader_bindings.h"
#include "batches/mix.h"
#include "batches/order.h"
#include "shards/crc32c.h"
#include "shards/reader.h"
#include "shards/writer.h"
#include "unpack/unpack_bindings.h"

namespace py = pybind11;

namespace {

using Int64s = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;
using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;

// The values of a one-dimensional array, to be read without the GIL.
struct View {
    explicit View(const Int64s& array) : data(array.data()), size(array.size()) {
        if (array.ndim() != 1)
            throw std::invalid_argument("expected a one-dimensional array, got " + std::to_string(array.ndim()) +
                                        " dimensions");
    }
    const int64_t* data;
    size_t size;
};

// out[i] = f(i), without the GIL.
template <typename T, typename F>
py::array_t<T> map(size_t size, F f) {
    py::array_t<T> out(size);
    T* data = out.mutable_data();
    py::gil_scoped_release release;
    for (size_t i = 0; i < size; ++i) data[i] = f(i);
    return out;
}

void check_same_size(const View& records, const View& fields) {
    if (records.size != fields.size)
        throw std::invalid_argument("expected as many fields as records (" + std::to_string(records.size) + "), got " +
                                    std::to_string(fields.size));
}

py::tuple gather(const ShardSet& set, const Int64s& records_array, const Int64s& fields_array,
                 std::optional<int64_t> limit) {
    View records(records_array), fields(fields_array);
    check_same_size(records, fields);
    if (limit && *limit < 0) throw std::invalid_argument("limit: expected 0 or more, got " + std::to_string(*limit));

    py::array_t<int32_t> cu_seqlens_array(records.size + 1);
    int32_t* cu_seqlens = cu_seqlens_array.mutable_data();
    std::vector<std::pair<ShardSet::Place, Span>> spans(records.size);
    uint64_t total = 0;
    {
        py::gil_scoped_release release;
        cu_seqlens[0] = 0;
        for (size_t i = 0; i < records.size; ++i) {
            spans[i] = set.find(records.data[i], fields.data[i]);
            Span& span = spans[i].second;
            if (limit && span.count > *limit) span.count = static_cast<uint32_t>(*limit);
            total += span.count;
            if (total > INT32_MAX)
                throw std::invalid_argument(
                    "gather: expected at most 2147483647 tokens in all, got more; ask for fewer records");
            cu_seqlens[i + 1] = static_cast<int32_t>(total);
        }
    }
    py::array_t<int32_t> tokens_array(total);
    int32_t* tokens = tokens_array.mutable_data();
    {
        py::gil_scoped_release release;
        int64_t now = ShardFile::steady_now();
        for (size_t i = 0; i < spans.size(); ++i) {
            auto& [place, span] = spans[i];
            place.file->check_unchanged(now);
            place.file->read(place.record, span, {tokens + cu_seqlens[i]});
        }
    }
    return py::make_tuple(tokens_array, cu_seqlens_array);
}

// Appends records up to the one with which the shard would be larger than `limit` bytes, but one at least to an empty
// shard; returns how many.
uint64_t add(ShardWriter& writer, const Int64s& tokens_array, const Int64s& field_tokens_array,
             const Int64s& record_fields_array, const Floats& scores_array, const Int64s& groups_array,
             uint64_t limit) {
    View tokens(tokens_array), field_tokens(field_tokens_array), record_fields(record_fields_array),
        groups(groups_array);
    if (record_fields.size != groups.size || static_cast<size_t>(scores_array.size()) != groups.size)
        throw std::invalid_argument("expected field counts, scores and groups of as many records");
    const float* scores = scores_array.data();
    py::gil_scoped_release release;
    uint64_t field = 0, token = 0;
    for (size_t i = 0; i < groups.size; ++i) {
        uint64_t fields = record_fields.data[i], count = 0;
        if (fields > field_tokens.size - field) throw std::invalid_argument("expected the lengths of all fields");
        for (uint64_t f = field; f < field + fields; ++f) {
            uint64_t length = field_tokens.data[f];
            if (length > tokens.size - token - count) throw std::invalid_argument("expected the tokens of all fields");
            count += length;
        }
        if (writer.records() > 0 && writer.bytes_with(1, fields, count) > limit) return i;
        writer.add(tokens.data + token, field_tokens.data + field, fields, scores[i], groups.data[i]);
        field += fields;
        token += count;
    }
    return groups.size;
}

py::array_t<int32_t> lengths(const ShardSet& set, const Int64s& records_array, const Int64s& fields_array) {
    View records(records_array), fields(fields_array);
    check_same_size(records, fields);
    return map<int32_t>(records.size, [&](size_t i) {
        return static_cast<int32_t>(set.find(records.data[i], fields.data[i]).second.count);
    });
}

// 64 bits that stand for a field's tokens: equal for equal ones.
py::array_t<int64_t> hashes(const ShardSet& set, const Int64s& records_array, const Int64s& fields_array) {
    View records(records_array), fields(fields_array);
    check_same_size(records, fields);
    int64_t now = ShardFile::steady_now();
    std::vector<int32_t> tokens;
    return map<int64_t>(records.size, [&](size_t i) {
        auto [place, span] = set.find(records.data[i], fields.data[i]);
        place.file->check_unchanged(now);
        tokens.resize(span.count);
        place.file->read(place.record, span, {tokens.data()});
        uint64_t hash = span.count;
        for (int32_t token : tokens) hash = mix(hash ^ static_cast<uint64_t>(token));
        return static_cast<int64_t>(hash);
    });
}

// What each file says of itself, to be held against the manifest.
py::list describe(const ShardSet& set) {
    py::list out;
    for (const auto& file : set.files()) {
        const Header& h = file->header();
        const Footer& f = file->footer();
        py::dict shard;
        shard["kind"] = py::bytes(h.kind, strnlen(h.kind, sizeof h.kind));
        shard["tokenizer"] = py::bytes(reinterpret_cast<const char*>(h.tokenizer), sizeof h.tokenizer);
        shard["vocab_size"] = h.vocab_size;
        shard["records"] = f.records;
        shard["tokens"] = f.tokens;
        shard["bytes"] = file->bytes();
        shard["crc32c"] = f.crc;
        out.append(shard);
    }
    return out;
}

py::array_t<int64_t> order(uint64_t seed, uint64_t epoch, int64_t count, const Int64s& positions_array) {
    View positions(positions_array);
    if (count < 1 || count > (int64_t{1} << 62))
        throw std::invalid_argument("count: expected 1 to 2^62, got " + std::to_string(count));
    Order permutation(seed, epoch, count);
    return map<int64_t>(positions.size, [&](size_t i) {
        int64_t position = positions.data[i];
        if (position < 0 || position >= count)
            throw std::out_of_range("position: expected 0 to " + std::to_string(count) + " (exclusive), got " +
                                    std::to_string(position));
        return static_cast<int64_t>(permutation(position));
    });
}

}  // namespace

PYBIND11_MODULE(_loader, m) {
    m.doc() = "Token shards and sampling order in C++; see csrc/shards/FORMAT.md. Use conan_engine.data.shards.";

    py::register_exception_translator([](std::exception_ptr thrown) {
        try {
            std::rethrow_exception(thrown);
        } catch (const UserError& error) {
            py::set_error(py::module_::import("conan_engine.errors").attr("UserError"), error.what());
        }
    });

    py::class_<ShardWriter>(m, "ShardWriter")
        .def(py::init([](std::string path, const std::string& kind, const py::bytes& tokenizer, uint64_t vocab_size) {
            return std::make_unique<ShardWriter>(std::move(path), kind, tokenizer, vocab_size);
        }))
        .def("add", &add)
        .def("bytes_with", &ShardWriter::bytes_with)
        .def("finish", &ShardWriter::finish, py::call_guard<py::gil_scoped_release>())
        .def_property_readonly("records", &ShardWriter::records)
        .def_property_readonly("tokens", &ShardWriter::tokens);

    py::class_<ShardSet, std::shared_ptr<ShardSet>>(m, "ShardSet")
        .def(py::init<const std::vector<std::string>&>(), py::call_guard<py::gil_scoped_release>())
        .def("__len__", &ShardSet::records)
        .def("describe", &describe)
        .def("gather", &gather)
        .def("lengths", &lengths)
        .def("hashes", &hashes)
        .def("field_counts",
             [](const ShardSet& set, const Int64s& array) {
                 View records(array);
                 return map<int32_t>(records.size, [&](size_t i) {
                     auto at = set.find(records.data[i]);
                     return at.file->field_count(at.record);
                 });
             })
        .def("scores",
             [](const ShardSet& set, const Int64s& array) {
                 View records(array);
                 return map<float>(records.size, [&](size_t i) {
                     auto at = set.find(records.data[i]);
                     return at.file->score(at.record);
                 });
             })
        .def("groups", [](const ShardSet& set, const Int64s& array) {
            View records(array);
            return map<int64_t>(records.size, [&](size_t i) {
                auto at = set.find(records.data[i]);
                return at.file->group(at.record);
            });
        });

    bind_loader(m);
    bind_unpack(m);
    m.def("order", &order);
    m.def("crc32c", [](const py::bytes& data) {
        std::string_view view = data;
        return crc32c(view.data(), view.size());
    });
    m.def("crc32c_portable", [](const py::bytes& data) {
        std::string_view view = data;
        return crc32c_portable(view.data(), view.size());
    });
}
