// What every fprop and dgrad kernel does with its accumulators: * scale, + bias, + residual, ReLU, clamp, mask, store.
//
//   v = round(acc * scale[channel] + bias[channel] + residual[offset]);  mask_out bit = !(v <= 0) && !(v >= end)
//   v = v <= 0 ? 0 : v >= end ? end : v;  out[offset] = mask_in bit ? v : 0
//
// `offset` counts elements of the output in memory order, NHWC. The bit is taken of the value rounded to the tensors'
// type, so it says what comparing the stored output with 0 and `end` would say, and a NaN passes its gradient as in
// torch, where the gradient of ReLU6 is 0 at both ends. A ReLU without an end has a NaN for it: nothing is beyond that.
//
// The unit of work is a run of eight channels of one output position. Where the channels of a group are a multiple of 8
// and pointers are 16-byte aligned, a run is one or two 16-byte accesses and owns a byte of the mask, so that neither
// shuffles nor atomics are needed. Else it goes element by element, and its bits are or-ed into words that the launcher
// has zeroed: or-ing commutes, so the result does not depend on the order of the threads.
#pragma once

#include <cmath>
#include <limits>

#include "core/mask.h"
#include "kernels/numeric.h"

namespace freezekit {

// What a kernel is compiled for; a member that is null at run time does nothing.
enum EpilogueFlags : int {
  kEpilogueAffine = 1,  // scale and bias
  kEpilogueResidual = 2,
  kEpilogueRelu = 4,
  kEpilogueMaskIn = 8,
  kEpilogueClamp = 16,  // the upper end of ReLU
  kEpilogueAll = 31,
  kEpilogueVector = 32,  // the launcher has seen to it that EpilogueParameters::vector holds
};

template <class T>
struct EpilogueParameters {
  T* out = nullptr;
  const Accumulator<T>* scale = nullptr;
  const void* bias = nullptr;  // of T, or of Accumulator<T> under wide_bias
  const T* residual = nullptr;
  uint32_t* mask_out = nullptr;
  const uint32_t* mask_in = nullptr;
  float relu_end = 0;  // NaN: none
  bool relu = false;
  bool wide_bias = false;
  bool vector = false;  // every run is eight whole channels, and all pointers are 16-byte aligned
};

template <class T>
FK_DEVICE void load_run(const T* p, int32_t count, bool vector, T (&values)[8]) {
  if (vector) {
    load8(p, values);
    return;
  }
#pragma unroll
  for (int32_t i = 0; i < 8; ++i) values[i] = i < count ? load_global(p + i) : cast<T>(0.0f);
}

template <class T>
FK_DEVICE void store_run(T* p, int32_t count, bool vector, const T (&values)[8]) {
  if (vector) {
    store8(p, values);
    return;
  }
#pragma unroll
  for (int32_t i = 0; i < 8; ++i) {
    if (i < count) store_global(p + i, values[i]);
  }
}

template <class From, class Acc>
FK_DEVICE void add_run(const From* p, int32_t count, bool vector, Acc (&acc)[8]) {
  From run[8];
  load_run(p, count, vector, run);
#pragma unroll
  for (int32_t i = 0; i < 8; ++i) acc[i] += cast<Acc>(run[i]);
}

template <class Acc>
FK_DEVICE void scale_run(const Acc* p, int32_t count, bool vector, Acc (&acc)[8]) {
  Acc run[8];
  load_run(p, count, vector, run);
#pragma unroll
  for (int32_t i = 0; i < 8; ++i) acc[i] *= run[i];
}

// The eight mask bits from `offset` on.
FK_DEVICE uint32_t load_mask_run(const uint32_t* mask, int64_t offset, int32_t count, bool vector) {
  if (vector) return load_global(reinterpret_cast<const uint8_t*>(mask) + (offset >> 3));
  return mask_run(mask, offset, count);
}

FK_DEVICE void store_mask_run(uint32_t* mask, int64_t offset, int32_t count, bool vector, uint32_t bits) {
  if (vector) {
    store_global(reinterpret_cast<uint8_t*>(mask) + (offset >> 3), static_cast<uint8_t>(bits));
    return;
  }
  const MaskParts parts = split_mask_run(bits & ((1u << count) - 1), offset, count);
  uint32_t* const word = mask + (offset >> 5);
  if (parts.first) atomicOr(word, parts.first);
  if (parts.second) atomicOr(word + 1, parts.second);
}

template <class T>
FK_DEVICE void keep_where(uint32_t bits, T (&values)[8]) {
#pragma unroll
  for (int32_t i = 0; i < 8; ++i) values[i] = bits >> i & 1 ? values[i] : cast<T>(0.0f);
}

// What is at or beyond `end` becomes `end`; returns `bits` without it.
template <class Acc, class T>
FK_DEVICE uint32_t clamp_run(Acc end, uint32_t bits, T (&values)[8]) {
#pragma unroll
  for (int32_t i = 0; i < 8; ++i) {
    const bool beyond = cast<Acc>(values[i]) >= end;
    values[i] = beyond ? cast<T>(end) : values[i];
    bits &= ~(static_cast<uint32_t>(beyond) << i);
  }
  return bits;
}

// Finishes channels channel ... channel + count - 1 (1 <= count <= 8) of one output position.
template <int kFlags, class T>
FK_DEVICE void finish_run(const EpilogueParameters<T>& e, Accumulator<T> (&acc)[8], int64_t offset, int32_t channel,
                          int32_t count) {
  using Acc = Accumulator<T>;
  const bool vector = (kFlags & kEpilogueVector) != 0 || e.vector;
  if constexpr ((kFlags & kEpilogueAffine) != 0) {
    if (e.scale) scale_run(e.scale + channel, count, vector, acc);
    if (e.bias && (std::is_same_v<T, Acc> || e.wide_bias)) {
      add_run(static_cast<const Acc*>(e.bias) + channel, count, vector, acc);
    } else if (e.bias) {
      add_run(static_cast<const T*>(e.bias) + channel, count, vector, acc);
    }
  }
  if constexpr ((kFlags & kEpilogueResidual) != 0) {
    if (e.residual) add_run(e.residual + offset, count, vector, acc);
  }
  T run[8];
#pragma unroll
  for (int32_t i = 0; i < 8; ++i) run[i] = cast<T>(acc[i]);
  if constexpr ((kFlags & kEpilogueRelu) != 0) {
    if (e.relu) {
      uint32_t bits = 0;
#pragma unroll
      for (int32_t i = 0; i < 8; ++i) bits |= static_cast<uint32_t>(!(cast<Acc>(run[i]) <= 0)) << i;
      keep_where(bits, run);
      if constexpr ((kFlags & kEpilogueClamp) != 0) bits = clamp_run(static_cast<Acc>(e.relu_end), bits, run);
      if (e.mask_out) store_mask_run(e.mask_out, offset, count, vector, bits);
    }
  }
  if constexpr ((kFlags & kEpilogueMaskIn) != 0) {
    if (e.mask_in) keep_where(load_mask_run(e.mask_in, offset, count, vector), run);
  }
  store_run(e.out + offset, count, vector, run);
}

// Host: the parameters of a launch whose groups have `out_c` output channels each.
template <class T>
EpilogueParameters<T> epilogue_parameters(const Epilogue& e, void* out, int64_t out_c) {
  EpilogueParameters<T> parameters;
  parameters.out = static_cast<T*>(out);
  parameters.scale = static_cast<const Accumulator<T>*>(e.scale);
  parameters.bias = e.bias;
  parameters.wide_bias = e.wide_bias;
  parameters.residual = static_cast<const T*>(e.residual);
  parameters.mask_out = e.mask_out;
  parameters.mask_in = e.mask_in;
  parameters.relu = e.relu;
  parameters.relu_end = std::isinf(e.relu_end) ? std::numeric_limits<float>::quiet_NaN() : e.relu_end;
  parameters.vector = out_c % 8 == 0 && is_aligned_16(out) && is_aligned_16(e.scale) && is_aligned_16(e.bias) &&
                      is_aligned_16(e.residual);
  return parameters;
}

}  // namespace freezekit
