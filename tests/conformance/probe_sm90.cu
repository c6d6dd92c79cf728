// One kernel a Hopper wrapper (csrc/kernels/ptx_sm90.h): it leaves to the test what memory and registers should hold.
#include "core/shared_tile.h"
#include "kernels/hopper/tensor_map.h"

using namespace freezekit;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// The least address in dynamic shared memory that a swizzle atom may begin at.
FK_DEVICE unsigned char* first_atom(unsigned char* shared) {
  return shared + (-ptx::shared_address(shared) & (kSwizzleAtom - 1));
}

FK_DEVICE void init_barrier(uint64_t* barrier, uint32_t arrivals) {
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, arrivals);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
}

// 32 lanes of warp 0 write a round, arrive, and wait until warp 1 has read it: seen[round][lane] = 100 * round + lane.
__global__ void mbarrier_kernel(int rounds, int* seen) {
  FK_SHARED(uint64_t, full, [1]);
  FK_SHARED(uint64_t, empty, [1]);
  FK_SHARED(int, tile, [32]);
  const int lane = static_cast<int>(threadIdx.x % 32);
  init_barrier(full, 32);
  init_barrier(empty, 32);
  for (int round = 0; round < rounds; ++round) {
    const uint32_t parity = round % 2;
    if (threadIdx.x < 32) {
      ptx::mbarrier_wait(empty, parity ^ 1);  // of a new barrier this returns at once
      tile[lane] = 100 * round + lane;
      ptx::mbarrier_arrive(full);
    } else {
      ptx::mbarrier_wait(full, parity);
      seen[32 * round + lane] = tile[31 - lane];
      ptx::mbarrier_arrive(empty);
    }
  }
}

// How a copy is made: by tiles of rank 2 or 3 at (x, y, z), or im2col at (x = channel, y = w, z = h, n) with offsets.
struct CopyAt {
  int rank, x, y, z, n, offset_w, offset_h, im2col;
};

FK_DEVICE void copy(void* to, const ptx::TensorMap* map, uint64_t* barrier, const CopyAt& at) {
  if (at.im2col) {
    ptx::copy_im2col(to, map, barrier, {at.x, at.y, at.z, at.n}, at.offset_w, at.offset_h);
  } else if (at.rank == 2) {
    ptx::copy_tile(to, map, barrier, at.x, at.y);
  } else {
    ptx::copy_tile(to, map, barrier, at.x, at.y, at.z);
  }
}

// out: the `bytes` of shared memory that one copy wrote.
__global__ void copy_kernel(const __grid_constant__ ptx::TensorMap map, CopyAt at, int bytes, unsigned char* out) {
  FK_DYNAMIC_SHARED(shared);
  FK_SHARED(uint64_t, full, [1]);
  unsigned char* const tile = first_atom(shared);
  init_barrier(full, 1);
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect(full, static_cast<uint32_t>(bytes));
    copy(tile, &map, full, at);
  }
  ptx::mbarrier_wait(full, 0);
  for (int i = static_cast<int>(threadIdx.x); i < bytes; i += 32) out[i] = tile[i];
}

// A is 64 rows of 128 bytes, B as many as there are columns: K-major. MN-major, both are panels of 64 rows, a row per value
// of the reduction. d: 128 threads x Columns / 2 accumulators.
template <class T, bool MnMajor, int Columns>
__global__ void wgmma_kernel(const __grid_constant__ ptx::TensorMap a, const __grid_constant__ ptx::TensorMap b,
                             float* d) {
  FK_DYNAMIC_SHARED(shared);
  FK_SHARED(uint64_t, full, [1]);
  constexpr uint32_t kPanel = 64 * kTileRow, kSteps = kTileRow / kWgmmaDepthBytes;
  unsigned char* const of_a = first_atom(shared);
  unsigned char* const of_b = of_a + kPanel;
  init_barrier(full, 1);
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect(full, kPanel + Columns * kTileRow);
    ptx::copy_tile(of_a, &a, full, 0, 0);
    for (int panel = 0; panel < Columns / 64; ++panel) {
      ptx::copy_tile(of_b + panel * kPanel, &b, full, MnMajor ? 64 * panel : 0, MnMajor ? 0 : 64 * panel);
    }
  }
  ptx::mbarrier_wait(full, 0);
  float acc[Columns / 2] = {};
  const uint32_t at_a = ptx::shared_address(of_a), at_b = ptx::shared_address(of_b);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < static_cast<int>(kSteps); ++step) {
    if constexpr (MnMajor) {
      ptx::wgmma<T, true, true>(acc, mn_major_descriptor(at_a, kPanel, step), mn_major_descriptor(at_b, kPanel, step));
    } else {
      ptx::wgmma<T, false, false>(acc, k_major_descriptor(at_a, step), k_major_descriptor(at_b, step));
    }
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int i = 0; i < Columns / 2; ++i) d[static_cast<int>(threadIdx.x) * (Columns / 2) + i] = acc[i];
}

TiledTensor matrix(DType dtype, const void* data, int64_t columns, int64_t rows) {
  TiledTensor tensor;
  tensor.dtype = dtype, tensor.data = data, tensor.rank = 2;
  tensor.size[0] = columns, tensor.size[1] = rows, tensor.stride[0] = columns;
  tensor.box[0] = static_cast<int32_t>(kTileRow / size_of(dtype)), tensor.box[1] = 64;
  return tensor;
}

template <class T, bool MnMajor, int Columns>
Status run_wgmma(DType dtype, const void* a, const void* b, float* d) {
  const int64_t values = static_cast<int64_t>(kTileRow / sizeof(T));
  ptx::TensorMap of_a, of_b;
  Status status = make_tensor_map(matrix(dtype, a, values, 64), &of_a);
  if (status != Status::success) return status;
  status = make_tensor_map(MnMajor ? matrix(dtype, b, Columns, 64) : matrix(dtype, b, values, Columns), &of_b);
  if (status != Status::success) return status;
  const size_t bytes = kSwizzleAtom + (64 + Columns) * kTileRow;
  return FK_LAUNCH(wgmma_kernel<T, MnMajor, Columns>, 1, 128, bytes, nullptr, of_a, of_b, d);
}

template <class T>
Status run_wgmma_of(DType dtype, int mn_major, int columns, const void* a, const void* b, float* d) {
  if constexpr (sizeof(T) == 2) {
    if (mn_major && columns == 64) return run_wgmma<T, true, 64>(dtype, a, b, d);
    if (mn_major && columns == 128) return run_wgmma<T, true, 128>(dtype, a, b, d);
  }
  if (columns == 64) return run_wgmma<T, false, 64>(dtype, a, b, d);
  if (columns == 128) return run_wgmma<T, false, 128>(dtype, a, b, d);
  return run_wgmma<T, false, 256>(dtype, a, b, d);
}

Status run_copy(const ptx::TensorMap& map, const CopyAt& at, int bytes, unsigned char* out) {
  return FK_LAUNCH(copy_kernel, 1, 32, kSwizzleAtom + bytes, nullptr, map, at, bytes, out);
}

}  // namespace

EXPORT int probe_mbarrier(int rounds, int* seen) {
  return static_cast<int>(FK_LAUNCH(mbarrier_kernel, 1, 64, 0, nullptr, rounds, seen));
}

// A dense tensor of `rank` 2 or 3, sizes from the innermost; a box of 128 bytes x `rows` x 1.
EXPORT int probe_copy_tile(int dtype, const void* data, int rank, int size_x, int size_y, int size_z, int rows, int x,
                           int y, int z, unsigned char* out) {
  TiledTensor tensor = matrix(static_cast<DType>(dtype), data, size_x, size_y);
  tensor.rank = rank, tensor.box[1] = rows, tensor.box[2] = 1;
  tensor.size[2] = size_z, tensor.stride[1] = int64_t{size_x} * size_y;
  ptx::TensorMap map;
  const Status status = make_tensor_map(tensor, &map);
  if (status != Status::success) return static_cast<int>(status);
  return static_cast<int>(run_copy(map, {rank, x, y, z, 0, 0, 0, 0}, rows * static_cast<int>(kTileRow), out));
}

// N x H x W x C; the box of pixels as in core/pixel_box.h, the same along both axes.
EXPORT int probe_copy_im2col(int dtype, const void* data, int n, int h, int w, int c, int lower, int upper, int stride,
                             int pixels, int channel, int at_w, int at_h, int at_n, int offset_w, int offset_h,
                             unsigned char* out) {
  PixelTensor tensor;
  tensor.dtype = static_cast<DType>(dtype), tensor.data = data;
  tensor.n = n, tensor.h = h, tensor.w = w, tensor.c = c, tensor.pixels = pixels;
  for (PixelBox* box : {&tensor.boxes.h, &tensor.boxes.w})
    box->lower = lower, box->upper[0] = upper, box->stride = stride;
  ptx::TensorMap map;
  const Status status = make_tensor_map(tensor, &map);
  if (status != Status::success) return static_cast<int>(status);
  const CopyAt at{4, channel, at_w, at_h, at_n, offset_w, offset_h, 1};
  return static_cast<int>(run_copy(map, at, pixels * static_cast<int>(kTileRow), out));
}

EXPORT int probe_wgmma(int dtype, int mn_major, int columns, const void* a, const void* b, float* d) {
  const DType type = static_cast<DType>(dtype);
  if (type == DType::f32) return static_cast<int>(run_wgmma_of<float>(type, mn_major, columns, a, b, d));
  if (type == DType::f16) return static_cast<int>(run_wgmma_of<f16>(type, mn_major, columns, a, b, d));
  return static_cast<int>(run_wgmma_of<bf16>(type, mn_major, columns, a, b, d));
}
