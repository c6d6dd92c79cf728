// The emulated kernels behind a table of which one entry can be told to fail: in one element, for some values alone, by an
// error, by a throw, for want of memory.
#include <c10/util/Exception.h>
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/api.h"

using namespace freezekit;

namespace {

std::string failing, way;
bool captured = false;
std::pair<int, int> planted;

void* real(const char* name) {
  static void* const handle = dlopen(REAL, RTLD_NOW | RTLD_LOCAL);
  return dlsym(handle, name);
}

const KernelTable& emulated() { return *reinterpret_cast<const KernelTable* (*)()>(real("freezekit_kernel_table"))(); }

// Whether `kernel` is to be wrong in this way; throws what it is told to.
bool is(const char* kernel, const char* how) {
  if (failing != kernel) return false;
  if (way == "throws") throw std::runtime_error("planted");
  if (way == "bad_alloc") throw std::bad_alloc();
  if (way == "memory") throw c10::OutOfMemoryError({__func__, __FILE__, __LINE__}, "planted");
  return way == how;
}

bool is_wrong(const char* kernel) { return is(kernel, "wrong"); }

// Wrong in tensors alone that are larger than any that a proof makes for itself.
bool is_far(const char* kernel, int64_t numel, int64_t least) { return is(kernel, "far") && numel >= least; }
constexpr int64_t kFar = 20000, kFarOutputs = 3000;

// Waits at one of the calls from now on, as where something else has the machine.
int calls_until_wait = 0;
void wait_if_told() {
  if (calls_until_wait > 0 && --calls_until_wait == 0) std::this_thread::sleep_for(std::chrono::milliseconds(500));
}

const char* said = nullptr;  // what cudaGetErrorString says of the last launch

Status refused(const char* kernel) {
  said = nullptr;
  if (failing != kernel) return Status::success;
  if (way == "full") said = "out of memory";
  if (way == "no_code") said = "no kernel image is available for execution on the device";
  if (way == "no_translation") said = "the provided PTX was compiled with an unsupported toolchain.";
  if (way == "old_driver") said = "CUDA driver version is insufficient for CUDA runtime version";
  return said || way == "refused" ? Status::launch_failed : Status::success;
}

// How this thread bears on captures elsewhere, and how often a kernel ran in which way.
thread_local CaptureMode mode = CaptureMode::global;
int runs_while[3] = {};

double get(const void* data, int64_t i, DType dtype) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[i];
  if (dtype == DType::f64) return static_cast<const double*>(data)[i];
  const uint32_t word = static_cast<const uint16_t*>(data)[i] << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

void set(void* data, int64_t i, DType dtype, double value) {
  if (dtype == DType::f32) static_cast<float*>(data)[i] = static_cast<float>(value);
  if (dtype == DType::f64) static_cast<double*>(data)[i] = value;
  if (dtype == DType::bf16) {
    const float single = static_cast<float>(value);
    uint32_t word;
    std::memcpy(&word, &single, sizeof word);
    static_cast<uint16_t*>(data)[i] = word >> 16;
  }
  if (dtype == DType::f16) static_cast<uint16_t*>(data)[i] = value == 7 ? 0x4700 : 0x4800;  // of what is planted
}

void spoil_at(void* data, int64_t i, DType dtype) {
  const bool is_seven =
      dtype == DType::f16 ? static_cast<const uint16_t*>(data)[i] == 0x4700 : get(data, i, dtype) == 7;
  set(data, i, dtype, is_seven ? 8 : 7);
}

// The last element: what is left over behind whole vectors and tiles.
void spoil(void* data, int64_t numel, DType dtype) { spoil_at(data, numel - 1, dtype); }

// Results where what was read is negative, positive or NaN.
void spoil_some(const char* kernel, const std::vector<double>& read, void* data, DType dtype) {
  const bool negative = is(kernel, "negative"), positive = is(kernel, "positive"), nan = is(kernel, "nan");
  for (size_t i = 0; i < read.size(); ++i) {
    if ((negative && read[i] < 0) || (positive && read[i] > 0) || (nan && read[i] != read[i])) {
      spoil_at(data, i, dtype);
    }
  }
}

std::vector<double> copy_of(const void* data, int64_t numel, DType dtype) {
  std::vector<double> values(numel);
  for (int64_t i = 0; i < numel; ++i) values[i] = get(data, i, dtype);
  return values;
}

// The last of equal values in place of the first.
void take_last(const MaxPool& m, DType dtype, const void* x, const void* y, void* taps) {
  const Pooling& g = m.window;
  const auto at = [&](int64_t n, int64_t c, int64_t row, int64_t column, int64_t rows, int64_t columns) {
    return m.nhwc ? ((n * rows + row) * columns + column) * m.c + c : ((n * m.c + c) * rows + row) * columns + column;
  };
  for (int64_t i = 0; i < m.n * m.c * g.p * g.q; ++i) {
    const int64_t n = i / (m.c * g.p * g.q), c = i / (g.p * g.q) % m.c, p = i / g.q % g.p, q = i % g.q;
    const int64_t to = at(n, c, p, q, g.p, g.q);
    for (int64_t t = 0; t < g.kernel_h * g.kernel_w; ++t) {
      const int64_t row = p * g.stride_h - g.pad_h + t / g.kernel_w * g.dilation_h;
      const int64_t column = q * g.stride_w - g.pad_w + t % g.kernel_w * g.dilation_w;
      if (row < 0 || row >= g.h || column < 0 || column >= g.w || m.tap_bytes != 1) continue;
      if (get(x, at(n, c, row, column, g.h, g.w), dtype) == get(y, to, dtype)) static_cast<uint8_t*>(taps)[to] = t;
    }
  }
}

// Of how many images, groups, positions and so on a convolution is: what a class leaves open.
bool is_of_its_size(Operator op, const Conv2dProblem& p) {
  const int64_t positions = p.n * p.p * p.q,
                taken_h = (p.p - 1) * p.stride_h + p.dilation_h * (p.r - 1) + 1 - 2 * p.pad_h,
                taken_w = (p.q - 1) * p.stride_w + p.dilation_w * (p.s - 1) + 1 - 2 * p.pad_w;
  const int64_t added = op == Operator::fprop ? p.c_per_group() : p.k_per_group();
  const bool depthwise = p.groups > 1 && p.c_per_group() == 1, gathers = op != Operator::wgrad;
  return (is("conv2d", "images") && p.n > 1) || (is("conv2d", "groups") && p.groups > 2) ||
         (is("conv2d", "one_tile") && gathers && positions <= 64) || (is("conv2d", "tiles") && positions > 64) ||
         (is("conv2d", "no_rows_left") && p.h == taken_h) || (is("conv2d", "rows_left") && p.h > taken_h) ||
         (is("conv2d", "no_columns_left") && p.w == taken_w) || (is("conv2d", "columns_left") && p.w > taken_w) ||
         (is("conv2d", "multiplier") && depthwise && p.k > p.c) ||
         (is("conv2d", "no_multiplier") && depthwise && p.k == p.c) ||
         (is("conv2d", "short_sums") && gathers && added <= 8) || (is("conv2d", "long_sums") && gathers && added > 16);
}

// Whether a convolution is wrong where its numbers of channels are odd ones, its memory is, its bias or that it has none, its
// padding, or the slices of its sum; or where positions or channels are left over behind whole tiles.
bool is_by_the_way(Operator op, const Conv2dProblem& p, const Selection& s, const Conv2dTensors& t, const Epilogue& e) {
  const auto is_odd = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 != 0; };
  const bool depthwise = p.groups > 1 && p.c_per_group() == 1;
  return (is("conv2d", "channels") && (p.c_per_group() % 8 != 0 || p.k_per_group() % 8 != 0)) ||
         (is("conv2d", "rest_of_positions") && p.n * p.p * p.q % 16 != 0) ||
         (is("conv2d", "rest_of_inputs") && (depthwise ? p.c : p.c_per_group()) % 16 != 0) ||
         (is("conv2d", "rest_of_outputs") && p.k_per_group() % 16 != 0) || (is("conv2d", "slices") && s.split_k > 1) ||
         (is("conv2d", "biased") && e.bias) || (is("conv2d", "unbiased") && op == Operator::fprop && !e.bias) ||
         (is("conv2d", "padded") && (p.pad_h > 0 || p.pad_w > 0)) ||
         (is("conv2d", "unaligned") && (is_odd(t.x) || is_odd(t.filter) || is_odd(t.y) || is_odd(e.bias)));
}

// The first product of both operands once more in the last sum, unless it is a whole number: no values of a proof's own
// show it.
void add_term(const void* a, const void* b, void* out, int64_t last, DType dtype) {
  const double term = get(a, 0, dtype) * get(b, 0, dtype);
  if (term != std::round(term)) set(out, last, dtype, get(out, last, dtype) + term);
}

Status conv2d(Operator op, const Selection& s, const Conv2dProblem& p, DType dtype, const Conv2dTensors& t,
              const Epilogue& e, void* workspace, Stream stream) {
  const char* const name = op == Operator::fprop ? "fprop" : op == Operator::dgrad ? "dgrad" : "wgrad";
  const bool wrong = is_wrong("conv2d") || is_wrong(name),
             nonzero = is("conv2d", "nonzero") || (is("conv2d", "many_slices") && s.split_k >= kManySlices),
             moved = is("conv2d", "moved");
  Status status = emulated().conv2d(op, s, p, dtype, t, e, workspace, stream);
  wait_if_told();
  void* const out = op == Operator::fprop ? t.y : op == Operator::dgrad ? t.x : t.filter;
  const int64_t last = (op == Operator::fprop   ? p.y_numel()
                        : op == Operator::dgrad ? p.x_numel()
                                                : p.filter_numel()) -
                       1;
  if (wrong || is_by_the_way(op, p, s, t, e) || is_of_its_size(op, p)) spoil_at(out, last, dtype);
  for (int64_t i = last; nonzero && i >= 0; --i) set(out, i, dtype, 2 * get(out, i, dtype));
  if (moved && op == Operator::fprop) set(out, last, dtype, get(out, last - p.k, dtype));  // another pixel's
  if (is("conv2d", "term")) {
    add_term(op == Operator::dgrad ? t.y : t.x, op == Operator::wgrad ? t.y : t.filter, out, last, dtype);
  }
  if (is_wrong("conv2d_mask") && e.mask_out) *e.mask_out ^= 1;
  return status == Status::success ? refused("conv2d") : status;
}

Status activation(const PiecewiseActivation& f, const void* x, void* y, uint32_t* bits, int64_t numel, DType dtype,
                  Stream stream) {
  ++runs_while[static_cast<int>(mode)];
  const auto read = failing == "activation" ? copy_of(x, numel, dtype) : std::vector<double>();
  Status status = emulated().activation(f, x, y, bits, numel, dtype, stream);
  if (is_wrong("activation") || is_far("activation", numel, kFar)) spoil(y, numel, dtype);
  spoil_some("activation", read, y, dtype);
  if (is_wrong("bits")) bits[(numel - 1) / 32] ^= 1u << (numel - 1) % 32;
  if (f.kind == ActivationKind::leaky_relu && is_wrong("leaky_relu")) spoil(y, numel, dtype);
  return status == Status::success ? refused("activation") : status;
}

Status gate(const Gate& g, const void* x, const uint32_t* bits, void* out, int64_t numel, DType dtype, Stream stream) {
  const auto read = failing == "gate" ? copy_of(x, numel, dtype) : std::vector<double>();
  Status status = emulated().gate(g, x, bits, out, numel, dtype, stream);
  if (is_wrong("gate") || is_far("gate", numel, kFar)) spoil(out, numel, dtype);
  spoil_some("gate", read, out, dtype);
  return status;
}

Status pack_bytes(const void* keep, uint32_t* bits, int64_t numel, Stream stream) {
  Status status = emulated().pack_bytes(keep, bits, numel, stream);
  if (is_wrong("pack_bytes") || is_far("pack_bytes", numel, kFar)) bits[(numel - 1) / 32] ^= 1u << (numel - 1) % 32;
  return status;
}

Status max_pool(const MaxPool& m, DType dtype, const void* x, void* y, void* taps, Stream stream) {
  Status status = emulated().max_pool(m, dtype, x, y, taps, stream);
  // A tap of a window far larger than most: it is of more than one byte.
  if (is_wrong("wide_pool") && m.tap_bytes > 1) std::memset(taps, 0x7f, m.tap_bytes);
  if (is("max_pool", "ties")) take_last(m, dtype, x, y, taps);
  spoil_some("max_pool",
             failing == "max_pool" ? copy_of(y, m.n * m.c * m.window.p * m.window.q, dtype) : std::vector<double>(), y,
             dtype);
  const int64_t outputs = m.n * m.c * m.window.p * m.window.q;
  if (is_wrong("max_pool") || is_far("max_pool", outputs, kFarOutputs)) spoil(y, outputs, dtype);
  return status;
}

Status max_pool_scatter(const MaxPool& m, DType dtype, const void* dy, const void* taps, void* dx, Stream stream) {
  Status status = emulated().max_pool_scatter(m, dtype, dy, taps, dx, stream);
  if (is_wrong("scatter") || is_far("scatter", m.n * m.c * m.window.p * m.window.q, kFarOutputs))
    spoil(dx, m.n * m.c * m.window.h * m.window.w, dtype);
  return status;
}

}  // namespace

extern "C" const char* freezekit_last_error() {
  if (said) return said;
  return reinterpret_cast<const char* (*)()>(real("freezekit_last_error"))();
}

extern "C" size_t freezekit_kernel_table_bytes() { return sizeof(KernelTable); }

extern "C" const KernelTable* freezekit_kernel_table() {
  static KernelTable table = emulated();
  table.conv2d = conv2d, table.activation = activation, table.gate = gate, table.pack_bytes = pack_bytes;
  table.max_pool = max_pool, table.max_pool_scatter = max_pool_scatter;
  table.capturing = [](Stream) { return captured; };
  table.target = [](Target* target) {
    const Status status = emulated().target(target);
    if (const Status failed = refused("target"); failed != Status::success) return failed;
    if (planted.first) target->sm = planted.first, target->sm_count = planted.second;
    target->has_code = target->sm >= 80;  // as a build for 80;90a
    return status;
  };
  table.exchange_capture_mode = [](CaptureMode now) { return std::exchange(mode, now); };
  return &table;
}

// Activations that ran while this thread had that mode (0 to 2), since the last call; 3: the mode that it has now.
extern "C" int capture_mode(int which) {
  return which == 3 ? static_cast<int>(mode) : std::exchange(runs_while[which], 0);
}

extern "C" void set_capturing(int is) { captured = is; }

// The convolution's call that takes half a second, counted from 1; 0: none.
extern "C" void set_wait(int call) { calls_until_wait = call; }

// What the device is from now on; 0: the emulator's own.
extern "C" void set_device(int sm, int sm_count) { planted = {sm, sm_count}; }

// 0 where both are known.
extern "C" int set_fault(const char* kernel, const char* how) {
  failing = kernel, way = how;
  const auto knows = [](std::initializer_list<const char*> names, const std::string& name) {
    return std::find(names.begin(), names.end(), name) != names.end();
  };
  const bool known = knows({"", "conv2d", "fprop", "dgrad", "wgrad", "conv2d_mask", "activation", "bits", "leaky_relu",
                            "gate", "pack_bytes", "max_pool", "wide_pool", "scatter", "target"},
                           failing) &&
                     knows({"",
                            "wrong",
                            "throws",
                            "memory",
                            "bad_alloc",
                            "refused",
                            "negative",
                            "positive",
                            "nan",
                            "ties",
                            "nonzero",
                            "moved",
                            "term",
                            "far",
                            "full",
                            "no_code",
                            "no_translation",
                            "old_driver",
                            "channels",
                            "slices",
                            "biased",
                            "unbiased",
                            "padded",
                            "unaligned",
                            "rest_of_positions",
                            "rest_of_inputs",
                            "rest_of_outputs",
                            "images",
                            "groups",
                            "one_tile",
                            "tiles",
                            "no_rows_left",
                            "rows_left",
                            "no_columns_left",
                            "columns_left",
                            "multiplier",
                            "no_multiplier",
                            "short_sums",
                            "long_sums",
                            "many_slices"},
                           way);
  return known ? 0 : 1;
}
