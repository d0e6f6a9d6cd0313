// Threads for the kernels: OpenMP (the runtime that torch has loaded), or std::thread where
// NLK_STD_THREADS is defined (ThreadSanitizer does not know OpenMP's barriers).
#ifndef NLK_PARALLEL_H_
#define NLK_PARALLEL_H_

#include <cstdint>

namespace nlk {

// Calls run(context, task, thread) for every task in [0, tasks), each once, in any order, on at
// most `threads` threads; `thread` in [0, threads) names the one that runs it. Returns after all
// have ended. What a task wrote before is seen by every task of the next call. A task may call it,
// too: its thread then does everything, as thread 0.
//
// Returns false when the interrupt below asked to stop: then some tasks were not run.
// In a process that was forked one thread does everything: the pool of OpenMP does not survive.
bool parallel_for(int threads, std::int64_t tasks,
                  void (*run)(void* context, std::int64_t task, int thread), void* context);

// From now on one thread does everything: for a process that was forked before this library was
// loaded, which nothing here can see.
void run_serially() noexcept;

// Asked by the calling thread between its tasks, a few times a second at most; true stops the work.
using Interrupt = bool (*)();
void set_interrupt(Interrupt interrupt) noexcept;

}  // namespace nlk

#endif  // NLK_PARALLEL_H_
