// Reads a set of shard files through the page cache, and checks every byte before it is used.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "shards/format.h"
#include "shards/widen.h"

// Tokens [begin, begin + count) of a shard.
struct Span {
    uint32_t begin, count;
};

// One file, mapped. Safe to use from many threads. Every member throws UserError, naming the file, for damage that it
// meets and for a file that was cut short, rewritten or removed since it was opened.
class ShardFile {
public:
    // Checks size, header and footer. The index is checked on its first use, so ten thousand shards open quickly.
    explicit ShardFile(std::string path);
    ~ShardFile();
    ShardFile(const ShardFile&) = delete;
    ShardFile& operator=(const ShardFile&) = delete;

    const std::string& path() const { return path_; }
    const Header& header() const { return header_; }
    const Footer& footer() const { return footer_; }
    uint64_t bytes() const { return bytes_; }

    // `record` is below footer().records, `field` below field_count(record).
    uint32_t field_count(uint64_t record) const;
    Span field(uint64_t record, uint64_t field) const;
    Span whole(uint64_t record) const;  // all its fields, which stand end to end
    float score(uint64_t record) const;
    int64_t group(uint64_t record) const;

    // Writes the tokens of `span`, a part of `record`, and checks its blocks unless they have been checked before.
    void read(uint64_t record, Span span, const Sequence& out) const;
    // The same, as they are stored: header().token_bytes bytes each.
    void copy(uint64_t record, Span span, uint8_t* out) const;

    // Prefetches a record's numbers, then the places of its fields, then its tokens. Records come in random order, and
    // most of the time to read one is waiting for memory.
    void prefetch_record(uint64_t record) const;
    void prefetch_fields(uint64_t record) const;
    void prefetch(Span span) const;
    // Asks the kernel to read the span's blocks that have not been checked yet.
    void read_ahead(Span span) const;

    // Compares the file's size and time with those at opening, at most once a second. now: steady_now(), asked once for
    // many.
    void check_unchanged(int64_t now) const;
    static int64_t steady_now();  // ns

    [[noreturn]] void damaged(const std::string& what) const;

private:
    void check_ends();
    void check_index() const;
    template <typename F>
    void guarded(const F& f) const;
    template <typename F>
    void checked(uint64_t record, Span span, const F& highest_of) const;
    std::pair<uint32_t, uint32_t> fields_of(uint64_t record) const;  // [first, last)
    Span tokens_of(uint32_t first_field, uint32_t last_field) const;
    bool block_is_checked(uint64_t block) const {
        return blocks_checked_[block / 64].load(std::memory_order_relaxed) >> (block % 64) & 1;
    }

    std::string path_;
    const uint8_t* map_ = nullptr;
    uint64_t bytes_ = 0;
    uint64_t inode_ = 0;
    int64_t changed_ = 0;  // modification time, ns
    Header header_{};
    Footer footer_{};
    const uint8_t *groups_, *scores_, *field_start_, *token_start_, *block_crc_;  // the index; not aligned
    mutable std::mutex index_mutex_;
    mutable std::atomic<bool> index_checked_{false};
    // a bit per block; it does no harm if two threads check the same one
    mutable std::unique_ptr<std::atomic<uint64_t>[]> blocks_checked_;
    mutable std::atomic<int64_t> look_again_{0};  // when check_unchanged asks next: steady clock, ns
};

// All files of a data set as one series of records.
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
    std::pair<Place, Span> find(int64_t record, int64_t field) const;

private:
    std::vector<std::unique_ptr<ShardFile>> files_;
    std::vector<uint64_t> first_record_{0};  // of each file, then the total
};
