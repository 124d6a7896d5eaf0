// All threads of torch's own OpenMP runtime, as torch's `parallel_for` uses them: no second pool, and
// `torch.set_num_threads` holds. The functions are found in the process (kernels/cpp_threads.py); nothing links them.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

namespace bem {

struct Threads {
  void (*parallel)(void (*body)(void*), void* data, unsigned count, unsigned flags);  // GOMP_parallel
  int (*most)();  // omp_get_max_threads
  int (*count)();  // omp_get_num_threads
  int (*number)();  // omp_get_thread_num
  int (*is_inside)();  // omp_in_parallel
};

inline Threads threads{};

// f(first, last) over [begin, end), no part smaller than `grain`; inside another parallel region it is one part
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (begin >= end) return;
  if (end - begin <= std::max<int64_t>(1, grain) || threads.is_inside() || threads.most() <= 1) {
    f(begin, end);
    return;
  }
  struct Work {
    int64_t begin, end, grain;
    const F& f;
    std::atomic_flag has_failed = ATOMIC_FLAG_INIT;
    std::exception_ptr error{};
  } work{begin, end, grain, f};
  const auto body = [](void* data) {
    Work& work = *static_cast<Work*>(data);
    const int64_t size = work.end - work.begin;
    const int64_t count = std::min<int64_t>(threads.count(), (size + work.grain - 1) / work.grain);
    const int64_t part = (size + count - 1) / count, first = work.begin + threads.number() * part;
    if (first >= work.end) return;
    try {
      work.f(first, std::min(work.end, first + part));
    } catch (...) {
      if (!work.has_failed.test_and_set()) work.error = std::current_exception();
    }
  };
  threads.parallel(body, &work, 0, 0);
  if (work.error) std::rethrow_exception(work.error);
}

}  // namespace bem
