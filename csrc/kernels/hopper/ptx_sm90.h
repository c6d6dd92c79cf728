// PTX instructions of Hopper (sm_90a) behind plain functions, as ptx.h has those of sm_80: mbarriers, bulk tensor copies,
// wgmma. Section numbers are those of the PTX ISA 9.0 manual. On a GPU other than sm_90a they do nothing: kernels that
// call them are launched on sm_90 alone.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/ptx.h"

#ifdef __CUDACC__
#include <cuda.h>
#endif

#if defined(__CUDACC__) && defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FK_SM90A  // device code for sm_90a is being compiled
#endif

namespace freezekit::ptx {

#ifdef __CUDACC__
using TensorMap = CUtensorMap;
#else
using TensorMap = emulator::TensorMap;
#endif

// mbarrier.init (9.7.13.15.9): a phase completes with its `arrivals`-th arrival, once all expected bytes have come.
FK_DEVICE void mbarrier_init([[maybe_unused]] uint64_t* barrier, [[maybe_unused]] uint32_t arrivals) {
#ifdef FK_SM90A
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#elif !defined(__CUDACC__)
  emulator::mbarrier_init(barrier, arrivals);
#endif
}

// Makes this thread's mbarrier.init seen by bulk copies (9.7.13.4): a __syncthreads() after it tells the other threads.
FK_DEVICE void fence_mbarrier_init() {
#ifdef FK_SM90A
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;\n" ::: "memory");
#elif !defined(__CUDACC__)
  emulator::fence_mbarriers();
#endif
}

// mbarrier.arrive (9.7.13.15.13).
FK_DEVICE void mbarrier_arrive([[maybe_unused]] uint64_t* barrier) {
#ifdef FK_SM90A
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier)) : "memory");
#elif !defined(__CUDACC__)
  emulator::mbarrier_arrive(barrier, 0);
#endif
}

// mbarrier.arrive.expect_tx: the phase also waits for `bytes` that bulk copies bring.
FK_DEVICE void mbarrier_arrive_expect([[maybe_unused]] uint64_t* barrier, [[maybe_unused]] uint32_t bytes) {
#ifdef FK_SM90A
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#elif !defined(__CUDACC__)
  emulator::mbarrier_arrive(barrier, bytes);
#endif
}

// mbarrier.try_wait.parity (9.7.13.15.16) until the phase of that parity has completed. Phases count from 0; the one
// before the first counts as completed, so that waiting for parity 1 of a new barrier returns at once. With
// FK_BOUNDED_WAITS a wait of 2^34 cycles, about ten seconds, is a trap: a fault can be reported, a hang cannot.
FK_DEVICE void mbarrier_wait([[maybe_unused]] uint64_t* barrier, [[maybe_unused]] uint32_t parity) {
#ifdef FK_SM90A
  const uint32_t at = shared_address(barrier);
  uint32_t done = 0;
#ifdef FK_BOUNDED_WAITS
  const long long start = clock64();
#endif
  while (!done) {
#ifdef FK_BOUNDED_WAITS
    if (clock64() - start > 1ll << 34) __trap();
#endif
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
                 : "=r"(done)
                 : "r"(at), "r"(parity)
                 : "memory");
  }
#elif !defined(__CUDACC__)
  emulator::mbarrier_wait(barrier, parity);
#endif
}

// cp.async.bulk.tensor (9.7.9.27.1.2), tiled: the box of the map at coordinates x (innermost), y, z to shared memory,
// its bytes counted by `barrier`. One thread issues it.
FK_DEVICE void copy_tile([[maybe_unused]] void* shared, [[maybe_unused]] const TensorMap* map,
                         [[maybe_unused]] uint64_t* barrier, [[maybe_unused]] int32_t x, [[maybe_unused]] int32_t y) {
#ifdef FK_SM90A
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];\n" ::
          "r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
#elif !defined(__CUDACC__)
  const int32_t at[2] = {x, y};
  emulator::copy_tiled(shared, map, barrier, at, 2);
#endif
}

FK_DEVICE void copy_tile([[maybe_unused]] void* shared, [[maybe_unused]] const TensorMap* map,
                         [[maybe_unused]] uint64_t* barrier, [[maybe_unused]] int32_t x, [[maybe_unused]] int32_t y,
                         [[maybe_unused]] int32_t z) {
#ifdef FK_SM90A
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];\n" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
#elif !defined(__CUDACC__)
  const int32_t at[3] = {x, y, z};
  emulator::copy_tiled(shared, map, barrier, at, 3);
#endif
}

// Where an im2col copy begins: a channel, and a pixel on the grid of the map's box.
struct Im2colPosition {
  int32_t channel, w, h, n;
};

// The same, im2col: the map's number of pixels from a position on, each read `offset_w`, `offset_h` (0 to 255) away.
FK_DEVICE void copy_im2col([[maybe_unused]] void* shared, [[maybe_unused]] const TensorMap* map,
                           [[maybe_unused]] uint64_t* barrier, [[maybe_unused]] const Im2colPosition& at,
                           [[maybe_unused]] int32_t offset_w, [[maybe_unused]] int32_t offset_h) {
#ifdef FK_SM90A
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5, %6}], [%2], {%7, %8};\n" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(at.channel), "r"(at.w), "r"(at.h), "r"(at.n),
      "h"(static_cast<uint16_t>(offset_w)), "h"(static_cast<uint16_t>(offset_h))
      : "memory");
#elif !defined(__CUDACC__)
  const int32_t coordinates[4] = {at.channel, at.w, at.h, at.n};
  const uint16_t offsets[2] = {static_cast<uint16_t>(offset_w), static_cast<uint16_t>(offset_h)};
  emulator::copy_im2col(shared, map, barrier, coordinates, offsets);
#endif
}

// setmaxnreg (9.7.19.5), by all warps of a warpgroup: gives registers back, or waits for them and takes them.
template <int Registers>
FK_DEVICE void give_registers() {
#ifdef FK_SM90A
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(Registers));
#elif !defined(__CUDACC__)
  emulator::set_max_registers(Registers);
#endif
}

template <int Registers>
FK_DEVICE void take_registers() {
#ifdef FK_SM90A
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(Registers));
#elif !defined(__CUDACC__)
  emulator::set_max_registers(Registers);
#endif
}

// wgmma.fence (9.7.15.7.1): before the first wgmma, and before one whose accumulators were written otherwise.
FK_DEVICE void wgmma_fence() {
#ifdef FK_SM90A
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
#elif !defined(__CUDACC__)
  emulator::wgmma_fence();
#endif
}

FK_DEVICE void wgmma_commit() {
#ifdef FK_SM90A
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
#elif !defined(__CUDACC__)
  emulator::wgmma_commit();
#endif
}

// Waits until at most the Newest groups committed last are in flight. Accumulators are not to be touched before.
template <int Newest>
FK_DEVICE void wgmma_wait() {
#ifdef FK_SM90A
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(Newest) : "memory");
#elif !defined(__CUDACC__)
  emulator::wgmma_wait(Newest);
#endif
}

#ifdef FK_SM90A

// The N / 2 accumulators of a thread, as text and as operands.
#define FK_REGISTERS_32                                                    \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FK_REGISTERS_64                                                              \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FK_REGISTERS_128                                                                         \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "             \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FK_OPERANDS_8(i)                                                                                      \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define FK_OPERANDS_32(i) FK_OPERANDS_8(i), FK_OPERANDS_8(i + 8), FK_OPERANDS_8(i + 16), FK_OPERANDS_8(i + 24)
#define FK_OPERANDS_64(i) FK_OPERANDS_32(i), FK_OPERANDS_32(i + 32)
#define FK_OPERANDS_128(i) FK_OPERANDS_64(i), FK_OPERANDS_64(i + 64)
// After the accumulators come the descriptors of A and B, scale-d (a predicate: add to D), and the signs of A and B.
#define FK_WGMMA_16(shape, type, count, a_at, b_at, a_major_at, b_major_at)                                           \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\nwgmma.mma_async.sync.aligned." shape "k16.f32." type      \
               "." type " {" FK_REGISTERS_##count "}, %" a_at ", %" b_at ", add, 1, 1, %" a_major_at ", %" b_major_at \
                                                  ";\n}\n"                                                            \
               : FK_OPERANDS_##count(0)                                                                               \
               : "l"(a), "l"(b), "n"(MnMajorA), "n"(MnMajorB))
#define FK_WGMMA_TF32(shape, count, a_at, b_at)                                                     \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\nwgmma.mma_async.sync.aligned." shape    \
               "k8.f32.tf32.tf32 {" FK_REGISTERS_##count "}, %" a_at ", %" b_at ", add, 1, 1;\n}\n" \
               : FK_OPERANDS_##count(0)                                                             \
               : "l"(a), "l"(b))

#endif

// wgmma.mma_async (9.7.15.5.2): D[64][N] += A[64][depth] * B[depth][N] of a warpgroup, both operands in shared memory under
// descriptors (core/shared_tile.h); depth is 32 bytes of T, fp32 accumulation, float through tf32. MnMajor...: rows or
// columns of the operand are next to each other, else values along the reduction, as is the only way for float.
// With warp = threadIdx.x / 32 % 4: d[i] is at row 16 * warp + lane / 4 + 8 * (i / 2 % 2), column 8 * (i / 4) +
// 2 * (lane % 4) + i % 2. Asynchronous: see wgmma_fence, wgmma_commit and wgmma_wait.
template <class T, bool MnMajorA, bool MnMajorB, int Count>
FK_DEVICE void wgmma([[maybe_unused]] float (&d)[Count], [[maybe_unused]] uint64_t a, [[maybe_unused]] uint64_t b) {
  static_assert(Count == 32 || Count == 64 || Count == 128, "64, 128 or 256 columns");
  static_assert(!std::is_same_v<T, float> || (!MnMajorA && !MnMajorB), "wgmma takes float K-major only");
#ifdef FK_SM90A
  if constexpr (std::is_same_v<T, float>) {
    if constexpr (Count == 32) FK_WGMMA_TF32("m64n64", 32, "32", "33");
    if constexpr (Count == 64) FK_WGMMA_TF32("m64n128", 64, "64", "65");
    if constexpr (Count == 128) FK_WGMMA_TF32("m64n256", 128, "128", "129");
  } else if constexpr (std::is_same_v<T, bf16>) {
    if constexpr (Count == 32) FK_WGMMA_16("m64n64", "bf16", 32, "32", "33", "34", "35");
    if constexpr (Count == 64) FK_WGMMA_16("m64n128", "bf16", 64, "64", "65", "66", "67");
    if constexpr (Count == 128) FK_WGMMA_16("m64n256", "bf16", 128, "128", "129", "130", "131");
  } else {
    if constexpr (Count == 32) FK_WGMMA_16("m64n64", "f16", 32, "32", "33", "34", "35");
    if constexpr (Count == 64) FK_WGMMA_16("m64n128", "f16", 64, "64", "65", "66", "67");
    if constexpr (Count == 128) FK_WGMMA_16("m64n256", "f16", 128, "128", "129", "130", "131");
  }
#elif !defined(__CUDACC__)
  using Type = emulator::WgmmaType;
  constexpr Type type = std::is_same_v<T, float> ? Type::tf32 : std::is_same_v<T, bf16> ? Type::bf16 : Type::f16;
  emulator::wgmma(d, type, 2 * Count, MnMajorA | MnMajorB << 1, a, b);
#endif
}

#undef FK_WGMMA_16
#undef FK_WGMMA_TF32

}  // namespace freezekit::ptx
