// Bin packing, best fit in decreasing order: the longest first, each into the fullest row that still has room for it.
// For texts of a language-model's corpus it fills rows to over 99% (Ding et al. 2024, "Fewer Truncations Improve
// Language Modeling"), and needs at most 11/9 of the fewest rows possible, plus one, in the worst case.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

// Rows by the room that they have left: a list for each room, and a bit for each list that is not empty.
class RowsByRoom {
public:
    explicit RowsByRoom(uint32_t most) : first_(most + 1, kNone), some_(most / 64 + 1, 0) {}

    // A row is put in when its number is the next one or after it was taken out.
    void put(uint32_t row, uint32_t room) {
        if (row >= next_.size()) next_.resize(row + 1);
        next_[row] = first_[room];
        first_[room] = row;
        some_[room / 64] |= uint64_t{1} << (room % 64);
    }

    // Takes out a row with the least room of at least `needed`: {row, its room}; kNone if there is none.
    std::pair<uint32_t, uint32_t> take(uint32_t needed) {
        uint64_t bits = some_[needed / 64] & (~uint64_t{0} << (needed % 64));
        for (uint32_t word = needed / 64;; bits = some_[word]) {
            if (bits != 0) {
                uint32_t room = word * 64 + __builtin_ctzll(bits), row = first_[room];
                first_[room] = next_[row];
                if (first_[room] == kNone) some_[word] &= ~(uint64_t{1} << (room % 64));
                return {row, room};
            }
            if (++word == some_.size()) return {kNone, 0};
        }
    }

    static constexpr uint32_t kNone = UINT32_MAX;

private:
    std::vector<uint32_t> first_, next_;
    std::vector<uint64_t> some_;
};

// The row of each length, in `row_of`; returns the number of rows. A length above `room` gets a row of its own.
inline uint32_t best_fit(const std::vector<uint32_t>& lengths, uint32_t room, std::vector<uint32_t>& row_of) {
    std::vector<uint32_t> place(room + 2, 0), order(lengths.size());  // by descending length: a counting sort
    for (uint32_t length : lengths) ++place[room - std::min(length, room) + 1];
    for (uint32_t i = 0; i <= room; ++i) place[i + 1] += place[i];
    for (uint32_t i = 0; i < lengths.size(); ++i) order[place[room - std::min(lengths[i], room)]++] = i;
    row_of.resize(lengths.size());
    RowsByRoom rows(room);
    uint32_t count = 0;
    for (uint32_t i : order) {
        uint32_t length = std::min(lengths[i], room);
        auto [row, left] = rows.take(length);
        if (row == RowsByRoom::kNone) {
            row = count++;
            left = room;
        }
        row_of[i] = row;
        rows.put(row, left - length);
    }
    return count;
}
