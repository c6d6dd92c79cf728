// Layouts and descriptors as CuTe has them, as tables: fragments of mma.sync, ldmatrix and wgmma, tiles in shared memory under
// the 128-byte swizzle, and the matrix descriptors of a tile's steps. Included once in a program.
#pragma once

#include "tests/truth/host.h"
//
#include <cutlass/numeric_types.h>

#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

using namespace cute;

namespace {

// out[thread * values + value] = layout(thread, value).
template <class Layout>
int table(const Layout& layout, int* out) {
  const int threads = size<0>(layout), values = size<1>(layout);
  for (int thread = 0; thread < threads; ++thread) {
    for (int value = 0; value < values; ++value) out[thread * values + value] = static_cast<int>(layout(thread, value));
  }
  return threads * values;
}

template <class Op>
int mma_table(int operand, int* out) {
  using Traits = MMA_Traits<Op>;
  if (operand == 0) return table(typename Traits::ALayout{}, out);
  return operand == 1 ? table(typename Traits::BLayout{}, out) : table(typename Traits::CLayout{}, out);
}

template <class Op>
int ldmatrix_table(bool rows, int* out) {
  using Traits = Copy_Traits<Op>;
  return rows ? table(typename Traits::SrcLayout{}, out) : table(typename Traits::DstLayout{}, out);
}

int ldmatrix_table(int matrices, int transposed, bool rows, int* out) {
  if (matrices == 1 && !transposed) return ldmatrix_table<SM75_U32x1_LDSM_N>(rows, out);
  if (matrices == 2 && !transposed) return ldmatrix_table<SM75_U32x2_LDSM_N>(rows, out);
  if (!transposed) return ldmatrix_table<SM75_U32x4_LDSM_N>(rows, out);
  if (matrices == 1) return ldmatrix_table<SM75_U16x2_LDSM_T>(rows, out);
  return matrices == 2 ? ldmatrix_table<SM75_U16x4_LDSM_T>(rows, out) : ldmatrix_table<SM75_U16x8_LDSM_T>(rows, out);
}

// A tile of `Rows` rows or columns, one k-tile of 128 bytes deep, as CUTLASS's sm90 builders lay it.
template <class Element, GMMA::Major kMajor, int Rows>
auto tile() {
  constexpr int kDepth = 128 / sizeof(Element);
  return tile_to_shape(GMMA::Layout_SW128_Atom<Element, kMajor>{}, make_shape(Int<Rows>{}, Int<kDepth>{}),
                       Step<_2, _1>{});
}

// addresses[row * depth + l]: the byte of element (row, l).
template <class Element, GMMA::Major kMajor, int Rows>
int tile_addresses(int* addresses) {
  const auto layout = as_position_independent_swizzle_layout(tile<Element, kMajor, Rows>());
  constexpr int kDepth = 128 / sizeof(Element);
  for (int row = 0; row < Rows; ++row) {
    for (int l = 0; l < kDepth; ++l)
      addresses[row * kDepth + l] = static_cast<int>(layout(row, l)) * int(sizeof(Element));
  }
  return Rows * kDepth;
}

// The descriptors of the four steps of both warpgroups' A, then of B, as CUTLASS's mainloop makes them.
template <class Op, class Element, GMMA::Major kMajor, int Columns>
int step_descriptors(uint64_t* out) {
  const auto mma = make_tiled_mma(Op{}, Layout<Shape<_2, _1, _1>>{});
  Element* const null = nullptr;
  const auto a = make_tensor(make_smem_ptr(null), tile<Element, kMajor, 128>());
  const auto b = make_tensor(make_smem_ptr(null), tile<Element, kMajor, Columns>());
  int count = 0;
  for (int warpgroup = 0; warpgroup < 2; ++warpgroup) {
    const auto slice = mma.get_thread_slice(128 * warpgroup);
    const auto of_a = slice.make_fragment_A(slice.partition_A(a));
    for (int step = 0; step < 4; ++step) out[count++] = uint64_t(of_a(_, _0{}, step)(_0{}));
  }
  const auto slice = mma.get_thread_slice(0);
  const auto of_b = slice.make_fragment_B(slice.partition_B(b));
  for (int step = 0; step < 4; ++step) out[count++] = uint64_t(of_b(_, _0{}, step)(_0{}));
  return count;
}

constexpr auto kK = GMMA::Major::K, kMN = GMMA::Major::MN;

// Calls f<Op, Element, major, columns>() for the wgmma of a type: 0 bf16, 1 f16, 2 tf32; 0 where there is none.
template <class F>
int for_wgmma(int type, int mn_major, int columns, const F& f) {
  const int key = (type * 2 + mn_major) * 1000 + columns;
  switch (key) {
    case 64:
      return f.template operator()<SM90_64x64x16_F32BF16BF16_SS<kK, kK>, bfloat16_t, kK, 64>();
    case 128:
      return f.template operator()<SM90_64x128x16_F32BF16BF16_SS<kK, kK>, bfloat16_t, kK, 128>();
    case 256:
      return f.template operator()<SM90_64x256x16_F32BF16BF16_SS<kK, kK>, bfloat16_t, kK, 256>();
    case 1064:
      return f.template operator()<SM90_64x64x16_F32BF16BF16_SS<kMN, kMN>, bfloat16_t, kMN, 64>();
    case 1128:
      return f.template operator()<SM90_64x128x16_F32BF16BF16_SS<kMN, kMN>, bfloat16_t, kMN, 128>();
    case 2128:
      return f.template operator()<SM90_64x128x16_F32F16F16_SS<kK, kK>, half_t, kK, 128>();
    case 3256:
      return f.template operator()<SM90_64x256x16_F32F16F16_SS<kMN, kMN>, half_t, kMN, 256>();
    case 4064:
      return f.template operator()<SM90_64x64x8_F32TF32TF32_SS_TN<>, tfloat32_t, kK, 64>();
    case 4256:
      return f.template operator()<SM90_64x256x8_F32TF32TF32_SS_TN<>, tfloat32_t, kK, 256>();
    default:
      return 0;
  }
}

struct Descriptors {
  uint64_t* out;
  template <class Op, class Element, GMMA::Major kMajor, int Columns>
  int operator()() const {
    return step_descriptors<Op, Element, kMajor, Columns>(out);
  }
};

struct Addresses {
  int* out;
  template <class Op, class Element, GMMA::Major kMajor, int Columns>
  int operator()() const {
    const int of_a = tile_addresses<Element, kMajor, 128>(out);
    return of_a + tile_addresses<Element, kMajor, Columns>(out + of_a);
  }
};

}  // namespace

// Each returns how many values it gave. kind: 0 bf16, 1 f16, 2 tf32; operand: 0 A, 1 B, 2 C; an element is row + rows * column.
EXPORT int cute_mma(int kind, int operand, int* out) {
  if (kind == 0) return mma_table<SM80_16x8x16_F32BF16BF16F32_TN>(operand, out);
  if (kind == 1) return mma_table<SM80_16x8x16_F32F16F16F32_TN>(operand, out);
  return mma_table<SM80_16x8x8_F32TF32TF32F32_TN>(operand, out);
}

// For each lane and bit that it receives: the bit of the source, 128 of them a row of a matrix.
EXPORT int cute_ldmatrix(int matrices, int transposed, int* out) {
  return ldmatrix_table(matrices, transposed, false, out);
}

// For each lane and bit of the row that it points at: the bit of the source.
EXPORT int cute_ldmatrix_rows(int matrices, int transposed, int* out) {
  return ldmatrix_table(matrices, transposed, true, out);
}

// For each of 128 threads and its accumulators: row + 64 * column.
EXPORT int cute_wgmma_accumulators(int columns, int* out) {
  if (columns == 64) return table(GMMA::CLayout_64xN<64>{}, out);
  return columns == 128 ? table(GMMA::CLayout_64xN<128>{}, out) : table(GMMA::CLayout_64xN<256>{}, out);
}

EXPORT int cute_descriptors(int type, int mn_major, int columns, uint64_t* out) {
  return for_wgmma(type, mn_major, columns, Descriptors{out});
}

// Bytes of A's tile of 128 rows, then of B's.
EXPORT int cute_tiles(int type, int mn_major, int columns, int* out) {
  return for_wgmma(type, mn_major, columns, Addresses{out});
}
