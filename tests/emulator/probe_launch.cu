// Kernels that do one thing, or one thing wrong, for the tests of launching, scheduling and failing.
#include "kernels/ptx.h"

using namespace freezekit;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// order[ticket] = linear index of the block and thread that drew it.
__global__ void order_kernel(int* order, int* tickets) {
  const dim3 b = blockDim;
  const int thread = static_cast<int>(threadIdx.x + b.x * (threadIdx.y + b.y * threadIdx.z));
  const int block = static_cast<int>(blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z));
  order[atomicAdd(tickets, 1)] = block * static_cast<int>(b.x * b.y * b.z) + thread;
}

// out[i] = the sum of in over i's warp, in the order of the block reversed. Lanes of a warp meet twice; lanes that have
// ended by then are counted out.
__global__ void exchange_kernel(const float* in, float* out) {
  FK_SHARED(float, tile, [64]);
  FK_SHARED(float, late, [64]);
  const int t = static_cast<int>(threadIdx.x);
  tile[t] = in[t];
  __syncwarp();
  float sum = 0;
  for (int lane = 0; lane < 32; lane++) sum += tile[t / 32 * 32 + lane];
  __syncthreads();
  tile[t] = sum;
  __syncthreads();
  out[t] = tile[63 - t];
  if (t % 32 < 8) return;
  late[t] = out[t];
  __syncwarp();
  out[t] = late[t % 32 < 31 ? t + 1 : t];
}

__global__ void traffic_kernel(const uint4* in, uint4* out, float* sum) {
  const unsigned i = threadIdx.x;
  store_global(out + i, load_global(in + i));
  atomicAdd(sum, load_global(reinterpret_cast<const float*>(in) + i));
}

__global__ void poison_kernel(float* out) {
  FK_SHARED(float, tile, [2]);
  FK_DYNAMIC_SHARED(raw);
  out[0] = tile[1];
  out[1] = *reinterpret_cast<float*>(raw);
}

enum class Fault : int {
  divergent_barrier,
  missed_barrier,
  divergent_masks,
  missed_in_warp,
  lane_outside_mask,
  partial_mma,
  different_collectives,
  in_flight,
  misaligned_copy,
  copy_outside_shared,
  ldmatrix_outside_shared,
  misaligned_ldmatrix,
  no_dynamic_shared,
  too_much_static_shared,
  misaligned_load,
  misaligned_store,
};

__global__ void fault_kernel(Fault fault, unsigned char* global) {
  FK_SHARED(uint4, tile, [32]);
  const int t = static_cast<int>(threadIdx.x);
  uint32_t a[4] = {}, b[2] = {};
  float d[4] = {};
  switch (fault) {
    case Fault::divergent_barrier:
      if (t < 16) __syncthreads();
      else __syncthreads();
      break;
    case Fault::missed_barrier:
      if (t == 0) __syncwarp();
      else __syncthreads();
      break;
    case Fault::divergent_masks:
      if (t < 16) __syncwarp();
      else __syncwarp(0xffff0001u);
      break;
    case Fault::missed_in_warp:
      if (t != 7) __syncwarp(0x0000ffffu << 16 * (t / 16));
      else __syncthreads();
      break;
    case Fault::lane_outside_mask:
      __syncwarp(0x0000ffffu);
      break;
    case Fault::partial_mma:
      if (t < 31) ptx::mma_m16n8k16<bf16>(d, a, b);
      break;
    case Fault::different_collectives:
      if (t < 16) __syncwarp();
      else ptx::ldmatrix(a, tile);
      break;
    case Fault::in_flight:
      ptx::cp_async<16>(&tile[t], global);
      ptx::cp_async_commit();
      break;
    case Fault::misaligned_copy:
      ptx::cp_async<8>(&tile[t], global + 4);
      ptx::cp_async_wait<0>();
      break;
    case Fault::copy_outside_shared:
      ptx::cp_async<16>(tile + 32 + t, global);
      break;
    case Fault::ldmatrix_outside_shared:
      ptx::ldmatrix(a, global);
      break;
    case Fault::misaligned_ldmatrix:
      ptx::ldmatrix(a, reinterpret_cast<char*>(tile) + 8);
      break;
    case Fault::no_dynamic_shared: {
      FK_DYNAMIC_SHARED(none);
      none[t] = 0;
      break;
    }
    case Fault::too_much_static_shared: {
      FK_SHARED(float, large, [48 * 256]);
      large[t] = 0;
      break;
    }
    case Fault::misaligned_load:
      d[0] = load_global(reinterpret_cast<float*>(global + 2));
      break;
    case Fault::misaligned_store:
      store_global(reinterpret_cast<uint4*>(global + 8), uint4{});
      break;
  }
}

dim3 dim_of(const int* v) {
  return dim3(static_cast<unsigned>(v[0]), static_cast<unsigned>(v[1]), static_cast<unsigned>(v[2]));
}

}  // namespace

EXPORT int probe_order(const int* grid, const int* block, int* order) {
  int tickets = 0;
  return static_cast<int>(FK_LAUNCH(order_kernel, dim_of(grid), dim_of(block), 0, nullptr, order, &tickets));
}
EXPORT int probe_exchange(const float* in, float* out) {
  return static_cast<int>(FK_LAUNCH(exchange_kernel, 1, 64, 0, nullptr, in, out));
}
EXPORT int probe_traffic(const uint4* in, uint4* out, float* sum, int threads) {
  return static_cast<int>(FK_LAUNCH(traffic_kernel, 1, threads, 0, nullptr, in, out, sum));
}
EXPORT int probe_poison(float* out) { return static_cast<int>(FK_LAUNCH(poison_kernel, 1, 1, 4, nullptr, out)); }
EXPORT int probe_fault(int fault, unsigned char* global) {
  return static_cast<int>(FK_LAUNCH(fault_kernel, 1, 32, 0, nullptr, static_cast<Fault>(fault), global));
}
EXPORT int probe_dynamic_shared(size_t bytes, float* out) {
  return static_cast<int>(FK_LAUNCH(poison_kernel, 1, 1, bytes, nullptr, out));
}
