#include "torch/choices.h"

#include <ATen/Context.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <mutex>
#include <sstream>

#include "torch/kernel_library.h"
#include "torch/native.h"

namespace freezekit::choices {
namespace {

constexpr int kRuns = 5;

std::mutex mutex;
std::map<std::string, Measurement> measured;
std::optional<Backend> tuning;

// The kernels that could run instead of ATen's on this tensor; none where this build or device has none.
std::optional<Backend> candidate_for(const Tensor& on) {
  if (on.is_cuda() && has_cuda_kernels()) return Backend::native;
  const std::lock_guard<std::mutex> lock(mutex);
  return on.is_cpu() && tuning == Backend::emulated ? tuning : std::nullopt;
}

bool is_tuning(Backend candidate) {
  const std::lock_guard<std::mutex> lock(mutex);
  return tuning == candidate;
}

double seconds(const std::function<void()>& run, const Tensor& on) {
  const auto synchronize = [&] {
    if (on.is_cuda()) c10::impl::VirtualGuardImpl(on.device().type()).getStream(on.device()).synchronize();
  };
  synchronize();
  const auto start = std::chrono::steady_clock::now();
  run();
  synchronize();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

// Both results carry one rounding to their dtype and their own order of summation: half the digits must agree.
bool agree(const Tensor& a, const Tensor& b) {
  if (a.numel() == 0) return true;
  const Tensor exact = a.to(at::kDouble);
  const double scale = exact.abs().max().item<double>();
  const double tolerance = a.scalar_type() == at::kDouble ? 1e-10 : a.scalar_type() == at::kFloat ? 2e-3 : 2e-2;
  return exact.sub(b.to(at::kDouble)).abs().max().item<double>() <= tolerance * scale;
}

Measurement measure(Backend candidate, const Tensor& on, const Compute& run) {
  Measurement result;
  result.agree = agree(run(Backend::aten), run(candidate));  // also warms both up
  std::vector<double> aten, native;
  for (int i = 0; i < kRuns; ++i) {
    aten.push_back(seconds([&] { run(Backend::aten); }, on));
    native.push_back(seconds([&] { run(candidate); }, on));
  }
  result.aten_seconds = median(aten);
  result.native_seconds = median(native);
  return result;
}

bool can_measure(Operator op, const Conv2dProblem& problem, const Tensor& on, Backend candidate) {
  if (!native::supports(op, problem, on, candidate)) return false;
  if (!on.is_cuda()) return true;
  const auto stream = c10::impl::VirtualGuardImpl(on.device().type()).getStream(on.device());
  return !kernel_library(Backend::native).table->capturing(stream.native_handle());
}

Backend decide(Operator op, const Conv2dProblem& problem, const Tensor& on, const Compute& run) {
  const auto candidate = candidate_for(on);
  if (!candidate) return Backend::aten;
  const bool tune = is_tuning(*candidate);
  if (!tune && all().empty()) return Backend::aten;  // the usual case pays for no key
  const std::string key = key_of(op, problem, on);
  auto known = find(key);
  if (!known && tune && can_measure(op, problem, on, *candidate)) {
    known = measure(*candidate, on, run);
    set(key, *known);
  }
  return known && known->native_wins() ? *candidate : Backend::aten;
}

}  // namespace

std::string key_of(Operator op, const Conv2dProblem& p, const Tensor& on) {
  static const char* const names[] = {"conv2d", "conv2d_dgrad", "conv2d_wgrad"};
  std::ostringstream key;
  key << names[static_cast<int>(op)] << ' ' << c10::toString(on.scalar_type());
  if (on.scalar_type() == at::kFloat && on.is_cuda() && at::globalContext().allowTF32CuDNN()) key << "(tf32)";
  key << " x=" << p.n << ',' << p.c << ',' << p.h << ',' << p.w << " w=" << p.k << ',' << p.c_per_group() << ',' << p.r
      << ',' << p.s << " stride=" << p.stride_h << ',' << p.stride_w << " padding=" << p.pad_h << ',' << p.pad_w
      << " dilation=" << p.dilation_h << ',' << p.dilation_w << " groups=" << p.groups
      << (on.suggest_memory_format() == at::MemoryFormat::ChannelsLast ? " channels_last" : " contiguous") << " on "
      << c10::DeviceTypeName(on.device().type(), /*lower_case=*/true);
  return key.str();
}

std::optional<Measurement> find(const std::string& key) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = measured.find(key);
  return found == measured.end() ? std::nullopt : std::make_optional(found->second);
}

void set(const std::string& key, const Measurement& measurement) {
  const std::lock_guard<std::mutex> lock(mutex);
  measured[key] = measurement;
}

void clear() {
  const std::lock_guard<std::mutex> lock(mutex);
  measured.clear();
}

std::vector<std::pair<std::string, Measurement>> all() {
  const std::lock_guard<std::mutex> lock(mutex);
  return {measured.begin(), measured.end()};
}

void set_tuning(std::optional<Backend> candidate) {
  const std::lock_guard<std::mutex> lock(mutex);
  tuning = candidate;
}

Tensor compute(Operator op, const Conv2dProblem& problem, const Tensor& on, Backend backend, const Compute& run) {
  std::optional<native::WithoutHopper> without_hopper;
  if (backend == Backend::automatic) {
    without_hopper.emplace();
    backend = decide(op, problem, on, run);
  }
  return run(native::runs(op, problem, on, backend) ? backend : Backend::aten);
}

}  // namespace freezekit::choices
