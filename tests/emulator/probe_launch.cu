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

// out[i] = in[i] + the sum of in over the other lanes of the warp that differ from i's in one bit, then reversed in the
// block through shared memory.
__global__ void exchange_kernel(const float* in, float* out) {
  FK_SHARED(float, tile, [64]);
  const int t = static_cast<int>(threadIdx.x);
  float value = in[t];
  for (int bit = 1; bit < 32; bit *= 2) value += __shfl_xor_sync(0xffffffffu, value, bit);
  tile[t] = value + in[t];
  __syncthreads();
  out[t] = tile[63 - t];
}

// Four kinds of shuffle within segments of eight lanes, a ballot, any and all.
__global__ void warp_kernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  int* mine = out + 8 * lane;
  mine[0] = __shfl_sync(0xffffffffu, lane, 5);
  mine[1] = __shfl_sync(0xffffffffu, lane, 3, 8);
  mine[2] = __shfl_up_sync(0xffffffffu, lane, 2, 8);
  mine[3] = __shfl_down_sync(0xffffffffu, lane, 2, 8);
  mine[4] = __shfl_xor_sync(0xffffffffu, lane, 12, 8);
  mine[5] = static_cast<int>(__ballot_sync(0xffffffffu, lane % 3 == 0));
  mine[6] = __any_sync(0xffffffffu, lane == 31) + 2 * __all_sync(0xffffffffu, lane < 31);
  mine[7] = 0;
  if (lane < 8) mine[7] = __shfl_xor_sync(0x000000ffu, lane, 1);  // part of a warp
  if (lane < 16) return;
  mine[7] = static_cast<int>(__ballot_sync(0xffffffffu, 1));  // lanes that have ended are counted out
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
  divergent_shuffle,
  missed_shuffle,
  lane_outside_mask,
  shuffle_from_ended_lane,
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
      if (t == 0) __shfl_sync(0xffffffffu, t, 0);
      else __syncthreads();
      break;
    case Fault::divergent_shuffle:
      if (t < 16) __shfl_sync(0xffffffffu, t, 0);
      else __shfl_sync(0xffff0001u, t, 16);
      break;
    case Fault::missed_shuffle:
      if (t != 7) __shfl_sync(0x0000ffffu << 16 * (t / 16), t, t);
      else __syncthreads();
      break;
    case Fault::lane_outside_mask:
      __shfl_sync(0x0000ffffu, t, 0);
      break;
    case Fault::shuffle_from_ended_lane:
      if (t != 3) __shfl_sync(0xffffffffu, t, 3);
      break;
    case Fault::partial_mma:
      if (t < 31) ptx::mma_m16n8k16<bf16>(d, a, b);
      break;
    case Fault::different_collectives:
      if (t < 16) __syncwarp();
      else __ballot_sync(0xffffffffu, 1);
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
EXPORT int probe_warp(int* out) { return static_cast<int>(FK_LAUNCH(warp_kernel, 1, 32, 0, nullptr, out)); }
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
