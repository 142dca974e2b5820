// Token ids of 2 or 3 bytes to int32.
#pragma once

#include <cstdint>

// Where a sequence goes. What is null is left out, and so are the members after it.
struct Sequence {
    int32_t* tokens = nullptr;     // [count]
    int32_t* positions = nullptr;  // [count]: 0, 1, ...
    int32_t* targets = nullptr;    // [count - 1]: the next token
};

// Writes `count` ids of `width` bytes (2 or 3) at `at` and returns the highest. Up to 8 bytes past the last id are read
// and ignored; in a shard, the index and the footer are there.
uint32_t widen(const uint8_t* at, uint32_t width, uint32_t count, const Sequence& out);
