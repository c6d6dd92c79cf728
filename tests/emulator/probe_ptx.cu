// One kernel a PTX wrapper: it hands registers in and out, and leaves to the test what they should hold.
#include "kernels/ptx.h"

using namespace freezekit;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

enum class MmaKind : int { bf16, f16, tf32 };

// a: 32 lanes x 4 registers, b: 32 x 2, d: 32 x 4, in and out.
__global__ void mma_kernel(MmaKind kind, const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t of_a[4], of_b[2];
  float of_d[4];
  for (int i = 0; i < 4; i++) of_a[i] = a[4 * lane + i], of_d[i] = d[4 * lane + i];
  for (int i = 0; i < 2; i++) of_b[i] = b[2 * lane + i];
  if (kind == MmaKind::bf16) ptx::mma_m16n8k16<bf16>(of_d, of_a, of_b);
  if (kind == MmaKind::f16) ptx::mma_m16n8k16<f16>(of_d, of_a, of_b);
  if (kind == MmaKind::tf32) ptx::mma_m16n8k8_tf32(of_d, of_a, of_b);
  for (int i = 0; i < 4; i++) d[4 * lane + i] = of_d[i];
}

// shared: `bytes` of shared memory; offsets: a byte offset per lane; fragments: 32 lanes x N registers.
template <int N>
__global__ void ldmatrix_kernel(bool transposed, const unsigned char* shared, int bytes, const int* offsets,
                                uint32_t* fragments) {
  FK_DYNAMIC_SHARED(tile);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < bytes; i += 32) tile[i] = shared[i];
  __syncthreads();
  uint32_t fragment[N];
  if (transposed) {
    ptx::ldmatrix_trans(fragment, tile + offsets[lane]);
  } else {
    ptx::ldmatrix(fragment, tile + offsets[lane]);
  }
  for (int i = 0; i < N; i++) fragments[N * lane + i] = fragment[i];
}

// Three groups of one copy each, the last not copied but zeroed; seen: what is in shared memory as no wait, wait<1>
// and wait<0> have been passed, 3 x 3 x Bytes.
template <int Bytes>
__global__ void cp_async_kernel(const unsigned char* global, unsigned char* seen) {
  FK_DYNAMIC_SHARED(tile);
  for (int group = 0; group < 3; group++) {
    ptx::cp_async<Bytes>(tile + group * Bytes, global + group * Bytes, group < 2);
    ptx::cp_async_commit();
  }
  for (int i = 0; i < 3 * Bytes; i++) seen[i] = tile[i];
  ptx::cp_async_wait<1>();
  for (int i = 0; i < 3 * Bytes; i++) seen[3 * Bytes + i] = tile[i];
  ptx::cp_async_wait<0>();
  for (int i = 0; i < 3 * Bytes; i++) seen[6 * Bytes + i] = tile[i];
}

__global__ void to_tf32_kernel(const float* in, uint32_t* out, int64_t count) {
  for (int64_t i = threadIdx.x; i < count; i += 32) out[i] = ptx::to_tf32(in[i]);
}

}  // namespace

EXPORT int probe_mma(int kind, const uint32_t* a, const uint32_t* b, float* d) {
  return static_cast<int>(FK_LAUNCH(mma_kernel, 1, 32, 0, nullptr, static_cast<MmaKind>(kind), a, b, d));
}

EXPORT int probe_ldmatrix(int matrices, bool transposed, const unsigned char* shared, int bytes, const int* offsets,
                          uint32_t* fragments) {
  const auto kernel = matrices == 1 ? ldmatrix_kernel<1> : matrices == 2 ? ldmatrix_kernel<2> : ldmatrix_kernel<4>;
  return static_cast<int>(FK_LAUNCH(kernel, 1, 32, bytes, nullptr, transposed, shared, bytes, offsets, fragments));
}

EXPORT int probe_cp_async(int bytes, const unsigned char* global, unsigned char* seen) {
  const auto kernel = bytes == 4 ? cp_async_kernel<4> : bytes == 8 ? cp_async_kernel<8> : cp_async_kernel<16>;
  return static_cast<int>(FK_LAUNCH(kernel, 1, 1, 3 * bytes, nullptr, global, seen));
}

EXPORT int probe_to_tf32(const float* in, uint32_t* out, int64_t count) {
  return static_cast<int>(FK_LAUNCH(to_tf32_kernel, 1, 32, 0, nullptr, in, out, count));
}
