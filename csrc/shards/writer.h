// Writes one shard file: tokens stream to disk block by block, the index is kept in memory until the end.
#pragma once

#include <string>
#include <vector>

#include "shards/format.h"

class ShardWriter {
public:
    // Opens `path`.partial, which finish() renames to `path`. tokenizer: 32 bytes; vocab_size: 1 to 2^24.
    // Throws UserError where the file cannot be written (here and below), std::invalid_argument for other arguments.
    ShardWriter(std::string path, const std::string& kind, const std::string& tokenizer, uint64_t vocab_size);
    ~ShardWriter();
    ShardWriter(const ShardWriter&) = delete;
    ShardWriter& operator=(const ShardWriter&) = delete;

    // Appends a record of so many fields, which stand one after another in `tokens`, field i being field_tokens[i]
    // long. A record refused (std::invalid_argument) leaves the shard as it was.
    void add(const int64_t* tokens, const int64_t* field_tokens, uint64_t fields, float score, int64_t group);

    // The size of the file, in bytes, if it were finished with that much more.
    uint64_t bytes_with(uint64_t records, uint64_t fields, uint64_t tokens) const;

    // Writes the index and the footer, syncs, renames. Returns the footer's checksum, which covers the whole file.
    uint32_t finish();

    uint64_t records() const { return groups_.size(); }
    uint64_t tokens() const { return token_start_.back(); }

private:
    void flush_block();
    void write(const void* data, size_t bytes);
    void flush();
    [[noreturn]] void fail(const char* action) const;

    std::string path_, partial_;
    int file_ = -1;
    Header header_{};
    std::vector<uint8_t> block_;  // token bytes without a checksum yet, fewer than kBlockBytes
    std::vector<uint8_t> unwritten_;
    std::vector<int64_t> groups_;
    std::vector<float> scores_;
    std::vector<uint32_t> field_start_{0}, token_start_{0}, block_crc_;
};
