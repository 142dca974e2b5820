// What the device derives for one token. The host can compile it too, so tests need no GPU.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define CONAN_HOST_DEVICE __host__ __device__
#else
#define CONAN_HOST_DEVICE
#endif

// A batch as it travels: T ids of 2 or 3 bytes end to end in B sequences, which may be empty.
struct Narrow {
    const uint8_t* ids;         // [T * width]
    const int32_t* cu_seqlens;  // [B+1], from 0 to T
    const int32_t* follow;      // [B], the target of the sequence's last token, or -100. Null: no targets
    uint32_t width;
    int32_t sequences;  // B
};

// A batch as the model takes it.
struct Wide {
    int32_t* tokens;     // [T]
    int32_t* positions;  // [T], of each token in its sequence
    int32_t* targets;    // [T], the token that follows, or -100 where there is none to learn
    uint8_t* mask;       // [T], whether targets has one. Both null with follow
};

CONAN_HOST_DEVICE inline int32_t narrow_id(const Narrow& in, int64_t i) {
    const uint8_t* at = in.ids + i * in.width;
    return at[0] | at[1] << 8 | (in.width == 3 ? at[2] << 16 : 0);
}

CONAN_HOST_DEVICE inline void unpack_token(const Narrow& in, const Wide& out, int64_t i) {
    // the last that begins at i or before, which no empty one does and holds i
    int32_t sequence = 0, after = in.sequences;
    while (after - sequence > 1) {
        int32_t middle = sequence + (after - sequence) / 2;
        (in.cu_seqlens[middle] <= i ? sequence : after) = middle;
    }
    int32_t position = static_cast<int32_t>(i - in.cu_seqlens[sequence]);
    out.tokens[i] = narrow_id(in, i);
    out.positions[i] = position;
    if (!in.follow) return;
    int32_t target = i + 1 < in.cu_seqlens[sequence + 1] ? narrow_id(in, i + 1) : in.follow[sequence];
    out.targets[i] = target;
    out.mask[i] = target != -100;
}
