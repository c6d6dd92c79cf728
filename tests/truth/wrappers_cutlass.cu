// Each instruction of csrc/kernels/ptx.h and hopper/ptx_sm90.h as CUTLASS and CuTe wrap it, a kernel each. The kernels of
// wrappers_freezekit.cu have the same names and parameters.
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/numeric/integer_sequence.hpp>

#include "tests/truth/kernel_shapes.h"

using namespace cute;
using Row = uint128_t;
using Barrier = cutlass::arch::ClusterBarrier;
using CountingBarrier = cutlass::arch::ClusterTransactionBarrier;

COPY(cp_async_16, uint128_t, (SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<uint128_t>::copy(*global, *shared, copy)))
COPY(cp_async_8, uint64_t, (SM80_CP_ASYNC_CACHEALWAYS_ZFILL<uint64_t>::copy(*global, *shared, copy)))
COPY(cp_async_4, uint32_t, (SM80_CP_ASYNC_CACHEALWAYS_ZFILL<uint32_t>::copy(*global, *shared, copy)))
PLAIN(cp_async_commit, cp_async_fence())
PLAIN(cp_async_wait, cp_async_wait<2>())

LOAD(ldmatrix_1, 1, SM75_U32x1_LDSM_N::copy(*row, d[0]))
LOAD(ldmatrix_2, 2, SM75_U32x2_LDSM_N::copy(*row, d[0], d[1]))
LOAD(ldmatrix_4, 4, SM75_U32x4_LDSM_N::copy(*row, d[0], d[1], d[2], d[3]))
LOAD(ldmatrix_trans_1, 1, SM75_U16x2_LDSM_T::copy(*row, d[0]))
LOAD(ldmatrix_trans_2, 2, SM75_U16x4_LDSM_T::copy(*row, d[0], d[1]))
LOAD(ldmatrix_trans_4, 4, SM75_U16x8_LDSM_T::copy(*row, d[0], d[1], d[2], d[3]))

#define FMA(Op) Op::fma(d[0], d[1], d[2], d[3], a[0], a[1], a[2], a[3], b[0], b[1], d[0], d[1], d[2], d[3])
MMA(mma_bf16, FMA(SM80_16x8x16_F32BF16BF16F32_TN))
MMA(mma_f16, FMA(SM80_16x8x16_F32F16F16F32_TN))
MMA(mma_tf32, FMA(SM80_16x8x8_F32TF32TF32F32_TN))

ON_BARRIER(mbarrier_init, Barrier::init(barrier, 8))
PLAIN(fence_mbarrier_init, (cutlass::arch::fence_barrier_init(), cutlass::arch::fence_view_async_shared()))
ON_BARRIER(mbarrier_arrive, Barrier::arrive(barrier))
ON_BARRIER(mbarrier_arrive_expect, CountingBarrier::arrive_and_expect_tx(barrier, number))
ON_BARRIER(mbarrier_wait, while (!Barrier::try_wait(barrier, number)){})

constexpr auto kHint = static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_NORMAL);
TENSOR(copy_tile_2d, SM90_TMA_LOAD_2D::copy(&map, barrier, kHint, shared, at.x, at.y))
TENSOR(copy_tile_3d, SM90_TMA_LOAD_3D::copy(&map, barrier, kHint, shared, at.x, at.y, at.z))
TENSOR(copy_im2col, SM90_TMA_LOAD_IM2COL_4D::copy(&map, barrier, shared, at.x, at.y, at.z, at.w,
                                                  static_cast<uint16_t>(offset.x), static_cast<uint16_t>(offset.y)))

OF_THREE_WARPGROUPS(give_registers, cutlass::arch::warpgroup_reg_dealloc<40>())
OF_THREE_WARPGROUPS(take_registers, cutlass::arch::warpgroup_reg_alloc<232>())
PLAIN(wgmma_fence, warpgroup_arrive())
PLAIN(wgmma_commit, warpgroup_commit_batch())
PLAIN(wgmma_wait_1, warpgroup_wait<1>())
PLAIN(wgmma_wait_0, warpgroup_wait<0>())

template <class Op, int... I>
__device__ void fma(float* d, uint64_t a, uint64_t b, seq<I...>) {
  Op::fma(a, b, d[I]..., SM90::GMMA::ScaleOut::One);
}
template <class Op, int kCount>
__device__ void multiply(float (&d)[kCount], uint64_t a, uint64_t b) {
  fma<Op>(d, a, b, make_seq<kCount>{});
}
constexpr auto kK = SM90::GMMA::Major::K, kMN = SM90::GMMA::Major::MN;
WGMMA(wgmma_bf16_64, 32, (multiply<SM90::GMMA::MMA_64x64x16_F32BF16BF16_SS<kK, kK>>(d, a, b)))
WGMMA(wgmma_bf16_128, 64, (multiply<SM90::GMMA::MMA_64x128x16_F32BF16BF16_SS<kK, kK>>(d, a, b)))
WGMMA(wgmma_bf16_256, 128, (multiply<SM90::GMMA::MMA_64x256x16_F32BF16BF16_SS<kK, kK>>(d, a, b)))
WGMMA(wgmma_bf16_64_mn_major, 32, (multiply<SM90::GMMA::MMA_64x64x16_F32BF16BF16_SS<kMN, kMN>>(d, a, b)))
WGMMA(wgmma_f16_64, 32, (multiply<SM90::GMMA::MMA_64x64x16_F32F16F16_SS<kK, kK>>(d, a, b)))
WGMMA(wgmma_f16_128_mn_major, 64, (multiply<SM90::GMMA::MMA_64x128x16_F32F16F16_SS<kMN, kMN>>(d, a, b)))
WGMMA(wgmma_f16_256, 128, (multiply<SM90::GMMA::MMA_64x256x16_F32F16F16_SS<kK, kK>>(d, a, b)))
WGMMA(wgmma_tf32_64, 32, (multiply<SM90::GMMA::MMA_64x64x8_F32TF32TF32_SS_TN<>>(d, a, b)))
WGMMA(wgmma_tf32_128, 64, (multiply<SM90::GMMA::MMA_64x128x8_F32TF32TF32_SS_TN<>>(d, a, b)))
WGMMA(wgmma_tf32_256, 128, (multiply<SM90::GMMA::MMA_64x256x8_F32TF32TF32_SS_TN<>>(d, a, b)))
