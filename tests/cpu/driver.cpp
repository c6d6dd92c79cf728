// A C face of csrc/cpu for ctypes. It is compiled once for each instruction set that FK_SIMD_CLONES names, so that a test
// can hold their results against each other: the loader of the package only ever picks one of them.
#include <vector>

#include "cpu/gate.h"
#include "cpu/max_pool.h"
#include "cpu/relu_avx512.h"
#include "cpu/sigmoid.h"
#include "cpu/smooth.h"
#include "cpu/winograd.h"

using namespace freezekit::cpu;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

}  // namespace

namespace freezekit::cpu {
template <>
inline constexpr Format kFormat<BFloat16> = Format::bfloat16;
template <>
inline constexpr Format kFormat<Float16> = Format::float16;
}  // namespace freezekit::cpu

namespace {

enum Kind { kRelu, kLeakyRelu, kHardtanh, kSelect, kScale };

template <class T>
void run(Kind kind, const void* from, void* to, uint32_t* bits, int64_t numel, double a, double b) {
  const T* const x = static_cast<const T*>(from);
  T* const y = static_cast<T*>(to);
  const int64_t words = freezekit::mask_words(numel);
  const auto low = static_cast<Compute<T>>(a), high = static_cast<Compute<T>>(b);
  if (kind == kRelu) make_bits(x, y, bits, numel, 0, words, Relu<T>{});
  if (kind == kLeakyRelu) make_bits(x, y, bits, numel, 0, words, LeakyRelu<T>{low});
  if (kind == kHardtanh)
    make_bits(x, y, bits, numel, 0, words, Hardtanh<T>{up(down<T>(low)), up(down<T>(high)), low, high});
  if (kind == kSelect) apply_bits(x, y, bits, numel, 0, words, Select<T>{});
  if (kind == kScale) apply_bits(x, y, bits, numel, 0, words, Scale<T>{low, high});
}

template <class T>
void pool(const void* x, void* y, uint8_t* taps, const Pooling3d& g, int64_t channels) {
  std::vector<Compute<T>> best(static_cast<size_t>(channels));
  std::vector<int32_t> tap(static_cast<size_t>(channels));
  for (int64_t p = 0; p < g.plane.p; ++p) {
    const int64_t at = p * g.plane.q * channels;
    max_pool_pixels<T, Compute<T>>(static_cast<const T*>(x), static_cast<T*>(y) + at, taps + at, g, {0, p}, channels,
                                   best.data(), tap.data());
  }
}

template <class T, class Rule>
void encode_by(int bits, const T* x, uint8_t* codes, int64_t numel, Rule rule) {
  const CodeGrid grid = CodeGrid::of(bits, 1, Rule::kBelow, Rule::kAbove);
  const int64_t blocks = (numel + kCodeBlock - 1) / kCodeBlock;
  if (bits == 8) encode_blocks<8>(x, codes, numel, 0, blocks, rule, grid);
  if (bits == 4) encode_blocks<4>(x, codes, numel, 0, blocks, rule, grid);
}

template <class T>
void encode_all(int kind, int bits, const void* from, uint8_t* codes, int64_t numel) {
  const T* const x = static_cast<const T*>(from);
  if (kind == 0) encode_by(bits, x, codes, numel, Silu{});
  if (kind == 1) encode_by(bits, x, codes, numel, Gelu{});
  if (kind == 2) encode_by(bits, x, codes, numel, GeluTanh{});
  if (kind == 3) encode_by(bits, x, codes, numel, Mish{});
  if (kind == 4) encode_by(bits, x, codes, numel, Hardswish{});
  if (kind == 5) encode_by(bits, x, codes, numel, Softplus{1, 20});
}

// Of SiLU's codes.
template <class T>
void decode_all(int bits, const void* dy, const uint8_t* codes, void* dx, int64_t numel) {
  const CodeGrid grid = CodeGrid::of(bits, 1, Silu::kBelow, Silu::kAbove);
  const int64_t blocks = (numel + kCodeBlock - 1) / kCodeBlock;
  const T* const from = static_cast<const T*>(dy);
  if (bits == 8) decode_blocks<8>(from, codes, static_cast<T*>(dx), numel, 0, blocks, grid);
  if (bits == 4) decode_blocks<4>(from, codes, static_cast<T*>(dx), numel, 0, blocks, grid);
}

}  // namespace

EXPORT void driver_encode(int dtype, int kind, int bits, const void* x, uint8_t* codes, int64_t numel) {
  const auto f = dtype == 0 ? encode_all<float> : dtype == 2 ? encode_all<Float16> : encode_all<BFloat16>;
  f(kind, bits, x, codes, numel);
}

EXPORT void driver_decode(int dtype, int bits, const void* dy, const uint8_t* codes, void* dx, int64_t numel) {
  const auto f = dtype == 0 ? decode_all<float> : dtype == 2 ? decode_all<Float16> : decode_all<BFloat16>;
  f(bits, dy, codes, dx, numel);
}

EXPORT void driver_sigmoid(bool is_silu, float factor, const float* x, float* y, int64_t alone, int64_t count) {
  sigmoid_row(x, y, alone, count, {is_silu, factor});
}

EXPORT bool driver_is_sigmoid(bool is_silu, float factor, const float* x, const float* y, int64_t alone,
                              int64_t count) {
  return is_sigmoid_row(x, y, alone, count, {is_silu, factor});
}

// dtype as in csrc/core/problem.h: f32, f64, f16, bf16.
EXPORT void driver_gate(int dtype, int kind, const void* x, void* y, uint32_t* bits, int64_t numel, double a,
                        double b) {
  const auto f = dtype == 0 ? run<float> : dtype == 1 ? run<double> : dtype == 2 ? run<Float16> : run<BFloat16>;
  f(static_cast<Kind>(kind), x, y, bits, numel, a, b);
}

// One image in NHWC; sizes: h, w, p, q, kernel, stride, padding and dilation as (height, width).
EXPORT void driver_max_pool(int dtype, const void* x, void* y, uint8_t* taps, const int64_t* sizes, int64_t channels) {
  const int64_t* const v = sizes;
  const Pooling3d g = {{v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11]}};
  const auto f = dtype == 0 ? pool<float> : dtype == 1 ? pool<double> : dtype == 2 ? pool<Float16> : pool<BFloat16>;
  f(x, y, taps, g, channels);
}

EXPORT void driver_to_float(int dtype, const uint16_t* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = dtype == 2 ? up(bits_as<Float16>(from[i])) : up(bits_as<BFloat16>(from[i]));
  }
}

EXPORT void driver_from_float(int dtype, const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = dtype == 2 ? down<Float16>(from[i]).bits : down<BFloat16>(from[i]).bits;
  }
}

namespace {

// x and y as `size` says, the filters KCRS, all dense.
template <int kLanes>
bool winograd(const Winograd& size, const float* x, const float* w, float* y) {
  const WinogradBlock<kLanes> block(size);
  std::vector<float> u(block.filter_numel()), workspace(block.workspace_numel());
  block.transform_filter({w, size.in * 9, 9, 3, 1}, u.data(), 0, size.out / kWinogradUnit);
  // In two parts, of which the second begins inside a row.
  const int64_t half = size.tiles() / 2;
  const bool finite = block.run(x, u.data(), y, workspace.data(), 0, half);
  return block.run(x, u.data(), y, workspace.data(), half, size.tiles()) && finite;
}

}  // namespace

EXPORT bool driver_winograd(int lanes, const int64_t* sizes, bool nhwc, const float* x, const float* w, float* y) {
  const Winograd size = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4],
                         sizes[5], sizes[6], sizes[7], sizes[8], nhwc};
  return lanes == 16 ? winograd<16>(size, x, w, y) : winograd<8>(size, x, w, y);
}
