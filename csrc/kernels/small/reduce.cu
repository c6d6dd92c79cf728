// Sums whose order is fixed, so that the same input gives the same bits on every run.
//
//   ordered reduce: out[i] = sum over s of partial[s, i], s ascending; of many slices eight lanes sum an eighth each, whose
//                   sums are added in ascending order
//   bias grad:      db[k] = sum over rows of dy[row, k], rows cut into slices, the slices summed by an ordered reduce
//
// Layouts: partial [slices][numel] in the accumulator's type, dy [rows][k]; no alignment beyond the element's.
#include <algorithm>

#include "kernels/families.h"
#include "kernels/numeric.h"

namespace freezekit {
namespace {

constexpr int kReduceThreads = 256;
constexpr int kColumns = 32;  // a warp reads 32 neighbouring channels of a row
constexpr int kRowLanes = 8;
constexpr int64_t kRowsPerSlice = 128;
constexpr int64_t kMaxSlices = 512;

// kLanes threads of a block share an output.
template <class T, int kLanes>
__global__ void __launch_bounds__(kReduceThreads)
    ordered_reduce_kernel(const Accumulator<T>* __restrict__ partial, T* __restrict__ out, int64_t numel,
                          int32_t slices) {
  using Acc = Accumulator<T>;
  constexpr int kOutputs = kReduceThreads / kLanes;
  FK_SHARED(Acc, sums, [kLanes][kOutputs]);
  const int output = static_cast<int>(threadIdx.x) % kOutputs, lane = static_cast<int>(threadIdx.x) / kOutputs;
  const int32_t each = (slices + kLanes - 1) / kLanes, first = lane * each, last = min(first + each, slices);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kOutputs;
  for (int64_t begin = static_cast<int64_t>(blockIdx.x) * kOutputs; begin < numel; begin += step) {
    const int64_t i = begin + output;
    Acc sum = 0;
    for (int32_t s = first; i < numel && s < last; ++s) sum += load_global(partial + s * numel + i);
    if constexpr (kLanes > 1) {
      sums[lane][output] = sum;
      __syncthreads();
      for (int other = 1; lane == 0 && other < kLanes; ++other) sum += sums[other][output];
      __syncthreads();  // the next outputs' sums overwrite these
    }
    if (lane == 0 && i < numel) store_global(out + i, cast<T>(sum));
  }
}

template <class T, int kLanes>
Status launch_ordered_reduce_lanes(const void* partial, void* out, int64_t numel, int32_t slices, Stream stream) {
  const int64_t blocks = std::min<int64_t>(ceil_div(numel, kReduceThreads / kLanes), 65535);
  const auto kernel = ordered_reduce_kernel<T, kLanes>;
  return FK_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kReduceThreads), 0, stream,
                   static_cast<const Accumulator<T>*>(partial), static_cast<T*>(out), numel, slices);
}

// Slice blockIdx.y of columns blockIdx.x * 32 ...: lane y sums rows begin + y, begin + y + 8, ...
template <class T>
__global__ void __launch_bounds__(kColumns* kRowLanes)
    bias_grad_kernel(const T* __restrict__ dy, Accumulator<T>* __restrict__ partial, int64_t rows, int64_t k,
                     int64_t rows_per_slice) {
  using Acc = Accumulator<T>;
  FK_SHARED(Acc, sums, [kRowLanes][kColumns]);
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x;
  const int64_t begin = blockIdx.y * rows_per_slice, end = min(begin + rows_per_slice, rows);
  Acc sum = 0;
  if (column < k) {
    for (int64_t row = begin + threadIdx.y; row < end; row += kRowLanes) {
      sum += cast<Acc>(load_global(dy + row * k + column));
    }
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= k) return;
  for (int lane = 1; lane < kRowLanes; ++lane) sum += sums[lane][threadIdx.x];
  store_global(partial + blockIdx.y * k + column, sum);
}

int64_t bias_grad_slices(int64_t rows) { return std::clamp<int64_t>(ceil_div(rows, kRowsPerSlice), 1, kMaxSlices); }

}  // namespace

Status launch_ordered_reduce(const void* partial, void* out, int64_t numel, int32_t slices, DType dtype,
                             Stream stream) {
  return dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    // Of many, one thread would wait for as many loads, one after another.
    return slices < kManySlices ? launch_ordered_reduce_lanes<T, 1>(partial, out, numel, slices, stream)
                                : launch_ordered_reduce_lanes<T, 8>(partial, out, numel, slices, stream);
  });
}

size_t bias_grad_workspace(int64_t rows, int64_t k, DType dtype) {
  return static_cast<size_t>(bias_grad_slices(rows) * k * (dtype == DType::f64 ? 8 : 4));
}

Status launch_bias_grad(const void* dy, void* db, int64_t rows, int64_t k, DType dtype, void* workspace,
                        Stream stream) {
  if (k == 0) return Status::success;
  if (rows < 0 || k < 0 || (!dy && rows > 0) || !db || !workspace) return Status::invalid_argument;
  const int64_t slices = bias_grad_slices(rows), column_blocks = ceil_div(k, kColumns);
  if (column_blocks > kMaxGridX) return Status::invalid_argument;
  return dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Status status =
        FK_LAUNCH(bias_grad_kernel<T>, dim3(static_cast<unsigned>(column_blocks), static_cast<unsigned>(slices)),
                  dim3(kColumns, kRowLanes), 0, stream, static_cast<const T*>(dy),
                  static_cast<Accumulator<T>*>(workspace), rows, k, ceil_div(rows, slices));
    if (status != Status::success) return status;
    return launch_ordered_reduce(workspace, db, k, static_cast<int32_t>(slices), dtype, stream);
  });
}

}  // namespace freezekit
