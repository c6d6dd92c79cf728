// CUTLASS's implicit GEMM convolution for sm_90 on a CPU: the tensor maps that its host side asks a driver for, which here
// only takes notes, and coordinates, offsets and destination of every copy that its producer would issue. Included once in a
// program.
#pragma once

#include "tests/truth/host.h"
//
#define CUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL 1
#include <cutlass/kernel_hardware_info.hpp>  // first: the builder needs it and does not say so
//
#include <cute/tensor.hpp>
#include <cutlass/conv/collective/collective_builder.hpp>
#include <cutlass/conv/convnd_problem_shape.hpp>

#include "tests/truth/driver_notes.h"

using namespace cute;
using ConvOperator = cutlass::conv::Operator;

namespace {

// Walks all copies of an operand: `gathered` is (rows, depth, tiles, steps) in coordinates of the tensor.
template <class Slice, class Gathered, class Shared>
int note_copies(const Slice& slice, const Gathered& gathered, const Shared& shared, truth::Copy* out, int room) {
  const auto to = slice.partition_D(shared);
  const int tiles = size<2>(gathered), steps = size(shape<3>(gathered));
  int count = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    const auto from = slice.partition_S(gathered(_, _, tile, _));
    const int instructions = size<0, 1>(from), rows = size<1>(from), columns = size<2>(from);
    for (int step = 0; step < steps; ++step) {
      for (int i = 0; i < instructions * rows * columns; ++i) {
        const auto at = make_coord(_, i % instructions);
        const int row = i / instructions % rows, column = i / instructions / rows;
        if (count == room) return -1;
        truth::Copy& copy = out[count++];
        copy = {0, tile, step};
        copy.to = static_cast<int>(reinterpret_cast<size_t>(raw_pointer_cast(to(at, row, column, 0).data())));
        int values[6] = {}, n = 0;
        for_each(flatten(from(at, row, column, step)(Int<0>{})),
                 [&](auto value) { values[n++] = static_cast<int>(value); });
        for (int j = 0; j < 4; ++j) copy.at[j] = values[j];
        for (int j = 0; j < 2; ++j) copy.offset[j] = values[4 + j];
      }
    }
  }
  return count;
}

struct Out {
  truth::Map* maps;
  truth::Copy* copies;
  int room;
  int* counts;  // copies of A, of B
};

template <ConvOperator kOp, class Element, class Columns>
bool plan(const truth::Problem& p, const Out& out) {
  constexpr int kDepth = 128 / sizeof(Element), kAlignment = 16 / sizeof(Element);
  using Collective = typename cutlass::conv::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, kOp, Element, cutlass::layout::TensorNHWC, kAlignment,
      Element, cutlass::layout::TensorNHWC, kAlignment, float, Shape<_128, Columns, Shape<Int<kDepth>>>,
      Shape<_1, _1, _1>, cutlass::conv::collective::StageCount<4>,
      cutlass::conv::KernelImplicitTmaWarpSpecializedSm90>::CollectiveOp;
  const cutlass::conv::ConvProblemShape<kOp, 2> shape(
      cutlass::conv::Mode::kCrossCorrelation, {p.n, p.h, p.w, p.c}, {p.k, p.r, p.s, p.c}, {p.pad_h, p.pad_w},
      {p.far_pad_h, p.far_pad_w}, {p.stride_h, p.stride_w}, {p.dilation_h, p.dilation_w}, 1);
  // One map after the other, so that whose notes they are is known. Both tensors begin at address 0.
  const auto tensor_a =
      make_tensor(make_gmem_ptr(static_cast<const typename Collective::InternalElementA*>(nullptr)),
                  make_layout(shape.get_shape_A(),
                              cutlass::make_cute_packed_stride(typename Collective::StrideA{}, shape.stride_A, kOp)));
  const auto tensor_b =
      make_tensor(make_gmem_ptr(static_cast<const typename Collective::InternalElementB*>(nullptr)),
                  make_layout(shape.get_shape_B(),
                              cutlass::make_cute_packed_stride(typename Collective::StrideB{}, shape.stride_B, kOp)));
  typename Collective::Params params{Collective::get_tma_load_a_instance(tensor_a, shape), {}, 0};
  out.maps[0] = truth::noted;
  params.tma_load_b = Collective::get_tma_load_b_instance(tensor_b, shape);
  out.maps[1] = truth::noted;
  const auto loads = Collective{}.load_init(Collective::get_problem_shape_MNKL(shape), params);
  typename Collective::InternalElementA* const shared_a = nullptr;
  typename Collective::InternalElementB* const shared_b = nullptr;
  out.counts[0] =
      note_copies(params.tma_load_a.get_slice(0), get<0>(loads),
                  make_tensor(make_smem_ptr(shared_a), typename Collective::SmemLayoutA{}), out.copies, out.room);
  if (out.counts[0] < 0) return false;
  out.counts[1] = note_copies(params.tma_load_b.get_slice(0), get<1>(loads),
                              make_tensor(make_smem_ptr(shared_b), typename Collective::SmemLayoutB{}),
                              out.copies + out.counts[0], out.room - out.counts[0]);
  return out.counts[1] >= 0 && Collective::can_implement(shape, {nullptr, nullptr});
}

// Whether CUTLASS takes the problem in output tiles of 128 rows. It copies bf16 and f16 as integers of 16 bits, so that both
// have one plan.
template <class Columns>
bool plan_tile(const truth::Problem& p, const Out& out) {
  if (p.type == 2) return p.op == 0 && plan<ConvOperator::kFprop, float, Columns>(p, out);
  if (p.op == 0) return plan<ConvOperator::kFprop, cutlass::bfloat16_t, Columns>(p, out);
  if (p.op == 1) return plan<ConvOperator::kDgrad, cutlass::bfloat16_t, Columns>(p, out);
  return plan<ConvOperator::kWgrad, cutlass::bfloat16_t, Shape<Columns>>(p, out);
}

}  // namespace

// Functions of the runtime that CUTLASS's host code names; no device is asked for anything.
cudaError_t CUDARTAPI cudaDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return cudaSuccess;
}
cudaError_t CUDARTAPI cudaGetLastError() { return cudaSuccess; }
cudaError_t CUDARTAPI cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return cudaErrorNotSupported; }
