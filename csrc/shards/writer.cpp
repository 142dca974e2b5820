#include "shards/writer.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <utility>

#include "shards/crc32c.h"

// Files of which this much at a time is written, from multiples of it on, lie in the page cache as large pages where
// the file system has them (Linux: xfs, btrfs, ext4 since 6.16): the loader, which reads at random places, then looks
// up an address 512 times less often.
constexpr size_t kLargePage = 2 << 20;

ShardWriter::ShardWriter(std::string path, const std::string& kind, const std::string& tokenizer, uint64_t vocab_size)
    : path_(std::move(path)), partial_(path_ + ".partial") {
    if (kind.empty() || kind.size() > sizeof header_.kind)
        throw std::invalid_argument("kind: expected 1 to 36 bytes, got " + std::to_string(kind.size()));
    if (tokenizer.size() != sizeof header_.tokenizer)
        throw std::invalid_argument("tokenizer: expected 32 bytes, got " + std::to_string(tokenizer.size()));
    if (vocab_size < 1 || vocab_size > (1u << 24))
        throw std::invalid_argument("vocab_size: expected 1 to 16777216, got " + std::to_string(vocab_size));
    std::memcpy(header_.magic, kHeaderMagic, sizeof kHeaderMagic);
    header_.version = kVersion;
    header_.token_bytes = token_bytes_for(vocab_size);
    header_.vocab_size = vocab_size;
    std::memcpy(header_.tokenizer, tokenizer.data(), tokenizer.size());
    std::memcpy(header_.kind, kind.data(), kind.size());
    header_.crc = crc32c(&header_, offsetof(Header, crc));
    block_.reserve(kBlockBytes);
    unwritten_.reserve(kLargePage);
    write(&header_, sizeof header_);

    file_ = ::open(partial_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (file_ < 0) fail("create");
}

ShardWriter::~ShardWriter() {
    if (file_ >= 0) ::close(file_);
}

void ShardWriter::add(const int64_t* tokens, const int64_t* field_tokens, uint64_t fields, float score, int64_t group) {
    uint64_t count = std::accumulate(field_tokens, field_tokens + fields, uint64_t{0});
    if (fields > kMaxFields)
        throw std::invalid_argument("fields: expected at most 65535 a record, got " + std::to_string(fields));
    // the index counts in 32 bits
    if (this->tokens() + count > kMaxCount || field_start_.back() + fields > kMaxCount || records() == kMaxCount)
        throw std::invalid_argument("a shard holds at most 4294967295 records, fields and tokens; lower shard_bytes");
    for (uint64_t i = 0; i < count; ++i)
        if (tokens[i] < 0 || tokens[i] >= static_cast<int64_t>(header_.vocab_size))
            throw std::invalid_argument("token id: expected 0 to " + std::to_string(header_.vocab_size - 1) +
                                        " (vocab_size - 1), got " + std::to_string(tokens[i]));

    for (uint64_t i = 0; i < count; ++i)
        for (uint32_t byte = 0; byte < header_.token_bytes; ++byte) {
            block_.push_back(static_cast<uint8_t>(tokens[i] >> (8 * byte)));
            if (block_.size() == kBlockBytes) flush_block();
        }
    for (uint64_t i = 0; i < fields; ++i)
        token_start_.push_back(token_start_.back() + static_cast<uint32_t>(field_tokens[i]));
    field_start_.push_back(field_start_.back() + static_cast<uint32_t>(fields));
    scores_.push_back(score);
    groups_.push_back(group);
}

uint64_t ShardWriter::bytes_with(uint64_t records, uint64_t fields, uint64_t tokens) const {
    uint64_t data_bytes = (this->tokens() + tokens) * header_.token_bytes;
    return sizeof(Header) + data_bytes +
           index_bytes(this->records() + records, field_start_.back() + fields, data_bytes) + sizeof(Footer);
}

uint32_t ShardWriter::finish() {
    if (!block_.empty()) flush_block();

    Footer footer{};
    footer.index_offset = sizeof(Header) + tokens() * header_.token_bytes;
    footer.records = records();
    footer.fields = field_start_.back();
    footer.tokens = tokens();
    auto write_array = [&](const auto& array) {
        size_t bytes = array.size() * sizeof array[0];
        write(array.data(), bytes);
        footer.index_crc = crc32c(array.data(), bytes, footer.index_crc);
    };
    write_array(groups_);
    write_array(scores_);
    write_array(field_start_);
    write_array(token_start_);
    write_array(block_crc_);
    footer.crc = crc32c(&footer, offsetof(Footer, crc), crc32c(&header_, sizeof header_));
    std::memcpy(footer.magic, kFooterMagic, sizeof kFooterMagic);
    write(&footer, sizeof footer);
    flush();

    if (::fsync(file_) != 0) fail("write");
    int file = std::exchange(file_, -1);
    if (::close(file) != 0) fail("write");
    if (std::rename(partial_.c_str(), path_.c_str()) != 0) fail("rename");
    return footer.crc;
}

void ShardWriter::flush_block() {
    block_crc_.push_back(crc32c(block_.data(), block_.size()));
    write(block_.data(), block_.size());
    block_.clear();
}

void ShardWriter::write(const void* data, size_t bytes) {
    auto at = static_cast<const uint8_t*>(data);
    while (bytes > 0) {
        size_t part = std::min(bytes, kLargePage - unwritten_.size());
        unwritten_.insert(unwritten_.end(), at, at + part);
        if (unwritten_.size() == kLargePage) flush();
        at += part;
        bytes -= part;
    }
}

void ShardWriter::flush() {
    for (size_t at = 0; at < unwritten_.size();) {
        ssize_t written = ::write(file_, unwritten_.data() + at, unwritten_.size() - at);
        if (written < 0 && errno == EINTR) continue;
        if (written < 0) fail("write");
        at += written;
    }
    unwritten_.clear();
}

void ShardWriter::fail(const char* action) const {
    throw UserError(partial_ + ": cannot " + action + " it: " + std::strerror(errno) +
                    "; make room or choose another folder, then run again");
}
