#include "widen.h"

#include <algorithm>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

uint32_t widen_portable(const uint8_t* at, uint32_t width, uint32_t count, int32_t* out) {
    uint32_t highest = 0, keep = width == 2 ? 0xFFFF : 0xFFFFFF;
    for (uint32_t i = 0; i < count; ++i) {
        uint32_t id;
        std::memcpy(&id, at + uint64_t{i} * width, 4);
        id &= keep;
        highest = std::max(highest, id);
        out[i] = static_cast<int32_t>(id);
    }
    return highest;
}

#if defined(__x86_64__)
// Eight ids at a time; compiled for AVX2 whatever the build's target is, called only where the CPU has it.
__attribute__((target("avx2"))) uint32_t widen_avx2(const uint8_t* at, uint32_t width, uint32_t count, int32_t* out) {
    const __m256i spread = _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1, 0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
    __m256i highest = _mm256_setzero_si256();
    uint32_t i = 0;
    for (; i + 8 <= count; i += 8, at += 8 * width) {
        __m256i ids;
        __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
        if (width == 2) {
            ids = _mm256_cvtepu16_epi32(low);
        } else {
            __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + 12));
            ids = _mm256_shuffle_epi8(_mm256_set_m128i(high, low), spread);
        }
        highest = _mm256_max_epu32(highest, ids);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), ids);
    }
    alignas(32) uint32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), highest);
    return std::max(*std::max_element(lanes, lanes + 8), widen_portable(at, width, count - i, out + i));
}
#endif

}  // namespace

uint32_t widen(const uint8_t* at, uint32_t width, uint32_t count, int32_t* out) {
#if defined(__x86_64__)
    static const bool has_avx2 = __builtin_cpu_supports("avx2");
    if (has_avx2) return widen_avx2(at, width, count, out);
#endif
    return widen_portable(at, width, count, out);
}
