// A pool of threads that sleep between calls, and memory that each thread uses again.

#pragma once

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#include "values.h"

namespace {

// Being woken takes about as long, and the next call often comes sooner; longer would keep others from the core.
constexpr int SPIN_MICROSECONDS = 50;

// Waits until `ready`, for so long as being woken from sleep would take; whether it is.
template <class Ready>
bool soon(Ready ready) {
    const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(SPIN_MICROSECONDS);
    do {
        for (int i = 0; i < 16; i++) {
            if (ready()) return true;
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
    } while (std::chrono::steady_clock::now() < until);
    return false;
}

// Sleeping workers that a call wakes. One call at a time has them; another at the same moment works alone.
class Pool {
  public:
    template <class F>
    void run(Int tasks, Int threads, F f) {
        if (tasks <= 1 || threads <= 1 || getpid() != owner || !busy.try_lock()) {
            for (Int task = 0; task < tasks; task++) f(task);
            return;
        }
        {
            std::lock_guard<std::mutex> lock(mutex);
            for (; workers < threads - 1; workers++) std::thread(&Pool::work, this, workers).detach();
            call = [](void* context, Int task) { (*static_cast<F*>(context))(task); };
            context = &f;
            next = 0;
            end = tasks;
            helpers = std::min(threads, tasks) - 1;
            working = helpers;
            round++;
        }
        wake.notify_all();
        for (Int task; (task = next.fetch_add(1)) < tasks;) f(task);
        if (!soon([this] { return working == 0; })) {
            std::unique_lock<std::mutex> lock(mutex);
            done.wait(lock, [this] { return working == 0; });
        }
        busy.unlock();
    }

  private:
    void work(Int index) {
        for (uint64_t seen = 0;;) {
            soon([&] { return round != seen; });
            std::unique_lock<std::mutex> lock(mutex);
            wake.wait(lock, [&] { return round != seen; });
            seen = round;
            if (index >= helpers) continue;
            lock.unlock();
            for (Int task; (task = next.fetch_add(1)) < end;) call(context, task);
            lock.lock();
            if (--working == 0) done.notify_one();
        }
    }

    std::mutex busy, mutex;
    std::condition_variable wake, done;
    void (*call)(void*, Int) = nullptr;
    void* context = nullptr;
    std::atomic<Int> next{0};
    Int end = 0, workers = 0, helpers = 0;
    std::atomic<Int> working{0};
    std::atomic<uint64_t> round{0};
    const pid_t owner = getpid();  // a forked child has none of the workers
};

Pool& pool() {
    static Pool* one = new Pool;  // never destroyed: workers may still sleep on it when the process ends
    return *one;
}

// Memory of a thread that later calls use again: fresh memory costs a page fault per 4 KiB. It begins at a cache line, as
// a vector that crosses one is read at half the speed.
struct Scratch {
    char* memory = nullptr;
    size_t size = 0;
    ~Scratch() { std::free(memory); }
    template <class T = float>
    T* take(Int count) {
        const size_t wanted = (count * sizeof(T) + 63) / 64 * 64;
        if (size < wanted) {
            std::free(memory);  // before the larger one is asked for
            memory = static_cast<char*>(std::aligned_alloc(64, wanted));
            size = memory == nullptr ? 0 : wanted;
            if (memory == nullptr) {
                std::fprintf(stderr, "error: a compiled op found no memory for %zu bytes\nmake the batch or the model "
                                     "smaller\n", wanted);
                std::abort();
            }
        }
        return reinterpret_cast<T*>(memory);
    }
};

thread_local Scratch shared_packed, shared_rows, shared_more, local_a, local_b, local_c, local_sums, local_words,
    local_tiles;

}  // namespace
