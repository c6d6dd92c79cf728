// Runs CUDA kernels on the CPU: the same source that nvcc compiles for a GPU, compiled by g++ for tests and self-tests.
//
// Blocks run one after another; each CUDA thread of a block runs on a fiber until it must wait at a barrier or a warp
// collective. `settings.seed` chooses in which order blocks and threads run: 0 ascending, 1 descending, others at random.
// One launch at a time in a process (a mutex holds the others). A kernel must not wait for another block.
//
// Shared memory starts as NaN, and so is the destination of a cp.async that has not landed. What a GPU leaves undefined
// (divergent barriers and collectives, misaligned copies, copies never waited for ...) fails the launch with a message.
// Out-of-bounds accesses and races show when kernels and emulator are built with ASan or TSan.
#pragma once

#include <cstddef>
#include <cstdint>

#include "emulator/tensor_map.h"

// CUDA's built-in vector types, with CUDA's sizes and alignments (CUDA C++ Programming Guide, "Built-in Vector Types").
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct uint3 {
  unsigned x, y, z;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline float2 make_float2(float x, float y) { return {x, y}; }

namespace freezekit::emulator {

// When asynchronous work is done, be it a cp.async, a bulk copy or a wgmma: as late as its wait allows, at once, or by
// chance one or the other.
enum class CpAsync : int { lazy, eager, mixed };

struct Settings {
  unsigned seed = 0;
  CpAsync cp_async = CpAsync::lazy;
};

struct Counters {
  uint64_t launches = 0, blocks = 0, switches = 0;         // switches from one fiber to another
  uint64_t cp_async = 0, mma = 0;                          // copies (a thread's), mma instructions (a warp's)
  uint64_t tensor_copies = 0, wgmma = 0;                   // bulk copies, wgmma instructions (a warp's)
  uint64_t ldmatrix_phases = 0;                            // 8 rows of 16 bytes read at once
  uint64_t ldmatrix_conflicts = 0;                         // phases whose rows are not in 8 different groups of 4 banks
  uint64_t global_read_bytes = 0, global_write_bytes = 0;  // by load_global, store_global and copies
};

extern Settings settings;
extern Counters counters;

// Called by kernels, whose accesses TSan watches; these are not theirs.
__attribute__((no_sanitize("thread"))) inline void count_global_read(size_t bytes) {
  counters.global_read_bytes += bytes;
}
__attribute__((no_sanitize("thread"))) inline void count_global_write(size_t bytes) {
  counters.global_write_bytes += bytes;
}

// Of the thread that runs now.
extern uint3 thread_index, block_index;
extern dim3 block_size, grid_size;

// Calls body(arguments) once per thread. False: the launch failed, and freezekit_last_error() says why.
bool run(void (*body)(const void*), const void* arguments, dim3 grid, dim3 block, size_t dynamic_shared_bytes);

// Ends the launch from inside a kernel; the text is as for printf.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// __syncthreads(); file and line name the barrier.
void block_barrier(const char* file, int line);

// Warp collectives. Every thread of `mask` that has not ended takes part.
int lane();
void warp_barrier(unsigned mask);

// Shared memory of the running block. A static array is known by the address of its `key`.
void* dynamic_shared();
void* static_shared(const void* key, size_t bytes);

// `bytes` is 4, 8 or 16; zeros land where `copy` is false.
void cp_async(void* shared, const void* global, int bytes, bool copy);
void cp_async_commit();
void cp_async_wait(int newest_groups_in_flight);

// `matrices` is 1, 2 or 4. Lanes below 8 * matrices give the address of a row, check it, and pass what is there.
void check_ldmatrix_row(const void* address);
void ldmatrix(uint32_t* fragment, int matrices, bool transposed, const void* address, const uint4& row);

// The address of shared memory in its window, as PTX has it.
uint32_t shared_address(const void* p);

// mbarrier (PTX ISA 9.7.13.15). An arrival may expect bytes in the same phase. A wait returns once the phase of that
// parity has completed.
void mbarrier_init(uint64_t* barrier, uint32_t arrivals);
void fence_mbarriers();  // the running thread's initialisations are seen by bulk copies
void mbarrier_arrive(uint64_t* barrier, uint32_t bytes);
void mbarrier_wait(uint64_t* barrier, uint32_t parity);

// cp.async.bulk.tensor: coordinates innermost first; im2col's are channel, w, h, image, its offsets w, h.
void copy_tiled(void* shared, const TensorMap* map, uint64_t* barrier, const int32_t* at, int rank);
void copy_im2col(void* shared, const TensorMap* map, uint64_t* barrier, const int32_t (&at)[4],
                 const uint16_t (&offset)[2]);

// wgmma (PTX ISA 9.7.15): D[64][n] += A[64][depth] * B[depth][n] of a warpgroup, whose warps have 16 rows each. Bits of
// `transposed`: 1 A, 2 B is MN-major.
enum class WgmmaType : int { bf16, f16, tf32 };
void wgmma(float* d, WgmmaType, int n, int transposed, uint64_t a, uint64_t b);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int newest_groups_in_flight);
void set_max_registers(int registers);

// D = A * B + D for one warp: fragments as in the PTX ISA.
void mma_m16n8k16_bf16(float* d, const uint32_t* a, const uint32_t* b);
void mma_m16n8k16_f16(float* d, const uint32_t* a, const uint32_t* b);
void mma_m16n8k8_tf32(float* d, const uint32_t* a, const uint32_t* b);

}  // namespace freezekit::emulator
