// Jobs of small_driver.cpp for the kernels of the layers around convolutions.
#pragma once

#include <cmath>
#include <limits>

#include "tests/emulator/driver.h"

namespace layer_jobs {

using namespace freezekit;
using namespace driver;

// relu, then its bits as a select and as a scale, of a tensor with zeros in it.
template <class T>
int run_activation(DType dtype, const std::vector<int64_t>& sizes) {
  const KernelTable* table = freezekit_kernel_table();
  std::vector<double> values = random_integers(sizes[0]), scaled(values);
  std::vector<uint32_t> bits((values.size() + 31) / 32, 0);
  for (size_t i = 0; i < values.size(); i++) {
    if (values[i] > 0) bits[i / 32] |= 1u << i % 32;
    scaled[i] *= values[i] > 0 ? 2 : 0.5;
  }
  const Array<T> x(values), y(values.size()), selected(values.size()), out(values.size());
  const Array<uint32_t> words(bits.size());
  Status status = table->activation({}, x.data(), y.data(), words.data(), sizes[0], dtype, nullptr);
  if (const int failed = check_status("activation", status)) return failed;
  if (const int wrong = compare_mask("activation", words, bits)) return wrong;
  status = table->gate({}, x.data(), words.data(), selected.data(), sizes[0], dtype, nullptr);
  if (const int failed = check_status("select", status)) return failed;
  status = table->gate({false, 2, 0.5}, x.data(), words.data(), out.data(), sizes[0], dtype, nullptr);
  if (const int failed = check_status("scale", status)) return failed;
  if (const int wrong = compare("scale", out, scaled)) return wrong;
  for (double& value : values) value = value > 0 ? value : 0;
  if (const int wrong = compare("activation", y, values)) return wrong;
  return compare("select", selected, values);
}

inline int run_bytes(const std::vector<int64_t>& sizes) {
  std::vector<uint8_t> values(static_cast<size_t>(sizes[0]));
  std::vector<uint32_t> bits((values.size() + 31) / 32, 0);
  for (size_t i = 0; i < values.size(); i++) {
    values[i] = static_cast<uint8_t>(random_below(2));
    if (values[i]) bits[i / 32] |= 1u << i % 32;
  }
  const Array<uint8_t> keep(values);
  const Array<uint32_t> words(bits.size());
  const Status status = freezekit_kernel_table()->pack_bytes(keep.data(), words.data(), sizes[0], nullptr);
  if (const int failed = check_status("bytes", status)) return failed;
  return compare_mask("bytes", words, bits);
}

// Where an element of an image is in memory.
inline size_t place(const MaxPool& m, int64_t n, int64_t c, int64_t row, int64_t column, int64_t h, int64_t w) {
  return static_cast<size_t>(m.nhwc ? ((n * h + row) * w + column) * m.c + c : ((n * m.c + c) * h + row) * w + column);
}

struct Expected {
  std::vector<double> y, taps, dx;
};

// By loops over outputs, in the order of which dx is summed.
inline Expected pool(const MaxPool& m, const std::vector<double>& x, const std::vector<double>& dy) {
  const Pooling& g = m.window;
  Expected e{dy, dy, std::vector<double>(x.size(), 0.0)};
  for (int64_t n = 0; n < m.n; n++)
    for (int64_t c = 0; c < m.c; c++)
      for (int64_t p = 0; p < g.p; p++)
        for (int64_t q = 0; q < g.q; q++) {
          double best = -std::numeric_limits<double>::infinity();
          int64_t tap = 0;
          size_t from = 0;
          for (int64_t t = 0; t < g.kernel_h * g.kernel_w; t++) {
            const int64_t row = p * g.stride_h - g.pad_h + t / g.kernel_w * g.dilation_h;
            const int64_t column = q * g.stride_w - g.pad_w + t % g.kernel_w * g.dilation_w;
            if (row < 0 || row >= g.h || column < 0 || column >= g.w) continue;
            const size_t at = place(m, n, c, row, column, g.h, g.w);
            if (x[at] > best) best = x[at], tap = t, from = at;
          }
          const size_t o = place(m, n, c, p, q, g.p, g.q);
          e.y[o] = best, e.taps[o] = static_cast<double>(tap), e.dx[from] += dy[o];
        }
  return e;
}

// What is at the last tap of each window, 0 where that is outside.
inline std::vector<double> at_last_tap(const MaxPool& m, const std::vector<double>& x) {
  const Pooling& g = m.window;
  std::vector<double> y(static_cast<size_t>(m.n * m.c * g.p * g.q), 0.0);
  for (int64_t n = 0; n < m.n; n++)
    for (int64_t c = 0; c < m.c; c++)
      for (int64_t p = 0; p < g.p; p++)
        for (int64_t q = 0; q < g.q; q++) {
          const int64_t row = p * g.stride_h - g.pad_h + (g.kernel_h - 1) * g.dilation_h;
          const int64_t column = q * g.stride_w - g.pad_w + (g.kernel_w - 1) * g.dilation_w;
          if (row < 0 || row >= g.h || column < 0 || column >= g.w) continue;
          y[place(m, n, c, p, q, g.p, g.q)] = x[place(m, n, c, row, column, g.h, g.w)];
        }
  return y;
}

// n, c, h, w, kernel, stride, padding, dilation; every window has a place in the input.
template <class T>
int run_pool(DType dtype, const std::vector<int64_t>& v) {
  const auto outputs = [&](int64_t size) { return (size + 2 * v[6] - v[7] * (v[4] - 1) - 1) / v[5] + 1; };
  const KernelTable* table = freezekit_kernel_table();
  for (const bool nhwc : {false, true}) {
    MaxPool m;
    m.window = {v[2], v[3], outputs(v[2]), outputs(v[3]), v[4], v[4], v[5], v[5], v[6], v[6], v[7], v[7]};
    m.n = v[0], m.c = v[1], m.nhwc = nhwc, m.tap_bytes = 1;
    const std::vector<double> values = random_integers(m.n * m.c * v[2] * v[3]);
    const std::vector<double> grads = random_integers(m.n * m.c * m.window.p * m.window.q);
    const Expected expected = pool(m, values, grads);
    const Array<T> x(values), dy(grads), y(grads.size()), dx(values.size()), again(grads.size());
    const Array<uint8_t> taps(grads.size());
    Status status = table->max_pool(m, dtype, x.data(), y.data(), taps.data(), nullptr);
    if (const int failed = check_status("max pool", status)) return failed;
    if (const int wrong = compare("max pool", y, expected.y)) return wrong;
    const uint8_t* const made = taps.fetched();
    for (size_t i = 0; i < grads.size(); i++) {
      if (made[i] == expected.taps[i]) continue;
      std::printf("wrong value: tap %zu is %d, not %g\n", i, made[i], expected.taps[i]);
      return kWrong;
    }
    status = table->max_pool_scatter(m, dtype, dy.data(), taps.data(), dx.data(), nullptr);
    if (const int failed = check_status("scatter", status)) return failed;
    if (const int wrong = compare("scatter", dx, expected.dx)) return wrong;
    status = table->max_pool_gather(m, dtype, x.data(), taps.data(), again.data(), nullptr);
    if (const int failed = check_status("gather", status)) return failed;
    if (const int wrong = compare("gather", again, expected.y)) return wrong;
    // Taps from elsewhere: one that no window has leads nowhere, the last of a window may be outside.
    const auto last = static_cast<uint8_t>(v[4] * v[4] - 1);
    for (const uint8_t tap : {last, uint8_t{0xff}}) {
      const Array<uint8_t> elsewhere(std::vector<uint8_t>(grads.size(), tap));
      status = table->max_pool_gather(m, dtype, x.data(), elsewhere.data(), again.data(), nullptr);
      if (const int failed = check_status("gather", status)) return failed;
      const std::vector<double> zeros(grads.size(), 0.0);
      if (const int wrong = compare("gather", again, tap == last ? at_last_tap(m, values) : zeros)) return wrong;
    }
  }
  return kRight;
}

}  // namespace layer_jobs
