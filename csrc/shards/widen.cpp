#include "shards/widen.h"

#include <algorithm>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

enum What { kNothing, kTokens, kPositions, kTargets };  // each with those before it

// Ids [i, count).
template <What what>
uint32_t widen_portable(const uint8_t* at, uint32_t width, uint32_t i, uint32_t count, const Sequence& out) {
    uint32_t highest = 0, keep = width == 2 ? 0xFFFF : 0xFFFFFF;
    for (; i < count; ++i) {
        uint32_t id;
        std::memcpy(&id, at + uint64_t{i} * width, 4);
        id &= keep;
        highest = std::max(highest, id);
        if constexpr (what >= kTokens) out.tokens[i] = static_cast<int32_t>(id);
        if constexpr (what >= kPositions) out.positions[i] = static_cast<int32_t>(i);
        if constexpr (what >= kTargets)
            if (i > 0) out.targets[i - 1] = static_cast<int32_t>(id);
    }
    return highest;
}

#if defined(__x86_64__)
// Eight ids at a time; compiled for AVX2 whatever the build's target is, called only where the CPU has it.
template <What what>
__attribute__((target("avx2"))) uint32_t widen_avx2(const uint8_t* at, uint32_t width, uint32_t count,
                                                    const Sequence& out) {
    const __m256i spread = _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1, 0, 1, 2, -1, 3, 4, 5,
                                            -1, 6, 7, 8, -1, 9, 10, 11, -1);
    const Sequence to = out;  // the compiler need not fear that the ids overwrite it
    // the first target would stand before the sequence
    uint32_t i = what >= kTargets ? std::min(count, 8u) : 0, first = widen_portable<what>(at, width, 0, i, to);
    __m256i highest = _mm256_set1_epi32(static_cast<int>(first));
    __m256i position =
        _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(i)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    for (const uint8_t* from = at + uint64_t{i} * width; i + 8 <= count; i += 8, from += 8 * width) {
        __m256i ids;
        __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        if (width == 2) {
            ids = _mm256_cvtepu16_epi32(low);
        } else {
            __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 12));
            ids = _mm256_shuffle_epi8(_mm256_set_m128i(high, low), spread);
        }
        highest = _mm256_max_epu32(highest, ids);
        if constexpr (what >= kTokens) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to.tokens + i), ids);
        if constexpr (what >= kPositions) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to.positions + i), position);
            position = _mm256_add_epi32(position, _mm256_set1_epi32(8));
        }
        if constexpr (what >= kTargets) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to.targets + i - 1), ids);
    }
    alignas(32) uint32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), highest);
    return std::max(*std::max_element(lanes, lanes + 8), widen_portable<what>(at, width, i, count, to));
}
#endif

template <What what>
uint32_t widen_as(const uint8_t* at, uint32_t width, uint32_t count, const Sequence& out) {
#if defined(__x86_64__)
    static const bool has_avx2 = __builtin_cpu_supports("avx2");
    if (has_avx2) return widen_avx2<what>(at, width, count, out);
#endif
    return widen_portable<what>(at, width, 0, count, out);
}

}  // namespace

uint32_t widen(const uint8_t* at, uint32_t width, uint32_t count, const Sequence& out) {
    if (out.targets) return widen_as<kTargets>(at, width, count, out);
    if (out.positions) return widen_as<kPositions>(at, width, count, out);
    if (out.tokens) return widen_as<kTokens>(at, width, count, out);
    return widen_as<kNothing>(at, width, count, out);
}
