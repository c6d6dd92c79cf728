// What the emulator tells ThreadSanitizer, which sees the kernels' accesses but not the emulator's own: CUDA threads are
// its logical threads, barriers and fences its happens-before. Nothing in other builds.
#pragma once

#include <cstddef>

#ifdef FK_EMULATOR_TSAN

extern "C" {
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_read_range(void* address, unsigned long bytes);
void __tsan_write_range(void* address, unsigned long bytes);
}

namespace freezekit::emulator {

inline void tsan_acquire(void* tag) { __tsan_acquire(tag); }
inline void tsan_release(void* tag) { __tsan_release(tag); }
inline void tsan_read(const void* p, size_t bytes) { __tsan_read_range(const_cast<void*>(p), bytes); }
inline void tsan_write(void* p, size_t bytes) { __tsan_write_range(p, bytes); }

void* tsan_create_thread();
void tsan_destroy_thread(void* thread);
void* tsan_current_thread();
void tsan_switch_thread(void* thread);  // without ordering the two

// The host is the launching thread. What it has done is known to a thread that calls tsan_learn_from_host(), and what a thread
// has done before tsan_tell_host() is known to the host after the launch. Nothing orders blocks among each other.
void tsan_begin_block(int threads);
void tsan_end_launch();
void tsan_learn_from_host();
void tsan_tell_host();

// Number of the logical thread for a thread of the running block. Blocks take turns with disjoint sets of them.
int tsan_slot_of(int thread);

// Places that happens-before hangs on. Two by turns: with one, a thread that leaves a barrier would also acquire what
// faster threads release on arriving at the next one, and write-after-read races would not show.
void* tsan_barrier_tag(unsigned generation);
void* tsan_warp_tag(int warp, unsigned generation);

// In this scope the emulator acts as the host: what it allocates and writes is older than any access of a kernel.
class AsHost {
 public:
  AsHost();
  ~AsHost();
  AsHost(const AsHost&) = delete;
  AsHost& operator=(const AsHost&) = delete;

 private:
  void* own_;
};

}  // namespace freezekit::emulator

#else

namespace freezekit::emulator {

inline void tsan_acquire(void*) {}
inline void tsan_release(void*) {}
inline void tsan_read(const void*, size_t) {}
inline void tsan_write(void*, size_t) {}
inline void tsan_begin_block(int) {}
inline void tsan_end_launch() {}
inline void tsan_learn_from_host() {}
inline void tsan_tell_host() {}
inline int tsan_slot_of(int) { return 0; }
inline void* tsan_barrier_tag(unsigned) { return nullptr; }
inline void* tsan_warp_tag(int, unsigned) { return nullptr; }

class AsHost {
 public:
  AsHost() {}  // user-provided, so that an object of it is not an unused variable
};

}  // namespace freezekit::emulator

#endif
