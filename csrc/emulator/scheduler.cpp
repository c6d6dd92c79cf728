// Runs the blocks of a launch one by one, and the threads of a block on fibers.
//
// A fiber that has ended its thread takes the next one that has not started, so a kernel without barriers runs as plain
// calls. Under TSan every thread has a fiber of its own: reusing a stack would look like a race on it.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
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
std::mt19937 random_;

namespace {

// Limits of compute capability 8.0 (CUDA C++ Programming Guide, "Compute Capabilities").
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxDynamicShared = 163 * 1024;

std::mutex launch_mutex;
Fiber* main_fiber = nullptr;
Fiber* running = nullptr;
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Fiber*> idle;
std::vector<int> order;  // of threads; `cursor` goes round in it
size_t cursor = 0;
void (*kernel_body)(const void*) = nullptr;
const void* kernel_arguments = nullptr;
bool failed = false;

#ifdef FK_EMULATOR_TSAN
// GCC's TSan knows 8128 threads. Blocks take disjoint ones as far as these go, so that no order between blocks is
// assumed, then rotate.
constexpr unsigned kTsanThreads = 6000;
std::vector<void*> tsan_threads;
unsigned block_number = 0;
std::vector<SyncTags*> used_tags;

void* tsan_thread_of(int thread) {
  const unsigned n = static_cast<unsigned>(block.threads.size()), pools = std::max(1u, kTsanThreads / n);
  const size_t slot = size_t{block_number % pools} * n + (static_cast<unsigned>(thread) + block_number / pools) % n;
  while (tsan_threads.size() <= slot) tsan_threads.push_back(__tsan_create_fiber(0));
  return tsan_threads[slot];
}
#endif
uint64_t launch_tag, end_tag;  // before: the host's writes; after: all threads' writes

// The next thread that can run, null when there is none.
Thread* next_thread() {
  for (size_t looked_at = 0; looked_at <= order.size(); looked_at++) {
    if (cursor == order.size()) {
      cursor = 0;
      if (settings.seed > 1) std::shuffle(order.begin(), order.end(), random_);
    }
    Thread& t = block.threads[static_cast<size_t>(order[cursor++])];
    if (t.state == State::ready || t.state == State::not_started) return &t;
  }
  return nullptr;
}

[[noreturn]] void thread_main();

void set_current(Thread& t) {
  current = &t;
  thread_index = coordinates_of(index_of(t));
}

void switch_to(Fiber& fiber, bool ends = false) {
  Fiber& from = *running;
  running = &fiber;
  counters.switches++;
  fiber.enter(from, ends);
}

void bind_fiber(Thread& t) {
  if (idle.empty()) {
    fibers.push_back(std::make_unique<Fiber>(thread_main));
    idle.push_back(fibers.back().get());
  }
  t.fiber = idle.back();
  idle.pop_back();
#ifdef FK_EMULATOR_TSAN
  t.fiber->set_tsan_thread(tsan_thread_of(index_of(t)));
#endif
}

void run_thread(Thread& t) {
  if (t.state == State::not_started) {
    bind_fiber(t);
    t.state = State::ready;
  }
  set_current(t);
  switch_to(*t.fiber);
}

void end_thread() {
  check_no_copies_in_flight();
  tsan_release(&end_tag);
  current->state = State::done;
  block.alive--;
  complete_barrier_after_exit();
  complete_collectives_after_exit(index_of(*current) / kWarpSize);
}

[[noreturn]] void thread_main() {
  fiber_started();
  for (;;) {
    tsan_acquire(&launch_tag);
    kernel_body(kernel_arguments);
    end_thread();
    Fiber* mine = current->fiber;
    Thread* next = next_thread();
    if (!kThreadSanitizer && next && next->state == State::not_started) {
      next->state = State::ready;
      next->fiber = mine;
      set_current(*next);
      continue;
    }
    current = nullptr;
    if (!kThreadSanitizer) idle.push_back(mine);
    if (next) {
      run_thread(*next);
    } else {
      switch_to(*main_fiber);
    }
  }
}

const char* describe(State state) {
  return state == State::at_barrier ? "a __syncthreads()" : "a warp collective";
}

[[noreturn]] void fail_deadlocked() {
  const auto stuck = [](State s) {
    return std::count_if(block.threads.begin(), block.threads.end(), [=](const Thread& t) { return t.state == s; });
  };
  fail("deadlock at %s: %d threads wait at a __syncthreads(), %d at a warp collective, %d have ended",
       describe(current->state), static_cast<int>(stuck(State::at_barrier)),
       static_cast<int>(stuck(State::at_collective)), static_cast<int>(stuck(State::done)));
}

void run_block() {
  counters.blocks++;
  const size_t n = size_t{block_size.x} * block_size.y * block_size.z;
  block.threads.assign(n, Thread{});
  block.alive = static_cast<int>(n);
  block.at_barrier = 0;
  block.barrier_generation = 0;
  std::fill(std::begin(block.warp_generation), std::end(block.warp_generation), 0);
  cursor = 0;
#ifdef FK_EMULATOR_TSAN
  block_number++;
  block.tags = new SyncTags;
  used_tags.push_back(block.tags);
#endif
  if (settings.seed > 1) std::shuffle(order.begin(), order.end(), random_);
  tsan_release(&launch_tag);
  run_thread(*next_thread());
#ifdef FK_EMULATOR_TSAN
  fibers.clear();
#endif
}

// In the order that the seed asks for.
std::vector<uint64_t> order_of(uint64_t count) {
  std::vector<uint64_t> result(count);
  for (uint64_t i = 0; i < count; i++) result[i] = settings.seed == 1 ? count - 1 - i : i;
  if (settings.seed > 1) std::shuffle(result.begin(), result.end(), random_);
  return result;
}

const char* why_invalid(dim3 grid, dim3 threads, size_t dynamic_shared_bytes) {
  if (!grid.x || !grid.y || !grid.z || !threads.x || !threads.y || !threads.z) return "a dimension is zero";
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) return "the grid is too large";
  if (threads.x > kMaxThreads || threads.y > kMaxThreads || threads.z > 64 ||
      uint64_t{threads.x} * threads.y * threads.z > kMaxThreads) {
    return "the block is too large";
  }
  if (dynamic_shared_bytes > kMaxDynamicShared) return "more dynamic shared memory than a block can have";
  return nullptr;
}

// A failed launch leaves fibers inside of kernels: they are never entered again.
void drop_fibers() {
  for (Thread& t : block.threads) forget_copies(t);
  idle.clear();
  fibers.clear();
}

}  // namespace

uint3 coordinates_of(int thread) {
  const unsigned i = static_cast<unsigned>(thread);
  return {i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y};
}

void wait(State state) {
  Thread& me = *current;
  me.state = state;
  Thread* next = next_thread();
  if (!next) fail_deadlocked();
  run_thread(*next);
}

void fail(const char* format, ...) {
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
  switch_to(*main_fiber, true);
  std::abort();  // not reached: a failed fiber is never entered again
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
  random_.seed(settings.seed);
  failed = false;
  kernel_body = body;
  kernel_arguments = arguments;
  grid_size = grid;
  block_size = threads;
  Fiber own;
  main_fiber = running = &own;
  order.clear();
  for (uint64_t i : order_of(uint64_t{threads.x} * threads.y * threads.z)) order.push_back(static_cast<int>(i));
  for (uint64_t b : order_of(uint64_t{grid.x} * grid.y * grid.z)) {
    block_index = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                   static_cast<unsigned>(b / grid.x / grid.y)};
    begin_shared_memory(dynamic_shared_bytes);
    run_block();
    end_shared_memory();
    if (failed) break;
  }
  tsan_acquire(&end_tag);
  release_deferred_memory();
#ifdef FK_EMULATOR_TSAN
  for (SyncTags* tags : used_tags) delete tags;
  used_tags.clear();
#endif
  current = nullptr;
  if (failed) drop_fibers();
  return !failed;
}

}  // namespace freezekit::emulator
