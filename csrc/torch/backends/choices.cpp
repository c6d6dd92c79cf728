#include "torch/backends/choices.h"

#include <c10/core/impl/VirtualGuardImpl.h>

#include <atomic>
#include <chrono>
#include <map>
#include <mutex>
#include <sstream>
#include <tuple>

#include "core/medians.h"

namespace freezekit::choices {
namespace {

constexpr int kRuns = 5;

std::mutex mutex;
std::map<std::string, Measurement> measured;
std::optional<Backend> tuning;
std::atomic<bool> known{false};  // whether either of them says anything

void synchronize(const Tensor& on) {
  if (on.is_cuda()) c10::impl::VirtualGuardImpl(on.device().type()).getStream(on.device()).synchronize();
}

// Both results carry one rounding to their dtype and their own order of summation: half the digits must agree.
bool agree(const Tensor& a, const Tensor& b) {
  if (a.numel() == 0) return true;
  const Tensor exact = a.to(at::kDouble);
  const double scale = exact.abs().max().item<double>();
  const double tolerance = a.scalar_type() == at::kDouble ? 1e-10 : a.scalar_type() == at::kFloat ? 2e-3 : 2e-2;
  return exact.sub(b.to(at::kDouble)).abs().max().item<double>() <= tolerance * scale;
}

}  // namespace

std::string key_of(Operator op, const Conv2dProblem& p, const Setting& s) {
  std::ostringstream key;
  key << name_of(op) << (s.variant.empty() ? "" : "+") << s.variant << ' ' << c10::toString(s.dtype);
  const bool cuda = s.device == c10::DeviceType::CUDA;
  if (s.dtype == at::kFloat && cuda && s.target.allow_tf32) key << "(tf32)";
  key << " x=" << p.n << ',' << p.c << ',' << p.h << ',' << p.w << " w=" << p.k << ',' << p.c_per_group() << ',' << p.r
      << ',' << p.s << " stride=" << p.stride_h << ',' << p.stride_w << " padding=" << p.pad_h << ',' << p.pad_w
      << " dilation=" << p.dilation_h << ',' << p.dilation_w << " groups=" << p.groups
      << (s.layout == at::MemoryFormat::ChannelsLast ? " channels_last" : " contiguous") << " on "
      << c10::DeviceTypeName(s.device, /*lower_case=*/true);
  if (cuda) key << " sm_" << s.target.sm << " of " << s.target.sm_count;
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
  known = true;
}

void clear() {
  const std::lock_guard<std::mutex> lock(mutex);
  measured.clear();
  known = tuning.has_value();
}

std::vector<std::pair<std::string, Measurement>> all() {
  const std::lock_guard<std::mutex> lock(mutex);
  return {measured.begin(), measured.end()};
}

void set_tuning(std::optional<Backend> candidate) {
  const std::lock_guard<std::mutex> lock(mutex);
  tuning = candidate;
  known = tuning.has_value() || !measured.empty();
}

bool are_known() { return known.load(std::memory_order_relaxed); }

std::optional<Backend> tuned() {
  const std::lock_guard<std::mutex> lock(mutex);
  return tuning;
}

Measurement measure(Backend candidate, const Tensor& on, const std::function<Tensor(Backend)>& run) {
  using Clock = std::chrono::steady_clock;
  const auto seconds = [&](Backend backend) {
    synchronize(on);
    const auto start = Clock::now();
    run(backend);
    synchronize(on);
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  Measurement result;
  result.agree = agree(run(Backend::aten), run(candidate));  // also warms both up
  std::tie(result.aten_seconds, result.native_seconds) =
      interleaved_medians(kRuns, seconds, Backend::aten, candidate);
  return result;
}

}  // namespace freezekit::choices
