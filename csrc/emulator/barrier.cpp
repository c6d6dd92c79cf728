// __syncthreads(): met by all threads of the block that have not ended, all at the same place in the source.
#include <cstring>

#include "emulator/block.h"
#include "emulator/tsan.h"

namespace freezekit::emulator {
namespace {

void open_barrier() {
  block.at_barrier = 0;
  block.barrier_generation++;
  for (Thread& t : block.threads) {
    if (t.state == State::at_barrier) t.state = State::ready;
  }
}

}  // namespace

void block_barrier(const char* file, int line) {
  if (block.at_barrier == 0) {
    block.barrier_file = file;
    block.barrier_line = line;
  } else if (block.barrier_line != line || std::strcmp(block.barrier_file, file) != 0) {
    fail("threads of a block meet at different __syncthreads(): %s:%d and %s:%d", block.barrier_file,
         block.barrier_line, file, line);
  }
  void* tag = tsan_barrier_tag(block.barrier_generation);
  tsan_release(tag);
  if (++block.at_barrier == block.alive) {
    open_barrier();
  } else {
    wait(State::at_barrier);
  }
  tsan_acquire(tag);
}

void complete_barrier_after_exit() {
  if (block.at_barrier && block.at_barrier == block.alive) open_barrier();
}

}  // namespace freezekit::emulator
