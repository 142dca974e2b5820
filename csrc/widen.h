// Token ids of 2 or 3 bytes to int32.
#pragma once

#include <cstdint>

// Writes `count` ids of `width` bytes (2 or 3) at `at` to `out` and returns the highest. Up to 8 bytes past the last id are
// read (and ignored): in a shard the index and the footer stand there.
uint32_t widen(const uint8_t* at, uint32_t width, uint32_t count, int32_t* out);
