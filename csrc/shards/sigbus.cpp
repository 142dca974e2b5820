#include "shards/sigbus.h"

#include <csignal>
#include <mutex>

thread_local sigjmp_buf* sigbus_return = nullptr;

namespace {

struct sigaction before;

void on_sigbus(int, siginfo_t*, void*) {
    if (sigbus_return) {
        sigset_t sigbus;  // left by a jump: the signal must not stay blocked, or the next one ends the process
        sigemptyset(&sigbus);
        sigaddset(&sigbus, SIGBUS);
        ::pthread_sigmask(SIG_UNBLOCK, &sigbus, nullptr);
        siglongjmp(*sigbus_return, 1);
    }
    ::sigaction(SIGBUS, &before, nullptr);  // the instruction runs again and faults again, for the handler before ours
}

}  // namespace

void install_sigbus_handler() {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action{};
        action.sa_sigaction = on_sigbus;
        action.sa_flags = SA_SIGINFO;
        ::sigaction(SIGBUS, &action, &before);
    });
}
