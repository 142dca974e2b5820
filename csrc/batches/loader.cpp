#include "batches/loader.h"

#include <unistd.h>

Loader::Loader(const Settings& settings, std::vector<std::shared_ptr<const ShardSet>> sources, Planner planner,
               uint32_t threads, uint32_t ahead)
    : settings_(settings),
      sources_(std::move(sources)),
      pool_(std::make_shared<BufferPool>(ahead + threads + 2)),
      process_(::getpid()),
      planner_(std::move(planner)),
      slots_(ahead) {
    if (threads < 1 || threads > 1024 || ahead < 1 || ahead > 1024)
        throw std::invalid_argument("threads and ahead: expected 1 to 1024, got " + std::to_string(threads) + " and " +
                                    std::to_string(ahead));
    try {
        for (uint32_t i = 0; i < threads; ++i) threads_.emplace_back([this] { work(); });
    } catch (...) {
        close();  // no destructor runs for an object that was never built
        throw;
    }
}

Loader::~Loader() { close(); }

void Loader::close() {
    if (::getpid() != process_) {  // a fork has this object but not its threads
        for (std::thread& thread : threads_) thread.detach();
        threads_.clear();
        return;
    }
    {
        std::lock_guard lock(mutex_);
        stop_ = true;
    }
    room_.notify_all();
    ready_.notify_all();
    for (std::thread& thread : threads_)
        if (thread.joinable()) thread.join();
}

std::unique_ptr<Batch> Loader::next(std::chrono::milliseconds patience) {
    if (::getpid() != process_)
        throw std::runtime_error(
            "this loader was opened in another process, whose threads a fork does not have; open it after forking");
    std::unique_lock lock(mutex_);
    Slot& slot = slots_[delivered_ % slots_.size()];
    bool found = ready_.wait_for(lock, patience, [&] { return stop_ || slot.batch || slot.error; });
    if (stop_) throw std::runtime_error("this loader is closed");
    if (!found) return nullptr;
    if (slot.error) std::rethrow_exception(slot.error);
    ++delivered_;
    std::unique_ptr<Batch> batch = std::move(slot.batch);
    lock.unlock();
    room_.notify_one();
    return batch;
}

void Loader::work() {
    for (;;) {
        uint64_t ticket;
        Plan plan;
        Slot made;
        {
            std::lock_guard planning(plan_mutex_);
            {
                std::unique_lock lock(mutex_);
                room_.wait(lock, [&] { return stop_ || planned_ < delivered_ + slots_.size(); });
                if (stop_) return;
            }
            try {
                plan = planner_.next();
            } catch (...) {
                made.error = std::current_exception();
            }
            ticket = planned_++;
        }
        bool broken = made.error != nullptr;  // the steps after it cannot be planned
        if (!broken) made = make(std::move(plan));
        {
            std::lock_guard lock(mutex_);
            slots_[ticket % slots_.size()] = std::move(made);
        }
        ready_.notify_all();
        if (broken) return;
    }
}

Loader::Slot Loader::make(Plan plan) const {
    Slot slot;
    try {
        uint32_t source = plan.source;
        slot.batch = read_batch(settings_, *sources_[source], std::move(plan), *pool_);
    } catch (...) {
        slot.error = std::current_exception();
    }
    return slot;
}
