// What the emulator tells ThreadSanitizer; nothing in other builds.
#pragma once

#include <cstddef>

#ifdef FK_EMULATOR_TSAN

extern "C" {
void* __tsan_create_fiber(unsigned flags);
void* __tsan_get_current_fiber();
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
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

}  // namespace freezekit::emulator

#else

namespace freezekit::emulator {

inline void tsan_acquire(void*) {}
inline void tsan_release(void*) {}
inline void tsan_read(const void*, size_t) {}
inline void tsan_write(void*, size_t) {}

}  // namespace freezekit::emulator

#endif
