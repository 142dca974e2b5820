// Bin packing, best fit in decreasing order: the longest first, each into the fullest row that still has room for it. For
// texts of a language-model's corpus it fills rows to over 99% (Ding et al. 2024, "Fewer Truncations Improve Language
// Modeling"), and needs at most 11/9 of the fewest rows possible, plus one, in the worst case.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <vector>

// The row of each length, in `row_of`; returns the number of rows. A length above `room` gets a row of its own.
inline uint32_t best_fit(const std::vector<uint32_t>& lengths, uint32_t room, std::vector<uint32_t>& row_of) {
    std::vector<uint64_t> order(lengths.size());  // descending length, then ascending place
    for (size_t i = 0; i < lengths.size(); ++i) order[i] = uint64_t{~lengths[i]} << 32 | i;
    std::sort(order.begin(), order.end());
    row_of.resize(lengths.size());
    std::multimap<uint32_t, uint32_t> rows;  // room left -> row
    uint32_t count = 0;
    for (uint64_t entry : order) {
        uint32_t i = static_cast<uint32_t>(entry), length = std::min(lengths[i], room);
        auto best = rows.lower_bound(length);
        if (best == rows.end()) {
            row_of[i] = count;
            rows.emplace(room - length, count++);
        } else {
            row_of[i] = best->second;
            auto node = rows.extract(best);
            node.key() -= length;
            rows.insert(std::move(node));
        }
    }
    return count;
}
