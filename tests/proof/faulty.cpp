// The emulated kernels behind a table of which one entry can be told to fail: in one element, by an error, by a throw, for
// want of memory.
#include <dlfcn.h>

#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "kernels/api.h"

using namespace freezekit;

namespace {

std::string failing, way;
bool captured = false;

void* real(const char* name) {
  static void* const handle = dlopen(REAL, RTLD_NOW | RTLD_LOCAL);
  return dlsym(handle, name);
}

const KernelTable& emulated() { return *reinterpret_cast<const KernelTable* (*)()>(real("freezekit_kernel_table"))(); }

// Whether `kernel` is to give one wrong element; throws what it is told to.
bool is_wrong(const char* kernel) {
  if (failing != kernel) return false;
  if (way == "throws") throw std::runtime_error("planted");
  if (way == "memory") throw std::bad_alloc();
  return way == "wrong";
}

Status refused(const char* kernel) {
  return failing == kernel && way == "refused" ? Status::launch_failed : Status::success;
}

// The last element: what is left over behind whole vectors and tiles.
void spoil(void* data, int64_t numel, DType dtype) {
  if (dtype == DType::f32) static_cast<float*>(data)[numel - 1] += 0.25f;
  if (dtype == DType::f64) static_cast<double*>(data)[numel - 1] += 0.25;
  if (dtype == DType::bf16) static_cast<uint16_t*>(data)[numel - 1] ^= 0x40;
}

Status conv2d(Operator op, const Selection& s, const Conv2dProblem& p, DType dtype, const Conv2dTensors& t,
              const Epilogue& e, void* workspace, Stream stream) {
  const bool wrong = is_wrong("conv2d");
  Status status = emulated().conv2d(op, s, p, dtype, t, e, workspace, stream);
  if (wrong && op == Operator::fprop) spoil(t.y, p.y_numel(), dtype);
  if (wrong && op == Operator::dgrad) spoil(t.x, p.x_numel(), dtype);
  if (wrong && op == Operator::wgrad) spoil(t.filter, p.filter_numel(), dtype);
  if (is_wrong("conv2d_mask") && e.mask_out) *e.mask_out ^= 1;
  return status == Status::success ? refused("conv2d") : status;
}

Status activation(const PiecewiseActivation& f, const void* x, void* y, uint32_t* bits, int64_t numel, DType dtype,
                  Stream stream) {
  Status status = emulated().activation(f, x, y, bits, numel, dtype, stream);
  if (is_wrong("activation")) spoil(y, numel, dtype);
  if (is_wrong("bits")) bits[(numel - 1) / 32] ^= 1u << (numel - 1) % 32;
  if (f.kind == ActivationKind::leaky_relu && is_wrong("leaky_relu")) spoil(y, numel, dtype);
  return status == Status::success ? refused("activation") : status;
}

Status gate(const Gate& g, const void* x, const uint32_t* bits, void* out, int64_t numel, DType dtype, Stream stream) {
  Status status = emulated().gate(g, x, bits, out, numel, dtype, stream);
  if (is_wrong("gate")) spoil(out, numel, dtype);
  return status;
}

Status pack_bytes(const void* keep, uint32_t* bits, int64_t numel, Stream stream) {
  Status status = emulated().pack_bytes(keep, bits, numel, stream);
  if (is_wrong("pack_bytes")) bits[(numel - 1) / 32] ^= 1u << (numel - 1) % 32;
  return status;
}

Status max_pool(const MaxPool& m, DType dtype, const void* x, void* y, void* taps, Stream stream) {
  Status status = emulated().max_pool(m, dtype, x, y, taps, stream);
  // A tap of a window far larger than most: it is of more than one byte.
  if (is_wrong("wide_pool") && m.tap_bytes > 1) std::memset(taps, 0x7f, m.tap_bytes);
  if (is_wrong("max_pool")) spoil(y, m.n * m.c * m.window.p * m.window.q, dtype);
  return status;
}

Status max_pool_scatter(const MaxPool& m, DType dtype, const void* dy, const void* taps, void* dx, Stream stream) {
  Status status = emulated().max_pool_scatter(m, dtype, dy, taps, dx, stream);
  if (is_wrong("scatter")) spoil(dx, m.n * m.c * m.window.h * m.window.w, dtype);
  return status;
}

}  // namespace

extern "C" const char* freezekit_last_error() {
  return reinterpret_cast<const char* (*)()>(real("freezekit_last_error"))();
}

extern "C" const KernelTable* freezekit_kernel_table() {
  static KernelTable table = emulated();
  table.conv2d = conv2d, table.activation = activation, table.gate = gate, table.pack_bytes = pack_bytes;
  table.max_pool = max_pool, table.max_pool_scatter = max_pool_scatter;
  table.capturing = [](Stream) { return captured; };
  return &table;
}

extern "C" void set_capturing(int is) { captured = is; }

// 0 where both are known.
extern "C" int set_fault(const char* kernel, const char* how) {
  failing = kernel, way = how;
  for (const char* known : {"", "conv2d", "conv2d_mask", "activation", "bits", "leaky_relu", "gate", "pack_bytes",
                            "max_pool", "wide_pool", "scatter"}) {
    if (failing == known)
      return way.empty() || way == "wrong" || way == "throws" || way == "memory" || way == "refused" ? 0 : 1;
  }
  return 1;
}
