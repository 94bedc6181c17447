// A thread pool whose workers sleep between calls, and scratch memory that each thread reuses.

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

// Waking a thread takes about this long, and the next call often comes sooner. Spinning longer would take the core from
// other processes.
constexpr int SPIN_MICROSECONDS = 50;

// Spins until `ready()` is true, for at most SPIN_MICROSECONDS. Returns whether it became true.
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

// Workers that a call wakes up. One call at a time uses them; a concurrent call runs all its tasks itself.
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
    const pid_t owner = getpid();  // fork copies no threads, so a forked child has no workers
};

Pool& pool() {
    static Pool* one = new Pool;  // never destroyed, since workers may still be waiting on it when the process exits
    return *one;
}

// Scratch memory of a thread, reused by later calls, since fresh memory costs a page fault per 4 KiB. Aligned to a
// cache line, since a vector that crosses a line is read at half the speed.
struct Scratch {
    char* memory = nullptr;
    size_t size = 0;
    ~Scratch() { std::free(memory); }
    template <class T = float>
    T* take(Int count) {
        const size_t wanted = (count * sizeof(T) + 63) / 64 * 64;
        if (size < wanted) {
            std::free(memory);  // first, so that both blocks are never held at once
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
