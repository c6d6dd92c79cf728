// Runs the kernels around the convolutions and compares every bit with loops.
//
//   small_driver SEED SCHEDULE JOB...     SEED, SCHEDULE: as conv_driver's
//     JOB: bias:ROWS,K or filter:K,C,TAPS or norm:K or activation:NUMEL or bytes:NUMEL or pool:N,C,H,W,KERNEL,STRIDE,PADDING,DILATION
//
// Every job runs in all dtypes.
#include <string>

#include "tests/emulator/driver.h"
#include "tests/emulator/layer_jobs.h"

using namespace freezekit;
using namespace driver;

namespace {

using Sizes = std::vector<int64_t>;

template <class T>
int run_bias(DType dtype, const Sizes& sizes) {
  const KernelTable* table = freezekit_kernel_table();
  const int64_t rows = sizes[0], k = sizes[1];
  const std::vector<double> dy = random_integers(rows * k);
  std::vector<double> expected(static_cast<size_t>(k), 0.0);
  for (size_t i = 0; i < dy.size(); i++) expected[i % expected.size()] += dy[i];
  const Array<T> of_dy(dy), db(expected.size());
  const Array<char> workspace(table->bias_grad_bytes(rows, k, dtype));
  const Status status = table->bias_grad(of_dy.data(), db.data(), rows, k, dtype, workspace.data(), nullptr);
  if (const int failed = check_status("bias", status)) return failed;
  return compare("bias", db, expected);
}

// CRSK from KRSC, with a factor for each k.
template <class T>
int run_filter(DType dtype, const Sizes& sizes) {
  using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
  Conv2dProblem p;
  p.k = sizes[0], p.c = sizes[1], p.r = sizes[2], p.s = 1;
  const std::vector<double> filter = random_integers(p.filter_numel()), scale = random_integers(p.k);
  std::vector<double> expected(filter.size());
  for (int64_t k = 0; k < p.k; k++)
    for (int64_t tap = 0; tap < p.r; tap++)
      for (int64_t c = 0; c < p.c; c++) {
        expected[static_cast<size_t>((c * p.r + tap) * p.k + k)] =
            filter[static_cast<size_t>((k * p.r + tap) * p.c + c)] * scale[static_cast<size_t>(k)];
      }
  const Array<T> from(filter), to(filter.size());
  const Array<Wide> of_scale(scale);
  FilterTransform transform;
  transform.from = transform.to = dtype, transform.transposed = true, transform.scale = of_scale.data();
  transform.stride_k = p.r * p.c, transform.stride_c = 1, transform.stride_r = transform.stride_s = p.c;
  const Status status = freezekit_kernel_table()->filter_transform(p, transform, from.data(), to.data(), nullptr);
  if (const int failed = check_status("filter", status)) return failed;
  return compare("filter", to, expected);
}

// A batch norm whose scale is the exact gamma / 2.
template <class T>
int run_norm(DType dtype, const Sizes& sizes) {
  using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const std::vector<double> gamma = random_integers(sizes[0]), beta = random_integers(sizes[0]);
  const std::vector<double> mean = random_integers(sizes[0]), bias = random_integers(sizes[0]);
  const std::vector<double> var(gamma.size(), 3.0);
  std::vector<double> expected_scale(gamma.size()), expected_shift(gamma.size());
  for (size_t k = 0; k < gamma.size(); k++) {
    expected_scale[k] = gamma[k] / 2;
    expected_shift[k] = beta[k] + (bias[k] - mean[k]) * gamma[k] / 2;
  }
  const Array<T> of_gamma(gamma), of_beta(beta), of_mean(mean), of_bias(bias), of_var(var);
  const Array<Wide> scale(gamma.size()), shift(gamma.size());
  FixedNorm norm;
  norm.mean = {of_mean.data(), dtype}, norm.var = {of_var.data(), dtype}, norm.gamma = {of_gamma.data(), dtype};
  norm.beta = {of_beta.data(), dtype}, norm.bias = {of_bias.data(), dtype}, norm.eps = 1;
  const Status status =
      freezekit_kernel_table()->norm_affine(norm, sizes[0], dtype, scale.data(), shift.data(), nullptr);
  if (const int failed = check_status("norm", status)) return failed;
  if (const int wrong = compare("scale", scale, expected_scale)) return wrong;
  return compare("shift", shift, expected_shift);
}

struct Job {
  std::string kind;
  Sizes sizes;
};

Job parse(const char* text) {
  const char* at = std::strchr(text, ':');
  Job job{std::string(text, at ? at : text), {}};
  while (at && *at) {
    char* end = nullptr;
    job.sizes.push_back(std::strtoll(at + 1, &end, 10));
    at = end;
  }
  return job;
}

template <class T>
int run_job(DType dtype, const Job& job) {
  if (job.kind == "bias" && job.sizes.size() == 2) return run_bias<T>(dtype, job.sizes);
  if (job.kind == "filter" && job.sizes.size() == 3) return run_filter<T>(dtype, job.sizes);
  if (job.kind == "norm" && job.sizes.size() == 1) return run_norm<T>(dtype, job.sizes);
  if (job.kind == "activation" && job.sizes.size() == 1) return layer_jobs::run_activation<T>(dtype, job.sizes);
  if (job.kind == "bytes" && job.sizes.size() == 1) return layer_jobs::run_bytes(job.sizes);
  if (job.kind == "pool" && job.sizes.size() == 8) return layer_jobs::run_pool<T>(dtype, job.sizes);
  return kUsage;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4 || !set_schedule(static_cast<unsigned>(std::atoi(argv[1])), argv[2])) return kUsage;
  for (int i = 3; i < argc; i++) {
    const Job job = parse(argv[i]);
    for (const DType dtype : {DType::f32, DType::f64, DType::f16, DType::bf16}) {
      if (const int code = with_type(dtype, [&](auto zero) { return run_job<decltype(zero)>(dtype, job); }))
        return code;
    }
  }
  return kRight;
}
