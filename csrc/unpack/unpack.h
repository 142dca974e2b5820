// Sends batches to the GPU with 2 or 3 bytes per token, and widens them there. Built where nvcc is found (CONAN_CUDA);
// needs the CUDA runtime alone, no torch.
#pragma once

#include <memory>

#include "unpack/unpack_token.h"

struct UnpackRing;

// A batch on the device. When its last owner releases it, its memory is reused as soon as the stream that it was handed
// to has finished the work given to it until then. Work on another stream must have been joined to that stream before.
struct Unpacked {
    std::shared_ptr<UnpackRing> ring;
    uint32_t slot;
    Wide wide;
    const int32_t* cu_seqlens;  // [B+1]
    int32_t tokens, sequences;
    ~Unpacked();
};

class Unpacker {
public:
    // Pinned memory and a stream for `slots` batches at a time on the CUDA device `device`.
    // Throws std::runtime_error, here and below, with what CUDA says.
    Unpacker(int device, uint32_t slots);

    // Copies `batch` (in host memory, needed only until this returns), and widens it, on a stream of its own; `stream`
    // (a cudaStream_t, 0 for the default one) waits for that, the caller does not. Throws if all slots are held.
    std::shared_ptr<const Unpacked> upload(const Narrow& batch, void* stream);

private:
    std::shared_ptr<UnpackRing> ring_;
};
