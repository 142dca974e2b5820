// Reading a mapped page that its file no longer has raises SIGBUS, which would end the process without a message. Under
// survives(), the read ends instead, and the caller can name the file.
#pragma once

#include <atomic>
#include <csetjmp>

// Where this thread continues after a SIGBUS; null outside of survives().
extern thread_local sigjmp_buf* sigbus_return;

// Called once per process. A SIGBUS outside of survives() goes to the handler from before.
void install_sigbus_handler();

// Calls f(). False if it hit such a page; f() then does not finish, so it must neither throw nor own anything.
template <typename F>
bool survives(const F& f) {
    sigjmp_buf here;
    if (sigsetjmp(here, 0) != 0) {
        sigbus_return = nullptr;
        return false;
    }
    sigbus_return = &here;
    // the handler sees it before f() touches a page, and until it has
    std::atomic_signal_fence(std::memory_order_seq_cst);
    f();
    std::atomic_signal_fence(std::memory_order_seq_cst);
    sigbus_return = nullptr;
    return true;
}
