// Runs the blocks of a launch one by one, and the threads of a block on fibers.
//
// A fiber that has ended its thread takes the next one that has not started, so a kernel without barriers runs as plain
// calls. Under TSan every thread of a block has a fiber of its own, which is one of TSan's logical threads.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>

#include "emulator/block.h"
#include "emulator/tsan.h"
#include "kernels/last_error.h"

namespace freezekit::emulator {

Settings settings;
Counters counters;
uint3 thread_index, block_index;
dim3 block_size, grid_size;
Block block;
Thread* current = nullptr;
std::mt19937 schedule_random;

namespace {

std::mutex launch_mutex;
Fiber* host_fiber = nullptr;
Fiber* running = nullptr;
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Fiber*> idle;
std::vector<int> order;  // of threads; `cursor` goes round in it
size_t cursor = 0;
void (*kernel_body)(const void*) = nullptr;
const void* kernel_arguments = nullptr;
bool failed = false;

// Seed 0 runs blocks and threads in order, 1 in reverse, any other shuffled.
void arrange(std::vector<int>& indices) {
  if (settings.seed == 1) std::reverse(indices.begin(), indices.end());
  if (settings.seed > 1) std::shuffle(indices.begin(), indices.end(), schedule_random);
}

void fill_ascending(std::vector<int>& indices, int64_t count) {
  indices.resize(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; i++) indices[static_cast<size_t>(i)] = static_cast<int>(i);
}

// The next thread that can run, null when there is none.
Thread* next_thread() {
  for (size_t looked_at = 0; looked_at <= order.size(); looked_at++) {
    if (cursor == order.size()) {
      cursor = 0;
      if (settings.seed > 1) std::shuffle(order.begin(), order.end(), schedule_random);
    }
    Thread& t = block.threads[static_cast<size_t>(order[cursor++])];
    if (t.state == State::ready || t.state == State::not_started) return &t;
  }
  return nullptr;
}

[[noreturn]] void fiber_main();

void set_current(Thread& t) {
  current = &t;
  thread_index = t.index;
}

void switch_to(Fiber& fiber, bool ends = false) {
  Fiber& from = *running;
  running = &fiber;
  counters.switches++;
  fiber.enter(from, ends);
}

Fiber& new_fiber() {
  fibers.push_back(std::make_unique<Fiber>(fiber_main));
  return *fibers.back();
}

Fiber& free_fiber_for(const Thread& t) {
  if (kThreadSanitizer) {
    const auto slot = static_cast<size_t>(tsan_slot_of(index_of(t)));
    while (fibers.size() <= slot) new_fiber();
    return *fibers[slot];
  }
  if (idle.empty()) return new_fiber();
  Fiber& last = *idle.back();
  idle.pop_back();
  return last;
}

void start(Thread& t) {
  const AsHost as_host;
  t.fiber = &free_fiber_for(t);
  t.state = State::ready;
}

void go_on_with(Thread& t) {
  if (t.state == State::not_started) start(t);
  set_current(t);
  switch_to(*t.fiber);
}

int count_threads(State state) {
  return static_cast<int>(
      std::count_if(block.threads.begin(), block.threads.end(), [=](const Thread& t) { return t.state == state; }));
}

[[noreturn]] void fail_deadlocked() {
  fail("deadlock: %d threads wait at a __syncthreads(), %d at a warp collective, %d at an mbarrier, %d have ended",
       count_threads(State::at_barrier), count_threads(State::at_collective), count_threads(State::at_mbarrier),
       count_threads(State::done));
}

void end_current() {
  check_no_copies_in_flight();
  if (block.alive == 1) check_mbarriers_at_end();
  check_no_wgmma_in_flight();
  tsan_tell_host();
  current->state = State::done;
  block.alive--;
  complete_barrier_after_exit();
  complete_collectives_after_exit(index_of(*current));
}

void fiber_main() {
  fiber_started();
  for (;;) {
    tsan_learn_from_host();
    kernel_body(kernel_arguments);
    end_current();
    Fiber* mine = current->fiber;
    Thread* next = next_thread();
    if (!kThreadSanitizer && next && next->state == State::not_started) {
      next->state = State::ready;
      next->fiber = mine;
      set_current(*next);
      continue;
    }
    if (!next && block.alive) fail_deadlocked();
    if (!kThreadSanitizer) idle.push_back(mine);
    if (next) {
      go_on_with(*next);
    } else {
      switch_to(*host_fiber);
    }
  }
}

void reset_block() {
  block.threads.assign(size_t{block_size.x} * block_size.y * block_size.z, Thread{});
  block.alive = static_cast<int>(block.threads.size());
  block.at_barrier = 0;
  block.barrier_generation = 0;
  for (Warp& warp : block.warps) warp = {};
  uint3 index = {};
  for (int i = 0; i < block.alive; i++) {
    block.threads[static_cast<size_t>(i)].index = index;
    block.warps[i / kWarpSize].alive |= 1u << i % kWarpSize;
    if (++index.x < block_size.x) continue;
    index.x = 0;
    if (++index.y < block_size.y) continue;
    index.y = 0;
    ++index.z;
  }
}

void run_block(unsigned number, size_t dynamic_shared_bytes) {
  counters.blocks++;
  block_index = {number % grid_size.x, number / grid_size.x % grid_size.y, number / grid_size.x / grid_size.y};
  begin_shared_memory(dynamic_shared_bytes);
  begin_mbarriers();
  reset_block();
  begin_wgmma();
  fill_ascending(order, block.alive);
  arrange(order);
  cursor = 0;
  tsan_begin_block(block.alive);
  go_on_with(*next_thread());
  end_shared_memory();
}

// Limits of compute capability 9.0 (CUDA C++ Programming Guide, "Compute Capabilities"); 8.0 has less shared memory,
// 163 KiB, of which its kernels use half. A grid of 2^31 blocks or more
// is also more than a CPU would ever finish.
const char* why_invalid(dim3 grid, dim3 threads, size_t dynamic_shared_bytes) {
  if (!grid.x || !grid.y || !grid.z || !threads.x || !threads.y || !threads.z) return "a dimension is zero";
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) return "the grid is too large";
  if (uint64_t{grid.x} * grid.y > 0x7fffffffu / grid.z) return "the grid is too large to emulate";
  if (threads.z > 64 || uint64_t{threads.x} * threads.y > kMaxThreads / threads.z) return "the block is too large";
  if (dynamic_shared_bytes > 227 * 1024) return "more dynamic shared memory than a block can have";
  return nullptr;
}

// A failed launch leaves fibers inside of kernels; they are never entered again.
void drop_fibers() {
  for (Thread& t : block.threads) forget_copies(t);
  idle.clear();
  fibers.clear();
}

}  // namespace

void wait(State state) {
  tsan_tell_host();  // lest a launch that fails elsewhere looks like a race with this thread
  current->state = state;
  Thread* next = next_thread();
  if (!next) fail_deadlocked();
  go_on_with(*next);
}

void fail(const char* format, ...) {
  tsan_tell_host();
  const AsHost as_host;
  char text[640], message[900];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  std::snprintf(message, sizeof message, "%s (block %u,%u,%u of %u,%u,%u; thread %u,%u,%u of %u,%u,%u)", text,
                block_index.x, block_index.y, block_index.z, grid_size.x, grid_size.y, grid_size.z, thread_index.x,
                thread_index.y, thread_index.z, block_size.x, block_size.y, block_size.z);
  set_last_error(message);
  failed = true;
  switch_to(*host_fiber, true);
  std::abort();  // not reached: nobody goes on with a failed fiber
}

bool run(void (*body)(const void*), const void* arguments, dim3 grid, dim3 threads, size_t dynamic_shared_bytes) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  if (const char* reason = why_invalid(grid, threads, dynamic_shared_bytes)) {
    char message[200];
    std::snprintf(message, sizeof message, "invalid launch: %s (grid %u,%u,%u; block %u,%u,%u; %zu bytes)", reason,
                  grid.x, grid.y, grid.z, threads.x, threads.y, threads.z, dynamic_shared_bytes);
    set_last_error(message);
    return false;
  }
  counters.launches++;
  schedule_random.seed(settings.seed);
  failed = false;
  kernel_body = body;
  kernel_arguments = arguments;
  grid_size = grid;
  block_size = threads;
  Fiber host;
  host_fiber = running = &host;
  std::vector<int> blocks;
  fill_ascending(blocks, int64_t{grid.x} * grid.y * grid.z);
  arrange(blocks);
  for (int number : blocks) {
    run_block(static_cast<unsigned>(number), dynamic_shared_bytes);
    if (failed) break;
  }
  tsan_end_launch();
  release_deferred_memory();
  release_mbarriers();
  current = nullptr;
  if (failed) drop_fibers();
  return !failed;
}

}  // namespace freezekit::emulator
