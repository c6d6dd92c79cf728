// A C face of the kernels for ctypes: flat arguments in, the status out, the workspace allocated here.
#include <cstdlib>
#include <cstring>

#include "kernels/api.h"

using namespace freezekit;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Exactly as large as asked for, so that a sanitizer sees the first byte beyond it, and full of NaN.
class Workspace {
 public:
  explicit Workspace(size_t bytes) : data_(bytes ? std::aligned_alloc(256, (bytes + 255) / 256 * 256) : nullptr) {
    if (data_) std::memset(data_, 0xff, bytes);
  }
  ~Workspace() { std::free(data_); }
  void* data() const { return data_; }

 private:
  void* data_;
};

Conv2dProblem problem_of(const int64_t* v) {
  Conv2dProblem p;
  p.n = v[0], p.c = v[1], p.h = v[2], p.w = v[3], p.k = v[4], p.r = v[5], p.s = v[6], p.p = v[7], p.q = v[8];
  p.pad_h = v[9], p.pad_w = v[10], p.stride_h = v[11], p.stride_w = v[12], p.dilation_h = v[13], p.dilation_w = v[14];
  p.groups = v[15];
  return p;
}

Target target_of(const int* settings) {
  Target target;
  target.sm = settings[0], target.sm_count = settings[1];
  target.allow_tf32 = settings[2], target.deterministic = settings[3];
  target.hopper = settings[4];
  return target;
}

}  // namespace

// sizes and settings as below; numbers: family, config, split_k, workspace bytes.
EXPORT void driver_select(int op, int dtype, const int64_t* sizes, const int* settings, int64_t* numbers,
                          const char** kernel, const char** reason) {
  const Selection selection =
      select(static_cast<Operator>(op), problem_of(sizes), static_cast<DType>(dtype), target_of(settings));
  numbers[0] = static_cast<int64_t>(selection.family), numbers[1] = selection.config;
  numbers[2] = selection.split_k, numbers[3] = static_cast<int64_t>(selection.workspace_bytes);
  *kernel = selection.kernel, *reason = selection.reason;
}

// settings: sm, sm_count, allow_tf32, deterministic, hopper, then family, config and split_k to force, or -1.
EXPORT int driver_conv2d(int op, int dtype, const int64_t* sizes, const int* settings, void* const* tensors,
                         void* const* epilogue_pointers, int wide_bias, int relu, float relu_end, const char** kernel) {
  const Conv2dProblem problem = problem_of(sizes);
  Selection selection = select(static_cast<Operator>(op), problem, static_cast<DType>(dtype), target_of(settings));
  if (settings[5] >= 0 && selection.family != static_cast<Family>(settings[5])) {
    selection = Selection();
    selection.family = static_cast<Family>(settings[5]);
    selection.kernel = "forced";
  }
  if (settings[6] >= 0) selection.config = settings[6];
  if (settings[7] >= 0) selection.split_k = settings[7];
  if (settings[5] >= 0) {
    selection.workspace_bytes = static_cast<size_t>(problem.filter_numel() * 8 * selection.split_k);  // for any family
  }
  *kernel = selection.kernel;
  Epilogue epilogue;
  epilogue.bias = epilogue_pointers[0], epilogue.wide_bias = wide_bias, epilogue.residual = epilogue_pointers[1];
  epilogue.relu = relu, epilogue.relu_end = relu_end;
  epilogue.mask_out = static_cast<uint32_t*>(epilogue_pointers[2]);
  epilogue.mask_in = static_cast<const uint32_t*>(epilogue_pointers[3]);
  epilogue.scale = epilogue_pointers[4];
  const Workspace workspace(selection.workspace_bytes);
  return static_cast<int>(freezekit_kernel_table()->conv2d(
      static_cast<Operator>(op), selection, problem, static_cast<DType>(dtype),
      {tensors[0], tensors[1], tensors[2], epilogue_pointers[5]}, epilogue, workspace.data(), nullptr));
}

EXPORT int driver_bias_grad(const void* dy, void* db, int64_t rows, int64_t k, int dtype) {
  const KernelTable* table = freezekit_kernel_table();
  const Workspace workspace(table->bias_grad_bytes(rows, k, static_cast<DType>(dtype)));
  return static_cast<int>(table->bias_grad(dy, db, rows, k, static_cast<DType>(dtype), workspace.data(), nullptr));
}

// strides: of the filter along k, c, r, s. scale: K accumulators, or null.
EXPORT int driver_filter_transform(const int64_t* sizes, int from, int to, int transposed, const int64_t* strides,
                                   const void* scale, const void* filter, void* out) {
  FilterTransform transform;
  transform.from = static_cast<DType>(from), transform.to = static_cast<DType>(to), transform.transposed = transposed;
  transform.stride_k = strides[0], transform.stride_c = strides[1];
  transform.stride_r = strides[2], transform.stride_s = strides[3];
  transform.scale = scale;
  return static_cast<int>(
      freezekit_kernel_table()->filter_transform(problem_of(sizes), transform, filter, out, nullptr));
}

// norm: mean, var, gamma, beta and the bias before it, of norm_dtype; scale and shift: of what dtype accumulates in.
EXPORT int driver_norm_affine(void* const* norm, int norm_dtype, double eps, int64_t channels, int dtype, void* scale,
                              void* shift) {
  const DType type = static_cast<DType>(norm_dtype);
  FixedNorm parts;
  parts.mean = {norm[0], type}, parts.var = {norm[1], type}, parts.gamma = {norm[2], type};
  parts.beta = {norm[3], type}, parts.bias = {norm[4], type}, parts.eps = eps;
  return static_cast<int>(
      freezekit_kernel_table()->norm_affine(parts, channels, static_cast<DType>(dtype), scale, shift, nullptr));
}

// kind, and its numbers a and b, as in api.h.
EXPORT int driver_activation(int kind, double a, double b, const void* x, void* y, uint32_t* bits, int64_t numel,
                             int dtype) {
  return static_cast<int>(freezekit_kernel_table()->activation({static_cast<ActivationKind>(kind), a, b}, x, y, bits,
                                                               numel, static_cast<DType>(dtype), nullptr));
}

EXPORT int driver_gate(int select, double on, double off, const void* x, const uint32_t* bits, void* out, int64_t numel,
                       int dtype) {
  return static_cast<int>(
      freezekit_kernel_table()->gate({select != 0, on, off}, x, bits, out, numel, static_cast<DType>(dtype), nullptr));
}

EXPORT int driver_pack_bytes(const void* keep, uint32_t* bits, int64_t numel) {
  return static_cast<int>(freezekit_kernel_table()->pack_bytes(keep, bits, numel, nullptr));
}

// which: 0 max_pool(x, y, taps), 1 scatter(dy, taps, dx), 2 gather(x, taps, y). numbers: n, c, nhwc, bytes of a tap, then
// those of core/pooling.h in its order.
EXPORT int driver_max_pool(int which, const int64_t* numbers, int dtype, const void* first, void* second, void* third) {
  const int64_t* const v = numbers + 4;
  MaxPool m;
  m.window = {v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11]};
  m.n = numbers[0], m.c = numbers[1], m.nhwc = numbers[2] != 0, m.tap_bytes = static_cast<int>(numbers[3]);
  const KernelTable* table = freezekit_kernel_table();
  const DType type = static_cast<DType>(dtype);
  if (which == 0) return static_cast<int>(table->max_pool(m, type, first, second, third, nullptr));
  if (which == 1) return static_cast<int>(table->max_pool_scatter(m, type, first, second, third, nullptr));
  return static_cast<int>(table->max_pool_gather(m, type, first, second, third, nullptr));
}
