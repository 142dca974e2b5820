// Reads a set of shard files through the page cache, checking every byte before it is believed.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "format.h"

// Tokens [begin, begin + count) of a shard.
struct Span {
    uint32_t begin, count;
};

// One file, mapped. Safe to read from many threads.
class ShardFile {
public:
    // Checks sizes, header, footer and index. Throws UserError, also for a file that is missing.
    explicit ShardFile(std::string path);
    ~ShardFile();
    ShardFile(const ShardFile&) = delete;
    ShardFile& operator=(const ShardFile&) = delete;

    const Header& header() const { return header_; }
    const Footer& footer() const { return footer_; }
    uint64_t bytes() const { return bytes_; }

    // `record` is below footer().records, `field` below field_count(record).
    uint32_t field_count(uint64_t record) const;
    Span field(uint64_t record, uint64_t field) const;
    float score(uint64_t record) const;
    int64_t group(uint64_t record) const;

    // Writes the span's tokens to `out`. Throws UserError if one of the blocks it touches is damaged.
    void read(Span span, int32_t* out) const;

private:
    void check();
    void check_blocks(uint64_t begin_byte, uint64_t end_byte) const;
    [[noreturn]] void damaged(const std::string& what) const;

    std::string path_;
    const uint8_t* map_ = nullptr;
    uint64_t bytes_ = 0;
    Header header_{};
    Footer footer_{};
    const uint8_t *groups_, *scores_, *field_start_, *token_start_, *block_crc_;  // the index; not aligned
    std::unique_ptr<std::atomic<bool>[]> checked_;  // per block; two threads may both check one, which does no harm
};

// All files of a data set as one run of records.
class ShardSet {
public:
    explicit ShardSet(const std::vector<std::string>& paths);

    const std::vector<std::unique_ptr<ShardFile>>& files() const { return files_; }
    uint64_t records() const { return first_record_.back(); }

    struct Place {
        const ShardFile* file;
        uint64_t record;  // in that file
    };
    // Throws std::out_of_range.
    Place find(int64_t record) const;
    // A field's tokens. Throws std::out_of_range if the record or the field does not exist.
    std::pair<const ShardFile*, Span> find(int64_t record, int64_t field) const;

private:
    std::vector<std::unique_ptr<ShardFile>> files_;
    std::vector<uint64_t> first_record_{0};  // of each file, then the total
};
