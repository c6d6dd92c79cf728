// Max pooling (core/pooling.h) that remembers the tap of each output, and the two linear maps that taps define.
//
//   max_pool:  y[o] = x[where tap[o] is], the largest of o's window
//   scatter:   dx[i] = sum of dy[o] over the outputs o whose tap is at i       (the gradient)
//   gather:    y[o] = x[where tap[o] is], 0 where that is outside              (the gradient's gradient)
//
// The scatter runs as a gather: a thread has an element of dx and asks the outputs whose windows hold it, in the order of
// (p, q). So there are no atomics, no zeroing, and one order of each sum. NHWC or NCHW, dense; no alignment beyond the
// element's. A thread has one element of the result, neighbours in memory: an image's indices fit 32 bits.
#include <algorithm>
#include <cmath>

#include "core/fast_divide.h"
#include "core/pooling.h"
#include "kernels/families.h"
#include "kernels/numeric.h"

namespace freezekit {
namespace {

constexpr int kThreads = 256;

struct Place {
  int32_t c, row, column;
};

// A dense C x H x W image, by its index in memory.
struct Image {
  FastDivide inner, middle;  // by the sizes of the two innermost dimensions
  bool nhwc;
  int32_t h, w, step_c, step_row, step_column;
  int64_t count;

  Image(int64_t c, int64_t h, int64_t w, bool nhwc)
      : inner(static_cast<int32_t>(nhwc ? c : w)), middle(static_cast<int32_t>(nhwc ? w : h)), nhwc(nhwc),
        h(static_cast<int32_t>(h)), w(static_cast<int32_t>(w)), step_c(static_cast<int32_t>(nhwc ? 1 : h * w)),
        step_row(static_cast<int32_t>(nhwc ? w * c : w)), step_column(static_cast<int32_t>(nhwc ? c : 1)),
        count(c * h * w) {}

  FK_DEVICE Place place(int32_t index) const {
    int32_t fast, slow;
    const int32_t outer = middle.divide(inner.divide(index, &fast), &slow);
    return nhwc ? Place{fast, outer, slow} : Place{outer, slow, fast};
  }
  FK_DEVICE int32_t index(const Place& at) const { return at.c * step_c + at.row * step_row + at.column * step_column; }
};

// One axis of the windows.
struct Axis {
  FastDivide by_step, by_dilation;
  int32_t step, kernel, pad, dilation;

  Axis(int64_t stride, int64_t kernel, int64_t pad, int64_t dilation)
      : by_step(static_cast<int32_t>(stride)), by_dilation(static_cast<int32_t>(dilation)),
        step(static_cast<int32_t>(stride)), kernel(static_cast<int32_t>(kernel)), pad(static_cast<int32_t>(pad)),
        dilation(static_cast<int32_t>(dilation)) {}

  FK_DEVICE int32_t origin(int32_t output) const { return output * step - pad; }
  // f(output, tap) for the outputs, in ascending order, of which a tap is at `input`: however many taps there are.
  template <class F>
  FK_DEVICE void for_each_output(int32_t input, int32_t outputs, const F& f) const {
    const int32_t end = input + pad, last_tap = end - (kernel - 1) * dilation;
    int32_t output = last_tap > 0 ? by_step.quotient(last_tap + step - 1) : 0;
    for (int32_t from = end - output * step; from >= 0 && output < outputs; from -= step, ++output) {
      int32_t rest;
      const int32_t tap = by_dilation.divide(from, &rest);
      if (rest == 0) f(output, tap);
    }
  }
};

struct Windows {
  int64_t images;
  Image in, out;
  Axis row, column;
  FastDivide by_kernel_w;  // of taps
};

// f(image, index in it) for every element of `images` images of `count`.
template <class F>
FK_DEVICE void for_each_element(int64_t images, int64_t count, const F& f) {
  for (int64_t image = blockIdx.y; image < images; image += gridDim.y) {
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
         i += static_cast<int64_t>(gridDim.x) * kThreads) {
      f(image, static_cast<int32_t>(i));
    }
  }
}

template <class T, class Tap>
__global__ void __launch_bounds__(kThreads)
    max_pool_kernel(const T* __restrict__ x, T* __restrict__ y, Tap* __restrict__ taps, Windows g) {
  for_each_element(g.images, g.out.count, [&](int64_t image, int32_t index) {
    const Place to = g.out.place(index);
    const int32_t top = g.row.origin(to.row), left = g.column.origin(to.column);
    const TapRange<int32_t> rows(top, g.in.h, g.row.kernel, g.row.dilation);
    const TapRange<int32_t> columns(left, g.in.w, g.column.kernel, g.column.dilation);
    const T* const plane = x + image * g.in.count + to.c * g.in.step_c;
    Accumulator<T> best = -static_cast<Accumulator<T>>(INFINITY);
    int32_t tap = rows.first * g.column.kernel + columns.first;
    for (int32_t r = rows.first; r < rows.last; ++r) {
      for (int32_t s = columns.first; s < columns.last; ++s) {
        const Accumulator<T> value = cast<Accumulator<T>>(load_global(
            plane + (top + r * g.row.dilation) * g.in.step_row + (left + s * g.column.dilation) * g.in.step_column));
        if (value > best || value != value) {
          best = value;
          tap = r * g.column.kernel + s;
        }
      }
    }
    store_global(y + image * g.out.count + index, cast<T>(best));
    store_global(taps + image * g.out.count + index, static_cast<Tap>(tap));
  });
}

template <class T, class Tap>
__global__ void __launch_bounds__(kThreads)
    max_pool_scatter_kernel(const T* __restrict__ dy, const Tap* __restrict__ taps, T* __restrict__ dx, Windows g) {
  for_each_element(g.images, g.in.count, [&](int64_t image, int32_t index) {
    const Place at = g.in.place(index);
    const int64_t outputs = image * g.out.count + at.c * g.out.step_c;
    Accumulator<T> sum = 0;
    g.row.for_each_output(at.row, g.out.h, [&](int32_t p, int32_t r) {
      g.column.for_each_output(at.column, g.out.w, [&](int32_t q, int32_t s) {
        const int64_t o = outputs + p * g.out.step_row + q * g.out.step_column;
        if (load_global(taps + o) == static_cast<Tap>(r * g.column.kernel + s)) {
          sum += cast<Accumulator<T>>(load_global(dy + o));
        }
      });
    });
    store_global(dx + image * g.in.count + index, cast<T>(sum));
  });
}

template <class T, class Tap>
__global__ void __launch_bounds__(kThreads)
    max_pool_gather_kernel(const T* __restrict__ x, const Tap* __restrict__ taps, T* __restrict__ y, Windows g) {
  for_each_element(g.images, g.out.count, [&](int64_t image, int32_t index) {
    const Place to = g.out.place(index);
    const int64_t o = image * g.out.count + index;
    const int32_t tap = static_cast<int32_t>(load_global(taps + o));
    // Taps may be any numbers: none leads out of the input.
    const bool is_one = tap >= 0 && tap < g.row.kernel * g.column.kernel;
    int32_t s;
    const int32_t r = g.by_kernel_w.divide(is_one ? tap : 0, &s);
    const int32_t row = g.row.origin(to.row) + r * g.row.dilation;
    const int32_t column = g.column.origin(to.column) + s * g.column.dilation;
    const bool inside = is_one && row >= 0 && row < g.in.h && column >= 0 && column < g.in.w;
    store_global(y + o, inside ? load_global(x + image * g.in.count + g.in.index({to.c, row, column})) : cast<T>(0.0f));
  });
}

Windows windows_of(const MaxPool& m) {
  const Pooling& g = m.window;
  return {m.n,
          Image(m.c, g.h, g.w, m.nhwc),
          Image(m.c, g.p, g.q, m.nhwc),
          Axis(g.stride_h, g.kernel_h, g.pad_h, g.dilation_h),
          Axis(g.stride_w, g.kernel_w, g.pad_w, g.dilation_w),
          FastDivide(static_cast<int32_t>(g.kernel_w))};
}

// f(TypeTag<T>(), TypeTag<Tap>(), windows, grid over the elements of the result)
template <class F>
Status dispatch(const MaxPool& m, bool over_input, DType dtype, const F& f) {
  if (!fits_int32(m)) return Status::invalid_argument;
  const Windows windows = windows_of(m);
  const int64_t count = over_input ? windows.in.count : windows.out.count;
  if (m.n * count == 0) return Status::success;
  const dim3 grid(static_cast<unsigned>(ceil_div(count, kThreads)), static_cast<unsigned>(std::min(m.n, kMaxGridYZ)));
  return dispatch_dtype(dtype, [&](auto element) {
    if (m.tap_bytes == 1) return f(element, TypeTag<uint8_t>(), windows, grid);
    if (m.tap_bytes == 2) return f(element, TypeTag<int16_t>(), windows, grid);
    if (m.tap_bytes == 4) return f(element, TypeTag<int32_t>(), windows, grid);
    return Status::invalid_argument;
  });
}

}  // namespace

Status launch_max_pool(const MaxPool& m, DType dtype, const void* x, void* y, void* taps, Stream stream) {
  return dispatch(m, false, dtype, [&](auto element, auto tap, const Windows& windows, dim3 grid) {
    using T = typename decltype(element)::type;
    using Tap = typename decltype(tap)::type;
    if (!y || !taps || (!x && windows.in.count > 0)) return Status::invalid_argument;
    return FK_LAUNCH(max_pool_kernel<T, Tap>, grid, dim3(kThreads), 0, stream, static_cast<const T*>(x),
                     static_cast<T*>(y), static_cast<Tap*>(taps), windows);
  });
}

Status launch_max_pool_scatter(const MaxPool& m, DType dtype, const void* dy, const void* taps, void* dx,
                               Stream stream) {
  return dispatch(m, true, dtype, [&](auto element, auto tap, const Windows& windows, dim3 grid) {
    using T = typename decltype(element)::type;
    using Tap = typename decltype(tap)::type;
    if (!dx || ((!dy || !taps) && windows.out.count > 0)) return Status::invalid_argument;
    return FK_LAUNCH(max_pool_scatter_kernel<T, Tap>, grid, dim3(kThreads), 0, stream, static_cast<const T*>(dy),
                     static_cast<const Tap*>(taps), static_cast<T*>(dx), windows);
  });
}

Status launch_max_pool_gather(const MaxPool& m, DType dtype, const void* x, const void* taps, void* y, Stream stream) {
  return dispatch(m, false, dtype, [&](auto element, auto tap, const Windows& windows, dim3 grid) {
    using T = typename decltype(element)::type;
    using Tap = typename decltype(tap)::type;
    if (!y || !taps || (!x && windows.in.count > 0)) return Status::invalid_argument;
    return FK_LAUNCH(max_pool_gather_kernel<T, Tap>, grid, dim3(kThreads), 0, stream, static_cast<const T*>(x),
                     static_cast<const Tap*>(taps), static_cast<T*>(y), windows);
  });
}

}  // namespace freezekit
