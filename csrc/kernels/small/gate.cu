// Activations that are linear in pieces, and gates: one bit per element (core/mask.h) says which piece it is on.
//
//   activation:  y[i] = rule.value(x[i]),  bit[i] = rule.bit(x[i])
//   gate:        out[i] = bit[i] ? on * x[i] : off * x[i],  or exactly x[i] and 0 (a select, which stops NaN and inf)
//   pack bytes:  bit[i] = keep[i] != 0
//
// A thread takes a run of eight elements, which owns a byte of the mask: nothing is zeroed before, and where addresses are
// multiples of 16 a run is one or two accesses of 16 bytes (four for f64). Reads are over before a run is written, so x
// and y, x and out may be one tensor.
#include <algorithm>

#include "core/mask.h"
#include "kernels/families.h"
#include "kernels/numeric.h"

namespace freezekit {
namespace {

constexpr int kThreads = 256;
constexpr int kRun = 8;
constexpr int64_t kMaxBlocks = 65535;

dim3 grid_for(int64_t runs) { return dim3(static_cast<unsigned>(std::min(ceil_div(runs, kThreads), kMaxBlocks))); }

FK_DEVICE int64_t first_run() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }
FK_DEVICE int64_t run_count() { return static_cast<int64_t>(gridDim.x) * kThreads; }

// Elements of a run that are in a tensor of numel; none for a run behind its end.
FK_DEVICE int count_of(int64_t run, int64_t numel) {
  const int64_t left = numel - run * kRun;
  return left >= kRun ? kRun : left > 0 ? static_cast<int>(left) : 0;
}

// Zeros behind the end of the tensor.
template <class T>
FK_DEVICE void load_run(const T* p, int count, bool aligned, T (&values)[kRun]) {
  if (aligned && count == kRun) return load8(p, values);
#pragma unroll
  for (int i = 0; i < kRun; ++i) values[i] = i < count ? load_global(p + i) : cast<T>(0.0f);
}

template <class T>
FK_DEVICE void store_run(T* p, int count, bool aligned, const T (&values)[kRun]) {
  if (aligned && count == kRun) return store8(p, values);
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    if (i < count) store_global(p + i, values[i]);
  }
}

// Comparisons send NaN where torch's kernels for GPUs do: through relu, into leaky_relu's slope, and through hardtanh's.
template <class A>
struct Relu {
  FK_DEVICE bool bit(A x) const { return !(x <= A(0)); }
  FK_DEVICE A value(A x) const { return x <= A(0) ? A(0) : x; }
};

template <class A>
struct LeakyRelu {
  A slope;
  FK_DEVICE bool bit(A x) const { return x > A(0); }
  FK_DEVICE A value(A x) const { return x > A(0) ? x : x * slope; }
};

// The ends of values are rounded to the tensor's dtype, those of the gradient are not: so torch does it.
template <class A>
struct Hardtanh {
  A lowest, highest;
  A below, above;
  FK_DEVICE bool bit(A x) const { return !(x <= below || x >= above); }
  FK_DEVICE A value(A x) const {
    const A raised = x < lowest ? lowest : x;
    return raised > highest ? highest : raised;
  }
};

template <class T, class Rule>
__global__ void __launch_bounds__(kThreads)
    activation_kernel(const T* x, T* y, uint8_t* bits, int64_t numel, int64_t runs, bool aligned, Rule rule) {
  for (int64_t run = first_run(); run < runs; run += run_count()) {
    const int count = count_of(run, numel);
    T values[kRun];
    load_run(x + run * kRun, count, aligned, values);
    unsigned byte = 0;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const Accumulator<T> value = cast<Accumulator<T>>(values[i]);
      byte |= rule.bit(value) ? 1u << i : 0u;
      values[i] = cast<T>(rule.value(value));
    }
    store_run(y + run * kRun, count, aligned, values);
    store_global(bits + run, static_cast<uint8_t>(byte & ((1u << count) - 1)));
  }
}

template <class T, bool kSelect>
__global__ void __launch_bounds__(kThreads)
    gate_kernel(const T* x, const uint8_t* bits, T* out, int64_t numel, int64_t runs, bool aligned, Accumulator<T> on,
                Accumulator<T> off) {
  for (int64_t run = first_run(); run < runs; run += run_count()) {
    const int count = count_of(run, numel);
    const unsigned byte = load_global(bits + run);
    T values[kRun];
    load_run(x + run * kRun, count, aligned, values);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const bool keep = byte >> i & 1u;
      if constexpr (kSelect) {
        values[i] = keep ? values[i] : cast<T>(0.0f);
      } else {
        values[i] = cast<T>(cast<Accumulator<T>>(values[i]) * (keep ? on : off));
      }
    }
    store_run(out + run * kRun, count, aligned, values);
  }
}

__global__ void __launch_bounds__(kThreads)
    pack_bytes_kernel(const uint8_t* __restrict__ keep, uint8_t* __restrict__ bits, int64_t numel, int64_t runs) {
  for (int64_t run = first_run(); run < runs; run += run_count()) {
    const int count = count_of(run, numel);
    unsigned byte = 0;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (i < count) byte |= load_global(keep + run * kRun + i) ? 1u << i : 0u;
    }
    store_global(bits + run, static_cast<uint8_t>(byte));
  }
}

// Runs that fill all words of a mask: bits behind the last element are 0.
int64_t runs_of_mask(int64_t numel) { return mask_words(numel) * 4; }

template <class T, class Rule>
Status launch_rule(const Rule& rule, const void* x, void* y, uint32_t* bits, int64_t numel, Stream stream) {
  const int64_t runs = runs_of_mask(numel);
  return FK_LAUNCH(activation_kernel<T, Rule>, grid_for(runs), dim3(kThreads), 0, stream, static_cast<const T*>(x),
                   static_cast<T*>(y), reinterpret_cast<uint8_t*>(bits), numel, runs,
                   is_aligned_16(x) && is_aligned_16(y), rule);
}

}  // namespace

Status launch_activation(const PiecewiseActivation& f, const void* x, void* y, uint32_t* bits, int64_t numel,
                         DType dtype, Stream stream) {
  if (numel == 0) return Status::success;
  if (numel < 0 || !x || !y || !bits) return Status::invalid_argument;
  return dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Accumulator<T>;
    const A a = static_cast<A>(f.a), b = static_cast<A>(f.b);
    switch (f.kind) {
      case ActivationKind::relu:
        return launch_rule<T>(Relu<A>{}, x, y, bits, numel, stream);
      case ActivationKind::hardtanh:
        return launch_rule<T>(Hardtanh<A>{cast<A>(cast<T>(a)), cast<A>(cast<T>(b)), a, b}, x, y, bits, numel, stream);
      case ActivationKind::leaky_relu:
        return launch_rule<T>(LeakyRelu<A>{a}, x, y, bits, numel, stream);
    }
    return Status::invalid_argument;
  });
}

Status launch_gate(const Gate& gate, const void* x, const uint32_t* bits, void* out, int64_t numel, DType dtype,
                   Stream stream) {
  if (numel == 0) return Status::success;
  if (numel < 0 || !x || !bits || !out) return Status::invalid_argument;
  const int64_t runs = ceil_div(numel, kRun);
  return dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto kernel = gate.select ? gate_kernel<T, true> : gate_kernel<T, false>;
    return FK_LAUNCH(kernel, grid_for(runs), dim3(kThreads), 0, stream, static_cast<const T*>(x),
                     reinterpret_cast<const uint8_t*>(bits), static_cast<T*>(out), numel, runs,
                     is_aligned_16(x) && is_aligned_16(out), gate.on, gate.off);
  });
}

Status launch_pack_bytes(const void* keep, uint32_t* bits, int64_t numel, Stream stream) {
  if (numel == 0) return Status::success;
  if (numel < 0 || !keep || !bits) return Status::invalid_argument;
  const int64_t runs = runs_of_mask(numel);
  return FK_LAUNCH(pack_bytes_kernel, grid_for(runs), dim3(kThreads), 0, stream, static_cast<const uint8_t*>(keep),
                   reinterpret_cast<uint8_t*>(bits), numel, runs);
}

}  // namespace freezekit
