#include "torch/backends/native_layers.h"

#include <ATen/ops/hardtanh.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/relu.h>
#include <c10/core/DeviceGuard.h>

#include "torch/backends/kernel_library.h"
#include "torch/backends/launch_log.h"
#include "torch/backends/native.h"

namespace freezekit::native {
namespace {

// Runs launch(table, stream) and writes it to the log. `others`: what is read and written beside `on`.
template <class Launch>
void run(const char* op, const char* kernel, const Tensor& on, std::initializer_list<const Tensor*> others,
         const Launch& launch) {
  const c10::DeviceGuard guard(on.device());
  const Backend backend = on.is_cpu() ? Backend::emulated : Backend::native;
  const KernelLibrary& library = kernel_library(backend);
  check_status(launch(*library.table, stream_of(on)), kernel, library);
  if (!launch_log::is_enabled()) return;
  int64_t bytes = on.nbytes();
  for (const Tensor* tensor : others) bytes += tensor->nbytes();
  launch_log::add({op, kernel, backend, {{"input_size", on.sizes().vec()}}, bytes});
}

uint32_t* words_of(const Tensor& bits) { return static_cast<uint32_t*>(bits.mutable_data_ptr()); }

}  // namespace

Tensor by_torch(const PiecewiseActivation& f, const Tensor& x) {
  if (f.kind == ActivationKind::relu) return at::relu(x);
  return f.kind == ActivationKind::hardtanh ? at::hardtanh(x, f.a, f.b) : at::leaky_relu(x, f.a);
}

void activation(const PiecewiseActivation& f, const Tensor& x, const Tensor& y, const Tensor& bits) {
  static constexpr const char* kernels[] = {"activation_relu", "activation_hardtanh", "activation_leaky_relu"};
  run("activation_bits", kernels[static_cast<int>(f.kind)], x, {&y, &bits},
      [&](const KernelTable& table, Stream stream) {
        return table.activation(f, x.const_data_ptr(), y.mutable_data_ptr(), words_of(bits), x.numel(), kernel_dtype(x),
                                stream);
      });
}

void gate(const GateRule& rule, const Tensor& x, const Tensor& bits, const Tensor& out) {
  const Gate gate{!rule.off, rule.on, rule.off.value_or(0)};
  run("gate", gate.select ? "gate_select" : "gate_scale", x, {&bits, &out},
      [&](const KernelTable& table, Stream stream) {
        return table.gate(gate, x.const_data_ptr(), static_cast<const uint32_t*>(bits.const_data_ptr()),
                          out.mutable_data_ptr(), x.numel(), kernel_dtype(x), stream);
      });
}

void pack_bytes(const Tensor& keep, const Tensor& bits) {
  run("pack_bytes", "pack_bytes", keep, {&bits}, [&](const KernelTable& table, Stream stream) {
    return table.pack_bytes(keep.const_data_ptr(), words_of(bits), keep.numel(), stream);
  });
}

void max_pool(const MaxPool& m, const Tensor& x, const Tensor& y, const Tensor& taps) {
  run("max_pool2d_taps", "max_pool", x, {&y, &taps}, [&](const KernelTable& table, Stream stream) {
    return table.max_pool(m, kernel_dtype(x), x.const_data_ptr(), y.mutable_data_ptr(), taps.mutable_data_ptr(),
                          stream);
  });
}

void max_pool_scatter(const MaxPool& m, const Tensor& dy, const Tensor& taps, const Tensor& dx) {
  run("max_pool2d_scatter", "max_pool_scatter", dy, {&taps, &dx}, [&](const KernelTable& table, Stream stream) {
    return table.max_pool_scatter(m, kernel_dtype(dy), dy.const_data_ptr(), taps.const_data_ptr(),
                                  dx.mutable_data_ptr(), stream);
  });
}

void max_pool_gather(const MaxPool& m, const Tensor& x, const Tensor& taps, const Tensor& y) {
  run("max_pool2d_gather", "max_pool_gather", x, {&taps, &y}, [&](const KernelTable& table, Stream stream) {
    return table.max_pool_gather(m, kernel_dtype(x), x.const_data_ptr(), taps.const_data_ptr(), y.mutable_data_ptr(),
                                 stream);
  });
}

}  // namespace freezekit::native
