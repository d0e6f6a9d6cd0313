// parallel_for: every task once, phases in order, interruption, several callers, fork.
#include "nlk/parallel.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

namespace {

int failures = 0;

void expect(bool holds, const char* what, int threads = 0, long tasks = 0) {
  if (holds) return;
  std::printf("%s (%d threads, %ld tasks)\n", what, threads, tasks);
  ++failures;
}

struct Counts {
  explicit Counts(std::int64_t tasks) : ran(tasks), on(tasks, -1) {}
  std::vector<int> ran;  // not atomic: no two threads have the same task
  std::vector<int> on;
};

void count(void* context, std::int64_t task, int thread) {
  auto& counts = *static_cast<Counts*>(context);
  ++counts.ran[task];
  counts.on[task] = thread;
}

void test_every_task_runs_once() {
  for (int threads : {1, 2, 3, 8}) {
    for (std::int64_t tasks : {0, 1, 2, 7, 1000}) {
      Counts counts(tasks);
      expect(nlk::parallel_for(threads, tasks, count, &counts), "finished", threads, tasks);
      for (std::int64_t task = 0; task < tasks; ++task) {
        expect(counts.ran[task] == 1, "every task once", threads, tasks);
        expect(counts.on[task] >= 0 && counts.on[task] < threads, "thread number", threads, tasks);
      }
    }
  }
}

// A phase reads what others wrote in the phase before; the sums must be those of one thread.
std::vector<double> two_phases(int threads) {
  struct Context {
    std::vector<double> first, second;
  } context{std::vector<double>(500), std::vector<double>(500)};
  nlk::parallel_for(
      threads, 500,
      [](void* shared, std::int64_t task, int) {
        auto& own = *static_cast<Context*>(shared);
        own.first[task] = 1.0 / static_cast<double>(task + 1);
      },
      &context);
  nlk::parallel_for(
      threads, 500,
      [](void* shared, std::int64_t task, int) {
        auto& own = *static_cast<Context*>(shared);
        for (std::int64_t other = 499; other >= task; --other) own.second[task] += own.first[other];
      },
      &context);
  return context.second;
}

void test_results_do_not_depend_on_threads() {
  const auto alone = two_phases(1);
  for (int threads : {2, 5}) expect(two_phases(threads) == alone, "equal sums", threads, 500);
}

// Ten tasks call for as many themselves; each of these is run by the task's thread, as thread 0.
void test_tasks_call() {
  for (int threads : {1, 3}) {
    std::vector<Counts> counts(10, Counts(10));
    const bool finished = nlk::parallel_for(
        threads, 10,
        [](void* shared, std::int64_t task, int) {
          auto& own = (*static_cast<std::vector<Counts>*>(shared))[task];
          expect(nlk::parallel_for(3, 10, count, &own), "inner finished");
        },
        &counts);
    expect(finished, "outer finished", threads);
    for (const Counts& own : counts) {
      expect(own.ran == std::vector<int>(10, 1), "every inner task once", threads);
      expect(own.on == std::vector<int>(10, 0), "inner tasks on thread 0", threads);
    }
  }
}

void test_callers_at_once() {
  Counts first(3000), second(3000);
  std::thread other([&] { nlk::parallel_for(3, 3000, count, &second); });
  nlk::parallel_for(3, 3000, count, &first);
  other.join();
  for (int task = 0; task < 3000; ++task) {
    expect(first.ran[task] == 1 && second.ran[task] == 1, "two callers", 3, 3000);
  }
}

std::atomic<std::thread::id> asked_on;

void take_long(void* context, std::int64_t, int) {
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  ++*static_cast<std::atomic<int>*>(context);
}

void call_for_long(void* context, std::int64_t, int) {
  expect(!nlk::parallel_for(3, 1000, take_long, context), "a task's work says so, too");
}

void test_interrupt() {
  nlk::set_interrupt([] {
    asked_on = std::this_thread::get_id();
    return true;
  });
  for (int threads : {1, 3}) {
    std::atomic<int> ran{0};
    const bool finished = nlk::parallel_for(threads, 1000, take_long, &ran);
    expect(!finished, "says that it was interrupted", threads, 1000);
    expect(ran > 0 && ran < 500, "stops early", threads, 1000);
    expect(asked_on.load() == std::this_thread::get_id(), "asks on the caller", threads, 1000);
    // As many tasks as threads, which call for what takes long.
    ran = 0;
    const bool all_finished = nlk::parallel_for(threads, threads, call_for_long, &ran);
    expect(!all_finished, "says that a task's work was interrupted", threads, 1000);
    expect(ran > 0 && ran < 500, "stops the work of all tasks early", threads, 1000);
    expect(asked_on.load() == std::this_thread::get_id(), "asks on the caller", threads, 1000);
  }
  nlk::set_interrupt(nullptr);
  Counts counts(10);
  expect(nlk::parallel_for(2, 10, count, &counts), "works again", 2, 10);
}

bool all_on_one_thread() {
  Counts counts(100);
  bool one = nlk::parallel_for(4, 100, count, &counts);
  for (int task = 0; task < 100; ++task) one = one && counts.ran[task] == 1 && counts.on[task] == 0;
  return one;
}

void test_forked_child() {
  const pid_t child = fork();
  if (child == 0) _exit(all_on_one_thread() ? 0 : 1);
  int status = 0;
  waitpid(child, &status, 0);
  expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a forked child works on one thread");
}

}  // namespace

int main() {
  test_every_task_runs_once();
  test_results_do_not_depend_on_threads();
  test_tasks_call();
  test_callers_at_once();
  test_interrupt();
  test_forked_child();
  nlk::run_serially();
  expect(all_on_one_thread(), "works on one thread when told to");
  return failures == 0 ? 0 : 1;
}
