#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "unpack/unpack.h"

namespace {

void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string("CUDA: cannot ") + what + ": " + cudaGetErrorString(error));
}

// Restores the device of the calling thread.
struct OnDevice {
    explicit OnDevice(int device) {
        check(cudaGetDevice(&before), "tell the current device");
        check(cudaSetDevice(device), "use the device");
    }
    ~OnDevice() { cudaSetDevice(before); }
    int before = 0;
};

size_t aligned(size_t bytes) { return (bytes + 15) / 16 * 16; }

__global__ void unpack(Narrow in, Wide out, int64_t count) {
    for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x)
        unpack_token(in, out, i);
}

}  // namespace

struct UnpackRing {
    struct Slot {
        uint8_t *pinned = nullptr, *device = nullptr;
        size_t pinned_bytes = 0, device_bytes = 0;
        cudaEvent_t ready = nullptr, released = nullptr;
        cudaStream_t user = nullptr;  // the stream that the batch in it was handed to
        bool held = false;
    };

    UnpackRing(int on, uint32_t count) : device(on), slots(count) {}

    void open() {
        OnDevice here(device);
        check(cudaStreamCreateWithFlags(&copies, cudaStreamNonBlocking), "create a stream");
        for (Slot& slot : slots)
            for (cudaEvent_t* event : {&slot.ready, &slot.released})
                check(cudaEventCreateWithFlags(event, cudaEventDisableTiming), "create an event");
    }

    ~UnpackRing() {  // no slot is in use any more; errors of CUDA (at exit, that it is gone) do not matter
        int before = 0;
        cudaGetDevice(&before);
        cudaSetDevice(device);
        if (copies) cudaStreamSynchronize(copies);
        for (Slot& slot : slots) {
            cudaFreeHost(slot.pinned);
            cudaFree(slot.device);  // waits for every stream
            if (slot.ready) cudaEventDestroy(slot.ready);
            if (slot.released) cudaEventDestroy(slot.released);
        }
        if (copies) cudaStreamDestroy(copies);
        cudaSetDevice(before);
    }

    // A free slot with this much room, and some more, since the next batch may be a little larger.
    uint32_t take(size_t pinned_bytes, size_t device_bytes) {
        uint32_t found = 0;
        {
            std::lock_guard<std::mutex> lock(mutex);
            uint32_t tried = 0;
            do {
                if (tried++ == slots.size())
                    throw std::runtime_error(
                        "all " + std::to_string(slots.size()) +
                        " batches on the device are still held; let go of one, or open the unpacker with more slots");
                found = next;
                next = (next + 1) % slots.size();
            } while (slots[found].held);
            slots[found].held = true;
        }
        Slot& slot = slots[found];
        try {
            check(cudaEventSynchronize(slot.ready), "wait for the copy before");  // it may still read the pinned memory
            if (slot.pinned_bytes < pinned_bytes) {
                cudaFreeHost(slot.pinned);
                slot.pinned = nullptr;
                slot.pinned_bytes = 0;
                check(cudaHostAlloc(reinterpret_cast<void**>(&slot.pinned), pinned_bytes + pinned_bytes / 4,
                                    cudaHostAllocDefault),
                      "allocate pinned memory");
                slot.pinned_bytes = pinned_bytes + pinned_bytes / 4;
            }
            if (slot.device_bytes < device_bytes) {
                check(cudaEventSynchronize(slot.released), "wait for the batch's last user");
                cudaFree(slot.device);
                slot.device = nullptr;
                slot.device_bytes = 0;
                check(cudaMalloc(reinterpret_cast<void**>(&slot.device), device_bytes + device_bytes / 4),
                      "allocate device memory");
                slot.device_bytes = device_bytes + device_bytes / 4;
            }
        } catch (...) {
            give_back(found);
            throw;
        }
        return found;
    }

    void give_back(uint32_t slot) {
        std::lock_guard<std::mutex> lock(mutex);
        slots[slot].held = false;
    }

    const int device;
    cudaStream_t copies = nullptr;
    std::mutex mutex;  // of `held` and `next`
    std::vector<Slot> slots;
    uint32_t next = 0;
};

Unpacker::Unpacker(int device, uint32_t slots) {
    if (slots < 1) throw std::invalid_argument("slots: expected at least 1, got 0");
    ring_ = std::make_shared<UnpackRing>(device, slots);
    ring_->open();
}

std::shared_ptr<const Unpacked> Unpacker::upload(const Narrow& batch, void* stream) {
    OnDevice here(ring_->device);
    size_t count = batch.cu_seqlens[batch.sequences], starts = (batch.sequences + size_t{1}) * 4,
           numbers = size_t{4} * batch.sequences;
    bool targets = batch.follow != nullptr;
    // pinned, and again at the head of the device's memory: cu_seqlens, follow, ids; then tokens, positions, targets,
    // mask
    size_t at_follow = aligned(starts), at_ids = at_follow + (targets ? aligned(numbers) : 0);
    size_t sent = at_ids + aligned(count * batch.width), column = aligned(count * 4);
    uint32_t number = ring_->take(sent, sent + column * (targets ? 4 : 2));
    UnpackRing::Slot& slot = ring_->slots[number];
    auto out = std::shared_ptr<Unpacked>(new Unpacked{
        ring_, number, {}, reinterpret_cast<int32_t*>(slot.device), static_cast<int32_t>(count), batch.sequences});
    slot.user = static_cast<cudaStream_t>(stream);  // from here on ~Unpacked gives the slot back

    std::memcpy(slot.pinned, batch.cu_seqlens, starts);
    if (targets) std::memcpy(slot.pinned + at_follow, batch.follow, numbers);
    std::memcpy(slot.pinned + at_ids, batch.ids, count * batch.width);

    // the slot's last user may still be reading what is overwritten now
    check(cudaStreamWaitEvent(ring_->copies, slot.released, 0), "wait for the batch's last user");
    check(cudaMemcpyAsync(slot.device, slot.pinned, sent, cudaMemcpyHostToDevice, ring_->copies), "copy a batch");
    uint8_t* wide = slot.device + sent;
    out->wide = {reinterpret_cast<int32_t*>(wide), reinterpret_cast<int32_t*>(wide + column),
                 targets ? reinterpret_cast<int32_t*>(wide + 2 * column) : nullptr,
                 targets ? wide + 3 * column : nullptr};
    if (count > 0) {
        const int32_t* follow = targets ? reinterpret_cast<const int32_t*>(slot.device + at_follow) : nullptr;
        Narrow narrow{slot.device + at_ids, out->cu_seqlens, follow, batch.width, batch.sequences};
        unsigned blocks = static_cast<unsigned>(std::min<size_t>((count + 255) / 256, 4096));
        unpack<<<blocks, 256, 0, ring_->copies>>>(narrow, out->wide, static_cast<int64_t>(count));
        check(cudaGetLastError(), "start the kernel");
    }
    check(cudaEventRecord(slot.ready, ring_->copies), "record an event");
    check(cudaStreamWaitEvent(slot.user, slot.ready, 0), "let the stream wait for the batch");
    return out;
}

Unpacked::~Unpacked() {
    int before = 0;
    cudaGetDevice(&before);
    cudaSetDevice(ring->device);
    cudaEventRecord(ring->slots[slot].released, ring->slots[slot].user);
    cudaSetDevice(before);
    ring->give_back(slot);
}
