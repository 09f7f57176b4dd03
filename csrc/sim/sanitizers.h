// What the sanitizers must be told, as functions that do nothing in a build without them. The simulator's own sources
// are never instrumented, so that TSan sees the kernels' memory alone; PIKV_SIM_TSAN and PIKV_SIM_ASAN say which
// sanitizer is linked.
#pragma once

#include <cstddef>

#if defined(PIKV_SIM_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_ignore_thread_begin();
void __tsan_ignore_thread_end();
}
#endif
#if defined(PIKV_SIM_ASAN)
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
void __asan_poison_memory_region(const void* address, size_t bytes);
void __asan_unpoison_memory_region(const void* address, size_t bytes);
}
#endif

namespace pikv::sim {

#if defined(PIKV_SIM_TSAN)
// What was done before release(x) happens before what is done after an acquire(x) that follows.
inline void release(void* address) { __tsan_release(address); }
inline void acquire(void* address) { __tsan_acquire(address); }
inline void unwatch() { __tsan_ignore_thread_begin(); }
inline void watch() { __tsan_ignore_thread_end(); }
#else
inline void release(void*) {}
inline void acquire(void*) {}
inline void unwatch() {}
inline void watch() {}
#endif

// As long as it lives TSan takes no notice of this fiber's memory: for the simulator's own books, which fibers share.
class Unwatched {
 public:
  Unwatched() { unwatch(); }
  ~Unwatched() { watch(); }
  Unwatched(const Unwatched&) = delete;
  Unwatched& operator=(const Unwatched&) = delete;
};

#if defined(PIKV_SIM_ASAN)
inline void forbid(const void* address, size_t bytes) { __asan_poison_memory_region(address, bytes); }
inline void allow(const void* address, size_t bytes) { __asan_unpoison_memory_region(address, bytes); }
#else
inline void forbid(const void*, size_t) {}
inline void allow(const void*, size_t) {}
#endif

}  // namespace pikv::sim
