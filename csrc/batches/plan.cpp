#include "batches/plan.h"

#include "batches/best_fit.h"

namespace {

// A window is what is packed at once: enough rows that the last, which stay part empty, do not matter; few enough
// records that it is made in milliseconds.
constexpr uint32_t kWindowRows = 256;
constexpr uint64_t kWindowRecords = 65536;

}  // namespace

void append_records(const ShardSet& set, const std::vector<int64_t>& records, std::vector<Piece>& pieces) {
    size_t first = pieces.size();
    for (int64_t record : records) {
        ShardSet::Place place = set.find(record);
        pieces.push_back({place.file, static_cast<uint64_t>(record), place.record, {}, true, true});
        place.file->prefetch_record(place.record);
    }
    for (size_t i = first; i < pieces.size(); ++i) pieces[i].file->prefetch_fields(pieces[i].in_file);
    for (size_t i = first; i < pieces.size(); ++i) pieces[i].tokens = pieces[i].file->whole(pieces[i].in_file);
}

Planner::Planner(const Settings& settings, std::vector<std::shared_ptr<const ShardSet>> sources,
                 const std::vector<double>& weights)
    : settings_(settings), mixture_(weights) {
    const Settings& s = settings_;
    auto require = [](bool holds, const std::string& message) {
        if (!holds) throw std::invalid_argument(message);
    };
    require(sources.size() == weights.size(), "sources: expected one a weight");
    require(s.batch >= 1 && s.batch <= INT32_MAX, "batch: expected 1 to 2147483647, got " + std::to_string(s.batch));
    require(s.world >= 1 && s.rank < s.world,
            "rank: expected 0 to world - 1, got " + std::to_string(s.rank) + " of " + std::to_string(s.world));
    uint64_t shared = s.shape == Shape::tokens ? s.multiple : s.batch;
    require(shared >= 1 && shared % s.world == 0, (s.shape == Shape::tokens ? "multiple: " : "batch: ") +
                                                      std::to_string(shared) + " cannot be split evenly over " +
                                                      std::to_string(s.world) + " ranks");
    require(s.shape != Shape::rows || (s.language() && s.max_tokens > 0),
            "shape rows: expected text or instruction records and max_tokens above 0");
    require(s.shape != Shape::tokens || !s.language(), "shape tokens: expected pairs or sts records");
    require(s.fields >= 1 && s.fields <= kMaxFields, "fields: expected 1 to 65535, got " + std::to_string(s.fields));
    for (auto& set : sources) {
        require(set->records() > 0, "source " + std::to_string(sources_.size()) + ": holds no records");
        Source source;
        source.set = std::move(set);
        source.seed = s.seed + 1'000'003 * sources_.size();  // each source its own permutations
        sources_.push_back(std::move(source));
    }
}

void Planner::seek(uint64_t step) {
    if (settings_.shape == Shape::records) {
        mixture_.seek(step);
        for (size_t i = 0; i < sources_.size(); ++i) sources_[i].position = mixture_.drawn()[i] * settings_.batch;
        step_ = step;
        return;
    }
    if (step < step_) {
        mixture_.seek(0);
        for (Source& source : sources_) source.position = source.rows_used = source.window_end = 0;
        step_ = 0;
    }
    while (step_ < step) next();
}

void Planner::seek(const std::vector<int64_t>& state) {
    bool good = state.size() == 1 + 2 * sources_.size();
    for (int64_t value : state) good &= value >= 0;
    if (!good)
        throw std::invalid_argument("state: expected " + std::to_string(1 + 2 * sources_.size()) +
                                    " numbers of 0 or more (step, then two a source); the sources have changed");
    step_ = state[0];
    mixture_.seek(step_);
    for (size_t i = 0; i < sources_.size(); ++i) {
        sources_[i].position = state[1 + 2 * i];
        sources_[i].rows_used = state[2 + 2 * i];
        sources_[i].window_end = 0;
    }
}

std::vector<int64_t> Planner::state() const {
    std::vector<int64_t> state{static_cast<int64_t>(step_)};
    for (const Source& source : sources_) {
        state.push_back(source.position);
        state.push_back(source.rows_used);
    }
    return state;
}

Plan Planner::next() {
    Plan plan;
    plan.step = step_;
    plan.source = mixture_.next();
    Source& source = sources_[plan.source];
    if (settings_.shape == Shape::rows)
        take_rows(source, plan);
    else
        take_records(source, plan, settings_.shape == Shape::tokens ? records_within_budget(source) : settings_.batch);
    ++step_;
    plan.after = state();
    return plan;
}

int64_t Planner::record_at(Source& source, uint64_t position) const {
    uint64_t count = source.set->records(), epoch = position / count;
    if (!source.order || source.order_epoch != epoch) {
        source.order.emplace(source.seed, epoch, count);
        source.order_epoch = epoch;
    }
    return (*source.order)(position % count);
}

void Planner::take_records(Source& source, Plan& plan, uint64_t count) const {
    uint64_t share = count / settings_.world, begin = source.position + settings_.rank * share;
    for (uint64_t i = 0; i < share; ++i) plan.records.push_back(record_at(source, begin + i));
    source.position += count;
}

uint64_t Planner::records_within_budget(Source& source) const {
    uint64_t tokens = 0, whole = 0;
    for (uint64_t count = 1;; ++count) {
        ShardSet::Place place = source.set->find(record_at(source, source.position + count - 1));
        uint32_t fields = std::min(settings_.fields, place.file->field_count(place.record));
        for (uint32_t field = 0; field < fields; ++field) {
            uint32_t length = place.file->field(place.record, field).count;
            tokens += settings_.max_tokens ? std::min(length, settings_.max_tokens) : length;
        }
        if (tokens > settings_.batch) {
            if (whole > 0) return whole;
            throw UserError(place.file->path() + ": record " + std::to_string(place.record) + ": with it " +
                            std::to_string(count) + " records have " + std::to_string(tokens) +
                            " tokens, and the batch holds " + std::to_string(settings_.batch) + " for at least " +
                            std::to_string(settings_.multiple) + " records; raise the batch or lower max_tokens");
        }
        if (count % settings_.multiple == 0) whole = count;
        // records of no tokens have no end
        if (count == kWindowRecords / settings_.multiple * settings_.multiple) return count;
    }
}

void Planner::take_rows(Source& source, Plan& plan) const {
    uint64_t share = settings_.batch / settings_.world, mine = settings_.rank * share;
    for (uint64_t row = 0; row < settings_.batch; ++row) {
        if (source.window_end == 0) make_window(source);
        if (source.rows_used + 1 >= source.row_start.size()) {  // used up: on to the next
            source.position = source.window_end;
            source.rows_used = 0;
            make_window(source);
        }
        if (row >= mine && row < mine + share) {
            plan.row_start.push_back(plan.pieces.size());
            auto first = source.pieces.begin() + source.row_start[source.rows_used],
                 last = source.pieces.begin() + source.row_start[source.rows_used + 1];
            plan.pieces.insert(plan.pieces.end(), first, last);
        }
        ++source.rows_used;
    }
    plan.row_start.push_back(plan.pieces.size());
}

// The records from source.position on, up to the end of the epoch at most, as rows. The rows come in a random order:
// best fit makes those of the longest records first.
void Planner::make_window(Source& source) const {
    uint64_t count = source.set->records(), room = settings_.max_tokens;
    uint64_t end = std::min(source.position + kWindowRecords, (source.position / count + 1) * count);
    std::vector<Piece> pieces, upcoming;
    std::vector<int64_t> records;
    std::vector<uint32_t> lengths, row_of;
    uint64_t tokens = 0, position = source.position, asked = position;
    size_t next = 0;
    for (; position < end && tokens < kWindowRows * room; ++position) {
        if (next == upcoming.size()) {  // a few at a time: see prefetch_record
            records.clear();
            upcoming.clear();
            for (next = 0; asked < std::min(position + 64, end); ++asked) records.push_back(record_at(source, asked));
            append_records(*source.set, records, upcoming);
        }
        Piece piece = upcoming[next++];
        tokens += piece.tokens.count;
        while (settings_.kind == "text" && piece.tokens.count > room) {
            Piece part = piece;
            part.tokens.count = room;
            part.last = false;
            pieces.push_back(part);
            piece.tokens = {static_cast<uint32_t>(piece.tokens.begin + room),
                            static_cast<uint32_t>(piece.tokens.count - room)};
            piece.first = false;
        }
        pieces.push_back(piece);
    }
    for (const Piece& piece : pieces) lengths.push_back(piece.tokens.count);
    uint32_t rows = best_fit(lengths, room, row_of);

    Order shuffle(source.seed, ~source.position, rows);
    source.row_start.assign(rows + 1, 0);
    for (uint32_t& row : row_of) ++source.row_start[(row = shuffle(row)) + 1];
    for (uint32_t row = 0; row < rows; ++row) source.row_start[row + 1] += source.row_start[row];
    source.pieces.resize(pieces.size());
    std::vector<uint32_t> place(source.row_start.begin(), source.row_start.end() - 1);
    for (size_t i = 0; i < pieces.size(); ++i) source.pieces[place[row_of[i]]++] = pieces[i];
    source.window_end = position;
}
