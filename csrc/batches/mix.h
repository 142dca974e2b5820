// SplitMix64's step and finaliser (Steele, Lea and Flood 2014): 64 bits to 64 well-mixed bits, one to one.
#pragma once

#include <cstdint>

inline uint64_t mix(uint64_t x) {
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}
