// The layout of a shard file, as FORMAT.md describes it, for the writer and the reader.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "shards are little-endian and are read in place");

constexpr char kHeaderMagic[8] = {'C', 'O', 'N', 'A', 'N', 'T', 'O', 'K'};
constexpr char kFooterMagic[8] = {'C', 'O', 'N', 'A', 'N', 'E', 'N', 'D'};
constexpr uint32_t kVersion = 1;
// token bytes per checksum: four pages, which is what reading one short text costs
constexpr uint64_t kBlockBytes = 16384;
constexpr uint64_t kMaxFields = 65535;      // a record
constexpr uint64_t kMaxCount = UINT32_MAX;  // records, fields or tokens a shard: the index counts in 32 bits

struct Header {
    char magic[8];
    uint32_t version;
    uint32_t token_bytes;  // 2 or 3
    uint64_t vocab_size;
    uint8_t tokenizer[32];  // SHA-256 of the tokenizer's file
    char kind[36];          // padded with zeros
    uint32_t crc;           // of the bytes before it
};
static_assert(sizeof(Header) == 96 && std::is_trivially_copyable_v<Header>);

struct Footer {
    uint64_t index_offset;
    uint64_t records;
    uint64_t fields;
    uint64_t tokens;
    uint32_t index_crc;
    uint32_t crc;  // of the whole header, then of the footer's bytes before it
    char magic[8];
};
static_assert(sizeof(Footer) == 48 && std::is_trivially_copyable_v<Footer>);

// What writer and reader derive rather than store. No product overflows: counts are below 2^32.
inline uint32_t token_bytes_for(uint64_t vocab_size) { return vocab_size <= 65536 ? 2 : 3; }
inline uint64_t block_count(uint64_t data_bytes) { return (data_bytes + kBlockBytes - 1) / kBlockBytes; }
inline uint64_t index_bytes(uint64_t records, uint64_t fields, uint64_t data_bytes) {
    return records * (8 + 4) + (records + 1) * 4 + (fields + 1) * 4 + block_count(data_bytes) * 4;
}

// Becomes conan_engine.errors.UserError: the message names the file, what is wrong with it and what to do.
struct UserError : std::runtime_error {
    using std::runtime_error::runtime_error;
};
