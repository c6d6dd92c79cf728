// PTX instructions behind plain functions: PTX on a GPU of sm_80 or later, csrc/emulator on a CPU.
// Section numbers are those of the PTX ISA 9.0 manual.
#pragma once

#include <cstdint>

#include "kernels/device.h"

namespace freezekit::ptx {

// The address of shared memory in its window of 32 bits.
FK_DEVICE uint32_t shared_address(const void* p) {
#ifdef __CUDACC__
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
#else
  return emulator::shared_address(p);
#endif
}

// cp.async (9.7.9.25.3.1): copies Bytes = 4, 8 or 16 from global to shared memory, both aligned to Bytes; where `copy` is
// false zeros are written and `global` is not read. 16 bytes bypass L1 (.cg), which has no smaller form.
template <int Bytes>
FK_DEVICE void cp_async(void* shared, const void* global, bool copy = true) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
#ifdef __CUDACC__
  const uint32_t to = shared_address(shared);
  const int read = copy ? Bytes : 0;
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(global), "r"(read) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(to), "l"(global), "n"(Bytes), "r"(read)
                 : "memory");
  }
#else
  emulator::cp_async(shared, global, Bytes, copy);
#endif
}

// Closes the group of all copies issued since the last commit; an empty group counts.
FK_DEVICE void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#else
  emulator::cp_async_commit();
#endif
}

// Waits until at most the Newest groups committed last are in flight. Makes the copies of this thread visible to this
// thread only: other threads need a barrier after it.
template <int Newest>
FK_DEVICE void cp_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;\n" ::"n"(Newest) : "memory");
#else
  emulator::cp_async_wait(Newest);
#endif
}

// ldmatrix (9.7.14.5.15): N = 1, 2 or 4 matrices of 8 x 8 16-bit elements from shared memory. Lanes 8j .. 8j + 7 give the
// addresses of the rows of matrix j, 16-byte aligned. fragment[j] of lane l holds elements (l / 4, 2 * (l % 4)) and the
// one after it of matrix j; of its transpose under Transposed.
template <bool Transposed, int N>
FK_DEVICE void ldmatrix_any(uint32_t (&fragment)[N], const void* row) {
  static_assert(N == 1 || N == 2 || N == 4, "ldmatrix loads 1, 2 or 4 matrices");
#ifdef __CUDACC__
  const uint32_t at = shared_address(row);
  if constexpr (N == 1 && !Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];\n" : "=r"(fragment[0]) : "r"(at) : "memory");
  } else if constexpr (N == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];\n"
                 : "=r"(fragment[0])
                 : "r"(at)
                 : "memory");
  } else if constexpr (N == 2 && !Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(fragment[0]), "=r"(fragment[1])
                 : "r"(at)
                 : "memory");
  } else if constexpr (N == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(fragment[0]), "=r"(fragment[1])
                 : "r"(at)
                 : "memory");
  } else if constexpr (!Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(at)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(at)
                 : "memory");
  }
#else
  uint4 values{};
  if (emulator::lane() < 8 * N) {
    emulator::check_ldmatrix_row(row);
    values = *static_cast<const uint4*>(row);  // the lane's own read, seen by sanitizers
  }
  emulator::ldmatrix(fragment, N, Transposed, row, values);
#endif
}

template <int N>
FK_DEVICE void ldmatrix(uint32_t (&fragment)[N], const void* row) {
  ldmatrix_any<false>(fragment, row);
}

template <int N>
FK_DEVICE void ldmatrix_trans(uint32_t (&fragment)[N], const void* row) {
  ldmatrix_any<true>(fragment, row);
}

// mma.m16n8k16 (9.7.14.5.8), T = bf16 or f16: D[16][8] += A[16][16] * B[16][8], fp32 accumulation. With g = lane / 4 and
// t = lane % 4, lower half of a register first:
//   a[0] = A[g][2t, 2t+1]    a[1] = A[g+8][2t, 2t+1]   a[2] = A[g][2t+8, 2t+9]   a[3] = A[g+8][2t+8, 2t+9]
//   b[0] = B[2t, 2t+1][g]    b[1] = B[2t+8, 2t+9][g]
//   d[0], d[1] = D[g][2t], D[g][2t+1]    d[2], d[3] = D[g+8][2t], D[g+8][2t+1]
template <class T>
FK_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
FK_DEVICE void mma_m16n8k16<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emulator::mma_m16n8k16_bf16(d, a, b);
#endif
}

template <>
FK_DEVICE void mma_m16n8k16<f16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emulator::mma_m16n8k16_f16(d, a, b);
#endif
}

// mma.m16n8k8 tf32 (9.7.14.5.7): D[16][8] += A[16][8] * B[8][8]. The low 13 bits of a and b are ignored: round with
// to_tf32 first. D as above;
//   a[0] = A[g][t]   a[1] = A[g+8][t]   a[2] = A[g][t+4]   a[3] = A[g+8][t+4]   b[0] = B[t][g]   b[1] = B[t+4][g]
FK_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emulator::mma_m16n8k8_tf32(d, a, b);
#endif
}

// cvt.rna.tf32.f32 (9.7.9): 10 bits of mantissa, to nearest, ties away from zero; a NaN stays one.
FK_DEVICE uint32_t to_tf32(float value) {
#ifdef __CUDACC__
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(value));
  return bits;
#else
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits & 0x7fffffu ? 0x7fffffffu : bits;
  return (bits + 0x1000u) & ~0x1fffu;
#endif
}

}  // namespace freezekit::ptx
