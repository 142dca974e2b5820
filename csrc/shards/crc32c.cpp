#include "shards/crc32c.h"

#include <array>
#include <cstring>

namespace {

using Tables = std::array<std::array<uint32_t, 256>, 8>;

// tables[k][b]: the CRC register after byte b followed by k zero bytes, so that eight bytes take eight independent
// look-ups ("slicing by 8", Kounavis and Berry 2005).
Tables make_tables() {
    Tables tables{};
    for (uint32_t byte = 0; byte < 256; ++byte) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0x82F63B78u : 0);
        tables[0][byte] = crc;
    }
    for (int k = 1; k < 8; ++k)
        for (int byte = 0; byte < 256; ++byte) {
            uint32_t before = tables[k - 1][byte];
            tables[k][byte] = (before >> 8) ^ tables[0][before & 0xFF];
        }
    return tables;
}

#if defined(__x86_64__)
// Compiled for SSE4.2 whatever the build's target is; called only where the CPU has it.
__attribute__((target("sse4.2"))) uint32_t crc32c_sse42(const void* data, size_t bytes, uint32_t crc) {
    auto at = static_cast<const uint8_t*>(data);
    uint64_t state = ~crc;
    for (; bytes >= 8; at += 8, bytes -= 8) {
        uint64_t word;
        std::memcpy(&word, at, 8);
        state = __builtin_ia32_crc32di(state, word);
    }
    for (; bytes > 0; ++at, --bytes) state = __builtin_ia32_crc32qi(static_cast<uint32_t>(state), *at);
    return ~static_cast<uint32_t>(state);
}
#endif

}  // namespace

uint32_t crc32c_portable(const void* data, size_t bytes, uint32_t crc) {
    static const Tables tables = make_tables();
    auto at = static_cast<const uint8_t*>(data);
    crc = ~crc;
    for (; bytes >= 8; at += 8, bytes -= 8) {
        uint64_t word;
        std::memcpy(&word, at, 8);
        word ^= crc;
        crc = 0;
        for (int k = 0; k < 8; ++k) crc ^= tables[7 - k][(word >> (8 * k)) & 0xFF];
    }
    for (; bytes > 0; ++at, --bytes) crc = (crc >> 8) ^ tables[0][(crc ^ *at) & 0xFF];
    return ~crc;
}

uint32_t crc32c(const void* data, size_t bytes, uint32_t crc) {
#if defined(__x86_64__)
    static const bool has_sse42 = __builtin_cpu_supports("sse4.2");
    if (has_sse42) return crc32c_sse42(data, bytes, crc);
#endif
    return crc32c_portable(data, bytes, crc);
}
