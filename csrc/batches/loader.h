// Threads make batches ahead of time; they are handed out in the order of the steps.
#pragma once

#include <chrono>
#include <condition_variable>
#include <exception>
#include <thread>

#include "batches/batch.h"

class Loader {
public:
    // `threads` make batches, up to `ahead` of them in advance, from where the planner stands.
    Loader(const Settings& settings, std::vector<std::shared_ptr<const ShardSet>> sources, Planner planner,
           uint32_t threads, uint32_t ahead);
    ~Loader();
    Loader(const Loader&) = delete;
    Loader& operator=(const Loader&) = delete;

    // The batch of the next step, or null if it was not ready in time. Rethrows the error of making that batch, also at
    // every further call. Throws std::runtime_error after close() and in a forked process.
    std::unique_ptr<Batch> next(std::chrono::milliseconds patience);

    // Ends and joins the threads; a batch that is being made is finished first. Batches handed out stay whole.
    void close();

private:
    struct Slot {
        std::unique_ptr<Batch> batch;
        std::exception_ptr error;
    };
    void work();
    Slot make(Plan plan) const;

    const Settings settings_;
    const std::vector<std::shared_ptr<const ShardSet>> sources_;
    const std::shared_ptr<BufferPool> pool_;
    const int process_;

    std::mutex plan_mutex_;  // taken before mutex_: plans are made one after another, in the order of the steps
    Planner planner_;
    uint64_t planned_ = 0;

    std::mutex mutex_;
    std::condition_variable room_, ready_;
    std::vector<Slot> slots_;  // batch k is in slot k % ahead
    uint64_t delivered_ = 0;
    bool stop_ = false;

    std::vector<std::thread> threads_;
};
