// CRC-32C (Castagnoli, RFC 3720 appendix B.4): reflected polynomial 0x82F63B78, all ones in, inverted out.
#pragma once

#include <cstddef>
#include <cstdint>

// The CRC of `bytes` bytes at `data`; pass the CRC of what came before as `crc` to continue it.
uint32_t crc32c(const void* data, size_t bytes, uint32_t crc = 0);

// The same by lookup tables, which every CPU can run. crc32c() picks it where SSE4.2 is missing.
uint32_t crc32c_portable(const void* data, size_t bytes, uint32_t crc = 0);
