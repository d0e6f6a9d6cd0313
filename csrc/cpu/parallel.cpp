#include "nlk/parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#ifdef NLK_STD_THREADS
#include <thread>
#include <vector>
#endif

namespace nlk {
namespace {

using Clock = std::chrono::steady_clock;
constexpr std::chrono::milliseconds kBetweenInterrupts{50};

std::atomic<Interrupt> interrupt_of_process{nullptr};
std::atomic<bool> serial{false};

// Loading the library registers it once.
const int at_fork = pthread_atfork(nullptr, nullptr, [] { run_serially(); });

struct Work {
  std::int64_t tasks;
  void (*run)(void*, std::int64_t, int);
  void* context;
  Work* outer;  // a task of which calls for this work; null for none
  std::atomic<std::int64_t> next{0};
  std::atomic<bool> stopped{false};

  bool is_stopped() const {
    return stopped.load(std::memory_order_relaxed) || (outer && outer->is_stopped());
  }
  void stop() {
    stopped.store(true, std::memory_order_relaxed);
    if (outer) outer->stop();
  }
};

// The work of which this thread runs a task, and whether it asks to stop: the calling thread does.
struct Place {
  Work* work = nullptr;
  bool asks = true;
};
thread_local Place place;

// Takes tasks until none is left.
void take_tasks(Work& work, int thread) {
  const Place before = place;
  place = {&work, thread == 0 && before.asks};
  const Interrupt interrupt = place.asks ? interrupt_of_process.load() : nullptr;
  auto asked = interrupt ? Clock::now() : Clock::time_point{};
  while (!work.is_stopped()) {
    const std::int64_t task = work.next.fetch_add(1, std::memory_order_relaxed);
    if (task >= work.tasks) break;
    work.run(work.context, task, thread);
    if (!interrupt) continue;
    const auto now = Clock::now();
    if (now - asked < kBetweenInterrupts) continue;
    asked = now;
    if (interrupt()) work.stop();
  }
  place = before;
}

}  // namespace

void run_serially() noexcept { serial.store(true, std::memory_order_relaxed); }

void set_interrupt(Interrupt interrupt) noexcept { interrupt_of_process.store(interrupt); }

bool parallel_for(int threads, std::int64_t tasks, void (*run)(void*, std::int64_t, int),
                  void* context) {
  Work work{tasks, run, context, place.work};
  if (place.work || serial.load(std::memory_order_relaxed)) threads = 1;
  threads = static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(threads, tasks)));
  if (threads == 1) {
    take_tasks(work, 0);
    return !work.is_stopped();
  }
#ifdef NLK_STD_THREADS
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) {
    others.emplace_back([&work, thread] { take_tasks(work, thread); });
  }
  take_tasks(work, 0);
  for (auto& other : others) other.join();
#else
  // Numbered by hand: a team may be smaller than asked for, and 0 must be the calling thread.
  std::atomic<int> arrived{1};
#pragma omp parallel num_threads(threads)
  {
    int thread = 0;
#pragma omp master
    thread = -1;
    take_tasks(work, thread < 0 ? 0 : arrived.fetch_add(1));
  }
#endif
  return !work.is_stopped();
}

}  // namespace nlk
