// Threads for callers of the C interface that have none.
#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "include/mpq_cpu.h"

namespace {

using Task = void (*)(void* context, int64_t begin, int64_t end);

constexpr int64_t kRangesOfAThread = 4;  // so that one that is late does not hold up the others

}  // namespace

struct mpq_cpu_pool {
  std::vector<std::thread> workers;
  std::mutex turn;   // held by the call that has the pool
  std::mutex mutex;  // of what follows
  std::condition_variable work, done;
  Task task = nullptr;
  void* context = nullptr;
  int64_t n = 0, next = 0, step = 1, running = 0;
  bool closing = false;

  // Ranges of the present work until none is left. `lock` holds the mutex, before and after.
  void take_ranges(std::unique_lock<std::mutex>& lock) {
    ++running;
    while (next < n) {
      const int64_t begin = next, end = std::min(n, begin + step);
      next = end;
      const Task call = task;
      void* const argument = context;
      lock.unlock();
      call(argument, begin, end);
      lock.lock();
    }
    if (--running == 0) done.notify_one();
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex);
    while (true) {
      work.wait(lock, [this] { return closing || next < n; });
      if (closing) return;
      take_ranges(lock);
    }
  }

  void close() {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      closing = true;
    }
    work.notify_all();
    for (std::thread& worker : workers) worker.join();
  }
};

int mpq_cpu_pool_open(int32_t threads, mpq_cpu_pool** pool) {
  if (!pool) return MPQ_ERROR_NULL;
  *pool = nullptr;
  if (threads < 1) return MPQ_ERROR_SHAPE;
  mpq_cpu_pool* made = new (std::nothrow) mpq_cpu_pool;
  if (!made) return MPQ_ERROR_MEMORY;
  try {
    for (int32_t i = 1; i < threads; ++i) made->workers.emplace_back([made] { made->serve(); });
  } catch (...) {  // no memory, or no more threads
    mpq_cpu_pool_close(made);
    return MPQ_ERROR_MEMORY;
  }
  *pool = made;
  return MPQ_OK;
}

void mpq_cpu_pool_run(void* pool, int64_t n, void (*task)(void*, int64_t, int64_t), void* context) {
  mpq_cpu_pool& p = *static_cast<mpq_cpu_pool*>(pool);
  const std::lock_guard<std::mutex> turn(p.turn);
  std::unique_lock<std::mutex> lock(p.mutex);
  const int64_t ranges = kRangesOfAThread * static_cast<int64_t>(p.workers.size() + 1);
  p.task = task;
  p.context = context;
  p.n = n;
  p.next = 0;
  p.step = std::max<int64_t>(1, (n + ranges - 1) / ranges);
  p.work.notify_all();
  p.take_ranges(lock);
  p.done.wait(lock, [&p] { return p.running == 0; });
}

void mpq_cpu_pool_close(mpq_cpu_pool* pool) {
  if (!pool) return;
  pool->close();
  delete pool;
}
