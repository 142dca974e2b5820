// What each step holds, and which part of it is this rank's. A plan needs lengths and positions, but no tokens. The
// global batch of a step depends on the seed, the sources and the step alone, never on ranks or threads.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "batches/mixture.h"
#include "batches/order.h"
#include "shards/reader.h"

enum class Shape {
    rows,     // `batch` rows of at most max_tokens tokens; records are split where longer and packed by best fit
    records,  // `batch` records
    tokens,   // as many records as `batch` tokens hold, a multiple of `multiple`
};

struct Settings {
    std::string kind;  // "text", "instruction": a record is a sequence; "pairs", "sts": a field is one
    Shape shape = Shape::records;
    uint64_t batch = 0;       // over all ranks
    uint32_t max_tokens = 0;  // of a row, or of a field, which is cut; 0: as long as they are
    uint32_t fields = 2;      // the first so many of a record; pairs and sts
    uint64_t multiple = 1;    // the number of records is a multiple of it; shape tokens
    uint64_t seed = 0;
    uint32_t rank = 0, world = 1;
    bool skip_bad_records = false;
    // ids as they are stored, for unpack.cu; not for instructions, whose targets are not just the next tokens
    bool raw = false;

    bool language() const { return kind == "text" || kind == "instruction"; }
};

// A record, or a part of one.
struct Piece {
    const ShardFile* file;
    uint64_t record, in_file;  // its number in the source, and in the file
    Span tokens;
    bool first, last;  // whether it begins and ends where the record does
};

struct Plan {
    uint64_t step = 0;
    uint32_t source = 0;
    std::vector<int64_t> records;     // this rank's, for the shapes records and tokens
    std::vector<Piece> pieces;        // this rank's, for the shape rows
    std::vector<uint32_t> row_start;  // of each row, its first piece; then the number of pieces
    std::vector<int64_t> after;       // the state after this step, for Planner::seek
};

// Appends these records, each in one piece.
void append_records(const ShardSet& set, const std::vector<int64_t>& records, std::vector<Piece>& pieces);

class Planner {
public:
    // Throws std::invalid_argument for settings that do not fit together.
    Planner(const Settings& settings, std::vector<std::shared_ptr<const ShardSet>> sources,
            const std::vector<double>& weights);

    // Moves to the step after the Plan whose `after` is `state`; or to `step`, by counting through all steps before it,
    // which is free for the shape records. Throws std::invalid_argument for a state of other sources.
    void seek(uint64_t step);
    void seek(const std::vector<int64_t>& state);

    Plan next();
    std::vector<int64_t> state() const;  // [step, then per source: position, rows used]

private:
    struct Source {
        std::shared_ptr<const ShardSet> set;
        uint64_t seed = 0;
        uint64_t position = 0;      // in the endless run of epochs: the next record, or the first of the window
        uint64_t rows_used = 0;     // of the window
        uint64_t window_end = 0;    // its position; 0: no window has been made
        std::vector<Piece> pieces;  // the window's, row by row
        std::vector<uint32_t> row_start;
        std::optional<Order> order;
        uint64_t order_epoch = 0;
    };

    int64_t record_at(Source& source, uint64_t position) const;
    void make_window(Source& source) const;
    void take_rows(Source& source, Plan& plan) const;
    void take_records(Source& source, Plan& plan, uint64_t count) const;
    uint64_t records_within_budget(Source& source) const;

    Settings settings_;
    std::vector<Source> sources_;
    Mixture mixture_;
    uint64_t step_ = 0;
};
