// The batch of a step on one rank: what Plan says, read from the shards and packed.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "batches/plan.h"

// Large buffers that are reused from batch to batch. The kernel zeroes fresh memory page by page, which takes longer
// than filling it.
class BufferPool : public std::enable_shared_from_this<BufferPool> {
public:
    explicit BufferPool(size_t spare) : keep_(spare) {}
    std::shared_ptr<uint8_t> take(size_t bytes);  // aligned to 64; returns to the pool when its last owner releases it

private:
    struct Buffer {
        std::unique_ptr<uint8_t, void (*)(void*)> memory;
        size_t bytes;
    };
    void give(Buffer buffer);

    std::mutex mutex_;
    std::vector<Buffer> spare_;
    size_t keep_;
};

// T tokens, B sequences, F fields, R rows, n records. Where a record is a sequence, its fields follow each other in it.
// Where a field is one, field f of record r is sequence f * n + r.
struct Batch {
    uint64_t step = 0;
    uint32_t source = 0;
    size_t tokens_count = 0;
    std::shared_ptr<uint8_t> memory;  // of the next four, or of ids
    int32_t* tokens = nullptr;        // [T]
    int32_t* positions = nullptr;     // [T], position of each token in its sequence
    // [T], the next token, or -100 where there is none to learn; language only
    int32_t* targets = nullptr;
    uint8_t* mask = nullptr;          // [T], whether there is a target; language only
    uint32_t width = 0;               // raw: bytes an id; else 0
    uint8_t* ids = nullptr;           // raw: [T * width] instead of the four above; and, for text, the last targets:
    std::vector<int32_t> follow;      // [B], the token after the sequence, -100 where its record ends with it
    std::vector<int32_t> cu_seqlens;  // [B+1]
    std::vector<int32_t> fields;      // [F+1], of each field, its first token; then T
    std::vector<int32_t> rows;        // [R+1], of each row, its first sequence; then B; language only
    std::vector<int64_t> records;     // [n], by number in the source; of each sequence, for language
    std::vector<int64_t> groups;      // [n]
    std::vector<float> scores;        // [n]
    std::vector<int64_t> state;       // for Planner::seek: after this batch
    // what was wrong with each record that was left out (pairs: replaced by a neighbour)
    std::vector<std::string> skipped;
};

// Throws UserError, naming shard and record, for a record that is damaged, has an empty field that may not be empty,
// too few fields, or (instruction) more than max_tokens; with skip_bad_records, if nothing is left.
std::unique_ptr<Batch> read_batch(const Settings& settings, const ShardSet& set, Plan plan, BufferPool& pool);
