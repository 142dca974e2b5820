#include "batches/batch.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>

namespace {

constexpr int32_t kNoTarget = -100;  // torch's ignore_index
constexpr size_t kAhead = 3;         // prefetch so many sequences while one is widened

[[noreturn]] void bad(const Piece& piece, const std::string& what) {
    throw UserError(
        piece.file->path() + ": record " + std::to_string(piece.in_file) + ": " + what +
        "; mend the source and delete the shards, or set skip_bad_records = true to leave such records out");
}

// raw_width: bytes an id, 0 for int32.
void allocate(Batch& batch, uint64_t tokens, bool language, uint32_t raw_width, BufferPool& pool) {
    if (tokens > INT32_MAX)
        throw UserError("a batch of " + std::to_string(tokens) +
                        " tokens on one rank: at most 2147483647 fit; lower batch");
    size_t room = (tokens + 1 + 15) / 16 * 16;  // one more: see fill_language
    batch.tokens_count = tokens;
    batch.memory = pool.take(room * (raw_width ? raw_width : language ? 13 : 8));
    if (raw_width) {
        batch.width = raw_width;
        batch.ids = batch.memory.get();
        return;
    }
    batch.tokens = reinterpret_cast<int32_t*>(batch.memory.get());
    batch.positions = batch.tokens + room;
    if (language) {
        batch.targets = batch.positions + room;
        batch.mask = reinterpret_cast<uint8_t*>(batch.targets + room);
    }
}

// Of an instruction: its output, and each further answer, which has a question before it.
bool learned(uint32_t field) { return field >= 2 && field % 2 == 0; }

// The spans of the record's fields, cut as set.
std::vector<Span> checked_fields(const Settings& settings, const Piece& piece) {
    uint32_t found = piece.file->field_count(piece.in_file), wanted = settings.fields;
    if (settings.kind == "text") wanted = 1;
    if (settings.kind == "instruction") wanted = found;
    if (settings.kind == "instruction" && (found < 3 || found % 2 == 0))
        bad(piece, "has " + std::to_string(found) + " fields, expected 3, 5, 7, ...");
    if (settings.language() ? found != wanted : found < wanted)
        bad(piece, "has " + std::to_string(found) + " fields, expected " + std::to_string(wanted));
    if (settings.kind == "text") {
        if (piece.tokens.count == 0) bad(piece, "has no tokens");
        return {piece.tokens};
    }
    std::vector<Span> spans;
    for (uint32_t field = 0; field < wanted; ++field) {
        Span span = piece.file->field(piece.in_file, field);
        bool may_be_empty = settings.kind == "instruction" && !learned(field);
        if (span.count == 0 && !may_be_empty) bad(piece, "field " + std::to_string(field) + " has no tokens");
        if (!settings.language() && settings.max_tokens) span.count = std::min(span.count, settings.max_tokens);
        spans.push_back(span);
    }
    if (settings.language() && settings.max_tokens && piece.tokens.count > settings.max_tokens)
        bad(piece, "has " + std::to_string(piece.tokens.count) +
                       " tokens, more than max_tokens = " + std::to_string(settings.max_tokens));
    return spans;
}

// Reads everything once beforehand. A record that cannot be read is left out; where the number of records must stay,
// since all ranks bring the same number of in-batch negatives, a neighbour of the same group replaces it, which is no
// negative of itself.
void leave_out_bad(const Settings& settings, std::vector<Piece>& pieces, std::vector<uint32_t>& row_start,
                   std::vector<std::string>& skipped) {
    std::vector<int32_t> scratch;
    std::vector<uint8_t> good(pieces.size(), 1);
    for (size_t i = 0; i < pieces.size(); ++i) try {
            for (Span span : checked_fields(settings, pieces[i])) {
                scratch.resize(span.count);
                pieces[i].file->read(pieces[i].in_file, span, {scratch.data()});
            }
        } catch (const UserError& error) {
            skipped.push_back(error.what());
            good[i] = 0;
        }
    if (skipped.empty()) return;
    if (skipped.size() == pieces.size()) throw UserError("none of the step's records can be used: " + skipped[0]);
    if (!settings.language()) {
        size_t from = std::find(good.begin(), good.end(), 1) - good.begin();
        for (size_t i = 0; i < pieces.size(); ++i) good[i] ? from = i : (pieces[i] = pieces[from], 0);
        return;
    }
    std::vector<uint32_t> kept(pieces.size() + 1, 0);  // how many good ones come before each
    for (size_t i = 0; i < pieces.size(); ++i) {
        kept[i + 1] = kept[i] + good[i];
        if (good[i]) pieces[kept[i]] = pieces[i];
    }
    pieces.resize(kept.back());
    for (uint32_t& start : row_start) start = kept[start];
}

uint32_t raw_width_of(const Settings& settings, const std::vector<Piece>& pieces) {
    return settings.raw && !pieces.empty() ? pieces[0].file->header().token_bytes : 0;
}

void fill_language(const Settings& settings, const std::vector<Piece>& pieces, Batch& batch, BufferPool& pool) {
    uint64_t total = 0;
    for (const Piece& piece : pieces) total += piece.tokens.count;
    uint32_t raw_width = raw_width_of(settings, pieces);
    bool instructions = settings.kind == "instruction";
    allocate(batch, total, true, raw_width, pool);
    int32_t at = 0;
    for (size_t i = 0; i < pieces.size(); ++i) {
        const Piece& piece = pieces[i];
        for (size_t j = i ? i + kAhead : 0; j <= i + kAhead && j < pieces.size(); ++j)
            pieces[j].file->prefetch(pieces[j].tokens);
        std::vector<Span> fields = checked_fields(settings, piece);
        int32_t count = piece.tokens.count;
        if (raw_width) {
            piece.file->copy(piece.in_file, piece.tokens, batch.ids + uint64_t(at) * raw_width);
            int32_t follow = kNoTarget;
            if (!piece.last) piece.file->read(piece.in_file, {piece.tokens.begin + piece.tokens.count, 1}, {&follow});
            batch.follow.push_back(follow);
        } else {
            int32_t* targets = batch.targets + at;
            // where the record goes on, its next token is the last target; the next sequence then takes its place
            piece.file->read(piece.in_file, {piece.tokens.begin, piece.tokens.count + !piece.last},
                             {batch.tokens + at, batch.positions + at, targets});
            std::memset(batch.mask + at, !instructions, count);
            // the place before a learned token learns it
            for (uint32_t field = 2; instructions && field < fields.size(); field += 2) {
                int32_t begin = fields[field].begin - piece.tokens.begin, end = begin + fields[field].count;
                int32_t from = std::max(0, begin - 1);
                std::memset(batch.mask + at + from, 1, end - 1 - from);
            }
            if (piece.last) batch.mask[at + count - 1] = 0;
            for (int32_t i = instructions || !piece.last ? 0 : count - 1; i < count; ++i)
                if (!batch.mask[at + i]) targets[i] = kNoTarget;
        }
        batch.cu_seqlens.push_back(at);
        if (instructions)
            for (Span field : fields)
                batch.fields.push_back(at + static_cast<int32_t>(field.begin - piece.tokens.begin));
        at += count;
    }
    batch.cu_seqlens.push_back(at);
    if (instructions)
        batch.fields.push_back(at);
    else
        batch.fields = batch.cu_seqlens;
}

void fill_fields(const Settings& settings, const std::vector<Piece>& pieces, Batch& batch, BufferPool& pool) {
    size_t records = pieces.size(), fields = settings.fields;
    std::vector<Span> spans(records * fields);
    uint64_t total = 0;
    for (size_t r = 0; r < records; ++r) {
        std::vector<Span> of_record = checked_fields(settings, pieces[r]);
        for (size_t f = 0; f < fields; ++f) {
            spans[f * records + r] = of_record[f];
            total += of_record[f].count;
        }
    }
    uint32_t raw_width = raw_width_of(settings, pieces);
    allocate(batch, total, false, raw_width, pool);
    int32_t at = 0;
    for (size_t i = 0; i < spans.size(); ++i) {
        const Piece& piece = pieces[i % records];
        for (size_t j = i ? i + kAhead : 0; j <= i + kAhead && j < spans.size(); ++j)
            pieces[j % records].file->prefetch(spans[j]);
        raw_width ? piece.file->copy(piece.in_file, spans[i], batch.ids + uint64_t(at) * raw_width)
                  : piece.file->read(piece.in_file, spans[i], {batch.tokens + at, batch.positions + at});
        batch.cu_seqlens.push_back(at);
        at += spans[i].count;
    }
    batch.cu_seqlens.push_back(at);
    batch.fields = batch.cu_seqlens;
}

}  // namespace

std::shared_ptr<uint8_t> BufferPool::take(size_t bytes) {
    Buffer buffer{{nullptr, std::free}, 0};
    {
        std::lock_guard lock(mutex_);
        for (Buffer& spare : spare_)
            if (spare.bytes >= bytes) {
                buffer = std::move(spare);
                spare = std::move(spare_.back());
                spare_.pop_back();
                break;
            }
    }
    if (!buffer.memory) {
        buffer.bytes = (bytes + bytes / 4 + 63) / 64 * 64;  // batches differ in size: the next may be a little larger
        buffer.memory.reset(static_cast<uint8_t*>(std::aligned_alloc(64, buffer.bytes)));
        if (!buffer.memory) throw std::bad_alloc();
    }
    uint8_t* memory = buffer.memory.get();
    auto give_back = [pool = shared_from_this(), held = std::make_shared<Buffer>(std::move(buffer))](uint8_t*) {
        pool->give(std::move(*held));
    };
    return std::shared_ptr<uint8_t>(memory, std::move(give_back));
}

void BufferPool::give(Buffer buffer) {
    std::lock_guard lock(mutex_);
    spare_.push_back(std::move(buffer));
    if (spare_.size() > keep_)
        spare_.erase(
            std::min_element(spare_.begin(), spare_.end(), [](auto& a, auto& b) { return a.bytes < b.bytes; }));
}

std::unique_ptr<Batch> read_batch(const Settings& settings, const ShardSet& set, Plan plan, BufferPool& pool) {
    auto batch = std::make_unique<Batch>();
    batch->step = plan.step;
    batch->source = plan.source;
    batch->state = std::move(plan.after);
    std::vector<Piece> pieces = std::move(plan.pieces);
    append_records(set, plan.records, pieces);
    int64_t now = ShardFile::steady_now();
    for (const Piece& piece : pieces) {
        piece.file->check_unchanged(now);
        piece.file->read_ahead(piece.tokens);  // all of the batch's reads are under way before the first is waited for
    }
    if (settings.language() && plan.row_start.empty()) {
        plan.row_start.resize(pieces.size() + 1);
        std::iota(plan.row_start.begin(), plan.row_start.end(), 0);
    }
    if (settings.skip_bad_records) leave_out_bad(settings, pieces, plan.row_start, batch->skipped);
    batch->rows.assign(plan.row_start.begin(), plan.row_start.end());
    settings.language() ? fill_language(settings, pieces, *batch, pool) : fill_fields(settings, pieces, *batch, pool);
    for (const Piece& piece : pieces) {
        batch->records.push_back(piece.record);
        batch->groups.push_back(piece.file->group(piece.in_file));
        batch->scores.push_back(piece.file->score(piece.in_file));
    }
    return batch;
}
