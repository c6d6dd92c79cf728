// The kernels of wrappers_cutlass.cu by freezekit's wrappers.
#include "kernels/hopper/ptx_sm90.h"
#include "tests/truth/kernel_shapes.h"

using namespace freezekit;
using Row = uint4;

COPY(cp_async_16, uint4, ptx::cp_async<16>(shared, global, copy))
COPY(cp_async_8, uint64_t, ptx::cp_async<8>(shared, global, copy))
COPY(cp_async_4, uint32_t, ptx::cp_async<4>(shared, global, copy))
PLAIN(cp_async_commit, ptx::cp_async_commit())
PLAIN(cp_async_wait, ptx::cp_async_wait<2>())

LOAD(ldmatrix_1, 1, ptx::ldmatrix(d, row))
LOAD(ldmatrix_2, 2, ptx::ldmatrix(d, row))
LOAD(ldmatrix_4, 4, ptx::ldmatrix(d, row))
LOAD(ldmatrix_trans_1, 1, ptx::ldmatrix_trans(d, row))
LOAD(ldmatrix_trans_2, 2, ptx::ldmatrix_trans(d, row))
LOAD(ldmatrix_trans_4, 4, ptx::ldmatrix_trans(d, row))

MMA(mma_bf16, ptx::mma_m16n8k16<bf16>(d, a, b))
MMA(mma_f16, ptx::mma_m16n8k16<f16>(d, a, b))
MMA(mma_tf32, ptx::mma_m16n8k8_tf32(d, a, b))

ON_BARRIER(mbarrier_init, ptx::mbarrier_init(barrier, 8))
PLAIN(fence_mbarrier_init, ptx::fence_mbarrier_init())
ON_BARRIER(mbarrier_arrive, ptx::mbarrier_arrive(barrier))
ON_BARRIER(mbarrier_arrive_expect, ptx::mbarrier_arrive_expect(barrier, number))
ON_BARRIER(mbarrier_wait, ptx::mbarrier_wait(barrier, number))

TENSOR(copy_tile_2d, ptx::copy_tile(shared, &map, barrier, at.x, at.y))
TENSOR(copy_tile_3d, ptx::copy_tile(shared, &map, barrier, at.x, at.y, at.z))
TENSOR(copy_im2col, ptx::copy_im2col(shared, &map, barrier, {at.x, at.y, at.z, at.w}, offset.x, offset.y))

OF_THREE_WARPGROUPS(give_registers, ptx::give_registers<40>())
OF_THREE_WARPGROUPS(take_registers, ptx::take_registers<232>())
PLAIN(wgmma_fence, ptx::wgmma_fence())
PLAIN(wgmma_commit, ptx::wgmma_commit())
PLAIN(wgmma_wait_1, ptx::wgmma_wait<1>())
PLAIN(wgmma_wait_0, ptx::wgmma_wait<0>())

WGMMA(wgmma_bf16_64, 32, (ptx::wgmma<bf16, false, false>(d, a, b)))
WGMMA(wgmma_bf16_128, 64, (ptx::wgmma<bf16, false, false>(d, a, b)))
WGMMA(wgmma_bf16_256, 128, (ptx::wgmma<bf16, false, false>(d, a, b)))
WGMMA(wgmma_bf16_64_mn_major, 32, (ptx::wgmma<bf16, true, true>(d, a, b)))
WGMMA(wgmma_f16_64, 32, (ptx::wgmma<f16, false, false>(d, a, b)))
WGMMA(wgmma_f16_128_mn_major, 64, (ptx::wgmma<f16, true, true>(d, a, b)))
WGMMA(wgmma_f16_256, 128, (ptx::wgmma<f16, false, false>(d, a, b)))
WGMMA(wgmma_tf32_64, 32, (ptx::wgmma<float, false, false>(d, a, b)))
WGMMA(wgmma_tf32_128, 64, (ptx::wgmma<float, false, false>(d, a, b)))
WGMMA(wgmma_tf32_256, 128, (ptx::wgmma<float, false, false>(d, a, b)))
