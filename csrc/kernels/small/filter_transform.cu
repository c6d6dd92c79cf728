// out = cast(filter * scale[k]) as KRSC, or transposed to CRSK, which is W': made anew for every dgrad. scale is that of a
// batch norm behind the convolution; none is 1.
//
//   KRSC: group, k, r, s, c     fprop and wgrad; with k over the whole K it is the usual K x R x S x C/G
//   CRSK: group, c, r, s, k     W', which dgrad reads as if it were the KRSC filter of an fprop from dy to dx
//
// W' is only transposed. The rotation by 180 degrees and the choice of taps of a strided dgrad are in core/gather.h, so
// that one W' serves every stride and padding.
//
// A block of 32 x 8 threads moves a tile of 32 x 32 (k, c) of one tap: reads run along c, writes along c or, through a
// tile in shared memory, along k. The filter has any strides, so that torch's own layout needs no copy before this one.
#include "core/gather.h"
#include "kernels/families.h"
#include "kernels/numeric.h"

namespace freezekit {
namespace {

constexpr int kTile = kChannelsAtOnce;
constexpr int kRowLanes = 8;

struct FilterExtent {
  int32_t k, taps, c;  // of one group
};

struct Source {
  FilterExtent size;
  int32_t width;  // S
  int64_t stride_k, stride_c, stride_r, stride_s;
};

template <class From, class To>
__global__ void __launch_bounds__(kTile* kRowLanes)
    filter_transform_kernel(const Source source, bool transposed, const From* __restrict__ filter,
                            const Accumulator<From>* __restrict__ scale, To* __restrict__ out) {
  using Wide = Accumulator<From>;
  FK_SHARED(Wide, tile, [kTile][kTile + 1]);
  const FilterExtent size = source.size;
  const int32_t c_tiles = (size.c + kTile - 1) / kTile, k_tiles = (size.k + kTile - 1) / kTile;
  int32_t block = static_cast<int32_t>(blockIdx.x);
  const int32_t c0 = block % c_tiles * kTile;
  block /= c_tiles;
  const int32_t k0 = block % k_tiles * kTile;
  block /= k_tiles;
  const int32_t tap = block % size.taps, group = block / size.taps;
  const int32_t x = static_cast<int32_t>(threadIdx.x), y = static_cast<int32_t>(threadIdx.y);

  const int64_t at_tap = tap / source.width * source.stride_r + tap % source.width * source.stride_s;
#pragma unroll 2  // four at once spill in double
  for (int32_t i = y; i < kTile; i += kRowLanes) {
    const int32_t k = k0 + i, c = c0 + x;
    if (k >= size.k || c >= size.c) continue;
    const int64_t k_all = static_cast<int64_t>(group) * size.k + k;
    const From value = load_global(filter + k_all * source.stride_k + at_tap + c * source.stride_c);
    tile[i][x] = cast<Wide>(value) * (scale ? load_global(scale + k_all) : Wide(1));
  }
  __syncthreads();
#pragma unroll 2
  for (int32_t i = y; i < kTile; i += kRowLanes) {
    const int32_t k = k0 + (transposed ? x : i), c = c0 + (transposed ? i : x);
    if (k >= size.k || c >= size.c) continue;
    const int64_t offset = transposed ? ((static_cast<int64_t>(group) * size.c + c) * size.taps + tap) * size.k + k
                                      : ((static_cast<int64_t>(group) * size.k + k) * size.taps + tap) * size.c + c;
    store_global(out + offset, cast<To>(static_cast<Accumulator<To>>(tile[k - k0][c - c0])));
  }
}

template <class From, class To>
Status launch(const Conv2dProblem& p, const FilterTransform& t, const void* filter, void* out, Stream stream) {
  const auto narrow = [](int64_t value) { return static_cast<int32_t>(value); };
  Source source;
  source.size = {narrow(p.k_per_group()), narrow(p.r * p.s), narrow(p.c_per_group())};
  source.width = narrow(p.s);
  source.stride_k = t.stride_k, source.stride_c = t.stride_c;
  source.stride_r = t.stride_r, source.stride_s = t.stride_s;
  const int64_t blocks = ceil_div(p.c_per_group(), kTile) * ceil_div(p.k_per_group(), kTile) * p.r * p.s * p.groups;
  if (blocks > kMaxGridX) return Status::invalid_argument;
  return FK_LAUNCH(filter_transform_kernel<From, To>, dim3(static_cast<unsigned>(blocks)), dim3(kTile, kRowLanes), 0,
                   stream, source, t.transposed, static_cast<const From*>(filter),
                   static_cast<const Accumulator<From>*>(t.scale), static_cast<To*>(out));
}

}  // namespace

Status launch_filter_transform(const Conv2dProblem& p, const FilterTransform& t, const void* filter, void* out,
                               Stream stream) {
  if (p.filter_numel() == 0) return Status::success;
  if (!fits_int32(p) || !filter || !out) return Status::invalid_argument;
  if (t.from == DType::f32 && t.to == DType::bf16) return launch<float, bf16>(p, t, filter, out, stream);
  if (t.from == DType::f32 && t.to == DType::f16) return launch<float, f16>(p, t, filter, out, stream);
  if (t.from != t.to) return Status::unsupported;
  return dispatch_dtype(t.from, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch<T, T>(p, t, filter, out, stream);
  });
}

}  // namespace freezekit
