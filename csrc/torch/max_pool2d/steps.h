// What computes max pooling on tensors with data, once sizes are checked and results allocated.
#pragma once

#include <cstdint>

#include "cpu/max_pool.h"
#include "torch/max_pool2d/max_pool2d.h"

namespace freezekit::max_pool {

// Of n volumes of c channels, or of as many images.
struct CpuPool {
  cpu::Pooling3d window;
  int64_t n = 0, c = 0;
  bool channels_last = false;

  CpuPool(const cpu::Pooling3d& window, int64_t n, int64_t c, bool channels_last)
      : window(window), n(n), c(c), channels_last(channels_last) {}
  CpuPool(const MaxPool& m) : CpuPool({m.window}, m.n, m.c, m.nhwc) {}
};

// Calls f with a value of the type that taps have: see Windows::tap_type.
template <class F>
void for_tap_type(at::ScalarType type, const F& f) {
  if (type == at::kByte) return f(uint8_t());
  if (type == at::kShort) return f(int16_t());
  f(int32_t());
}

// x, y, taps (dy, taps, dx) dense and all of the layout that CpuPool says; dx holds zeros.
void forward_cpu(const CpuPool&, const Tensor& x, const Tensor& y, const Tensor& taps);
void scatter_cpu(const CpuPool&, const Tensor& dy, const Tensor& taps, const Tensor& dx);
void gather_cpu(const CpuPool&, const Tensor& x, const Tensor& taps, const Tensor& y);

Tensor scatter_by_aten(const Tensor& dy, const Tensor& taps, SymIntArrayRef input_size, const PoolGeometry&);
Tensor gather_by_aten(const Tensor& x, const Tensor& taps, const PoolGeometry&);

}  // namespace freezekit::max_pool
