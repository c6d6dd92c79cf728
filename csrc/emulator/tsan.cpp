#include "emulator/tsan.h"

#ifdef FK_EMULATOR_TSAN

#include <algorithm>
#include <vector>

extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void* __tsan_get_current_fiber();
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
}

namespace freezekit::emulator {
namespace {

// So many that two blocks in a row or more have threads of their own; then slots are used again, by another thread of the
// block each time. More would cost time: TSan takes half a millisecond to make a thread.
constexpr int kSlots = 512;
constexpr unsigned kNoOrder = 1;  // __tsan_switch_to_fiber_no_sync

struct Tags {
  char barrier[2][8];
  char warp[32][2][8];
};

int block_number = 0, block_threads = 0;
void* host = nullptr;
char host_tag, end_tag;
std::vector<Tags*> tags;  // of the blocks of this launch: no two blocks meet at one

}  // namespace

void* tsan_create_thread() { return __tsan_create_fiber(0); }
void tsan_destroy_thread(void* thread) { __tsan_destroy_fiber(thread); }
void* tsan_current_thread() { return __tsan_get_current_fiber(); }
void tsan_switch_thread(void* thread) { __tsan_switch_to_fiber(thread, kNoOrder); }

void tsan_begin_block(int threads) {
  block_number++;
  block_threads = threads;
  tags.push_back(new Tags);
  host = tsan_current_thread();
  tsan_release(&host_tag);
}

void tsan_end_launch() {
  tsan_acquire(&end_tag);
  for (Tags* of_block : tags) delete of_block;
  tags.clear();
}

void tsan_learn_from_host() { tsan_acquire(&host_tag); }
void tsan_tell_host() { tsan_release(&end_tag); }

int tsan_slot_of(int thread) {
  const int sets = std::max(1, kSlots / block_threads);
  return block_number % sets * block_threads + (thread + block_number / sets) % block_threads;
}

void* tsan_barrier_tag(unsigned generation) { return tags.back()->barrier[generation & 1]; }
void* tsan_warp_tag(int warp, unsigned generation) { return tags.back()->warp[warp][generation & 1]; }

AsHost::AsHost() : own_(tsan_current_thread()) { tsan_switch_thread(host); }

AsHost::~AsHost() {
  tsan_release(&host_tag);
  tsan_switch_thread(own_);
  tsan_acquire(&host_tag);
}

}  // namespace freezekit::emulator

#endif
