#include "torch/backends/choices.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <map>
#include <mutex>
#include <sstream>

#include "kernels/rehearsals.h"
#include "torch/backends/kernel_library.h"

namespace freezekit::choices {
namespace {

std::mutex mutex;
std::map<std::string, Measurement> measured;
std::atomic<uint64_t> changes{0};
std::atomic<double> emulated_handicap{-1};  // negative: no CPU stands for a GPU

const char* layout_name(at::MemoryFormat layout) {
  return layout == at::MemoryFormat::ChannelsLast ? "channels_last" : "contiguous";
}

bool computes_in_tf32(const Setting& s) { return s.dtype == at::kFloat && s.target.allow_tf32; }

std::string device_name(const Setting& s) {
  return std::string(" on ") + c10::DeviceTypeName(s.device, /*lower_case=*/true) + " sm_" +
         std::to_string(s.target.sm) + " of " + std::to_string(s.target.sm_count);
}

std::string operator_name(Operator op, const Setting& s) {
  return std::string(name_of(op)) + (s.variant.empty() ? "" : "+") + std::string(s.variant) + ' ' +
         c10::toString(s.dtype) + (computes_in_tf32(s) ? "(tf32)" : "");
}

}  // namespace

std::string key_of(Operator op, const Conv2dProblem& p, const Setting& s) {
  std::ostringstream key;
  key << operator_name(op, s) << " x=" << p.n << ',' << p.c << ',' << p.h << ',' << p.w << " w=" << p.k << ','
      << p.c_per_group() << ',' << p.r << ',' << p.s << " stride=" << p.stride_h << ',' << p.stride_w
      << " padding=" << p.pad_h << ',' << p.pad_w << " dilation=" << p.dilation_h << ',' << p.dilation_w
      << " groups=" << p.groups << ' ' << layout_name(s.layout) << device_name(s);
  return key.str();
}

std::string class_of(Operator op, const Conv2dProblem& p, const Setting& s, const Selection& by) {
  const uint64_t operations = p.y_numel() * p.c_per_group() * p.r * p.s;
  const int power = (std::bit_width(operations) - 1) / 2 * 2;
  const bool depthwise = p.groups > 1 && p.c_per_group() == 1;  // its kernels take channels of all groups together
  constexpr const char* kSlices[] = {"", " in slices", " in many slices"};
  std::ostringstream key;
  key << operator_name(op, s) << " by " << by.kernel << kSlices[static_cast<int>(slices_of(by))]
      << (is_one_phase(op, p.h, p.stride_h) ? " of one row" : "")
      << (is_one_phase(op, p.w, p.stride_w) ? " of one column" : "") << (p.groups > 1 ? " in groups" : "")
      << " w=" << p.r << ',' << p.s << " channels by " << channel_unit(depthwise ? p.c : p.c_per_group()) << ','
      << channel_unit(depthwise ? p.k : p.k_per_group()) << " stride=" << p.stride_h << ',' << p.stride_w
      << " padding=" << p.pad_h << ',' << p.pad_w << " dilation=" << p.dilation_h << ',' << p.dilation_w << " 2^"
      << power << " to 2^" << power + 2 << " products " << layout_name(s.layout) << device_name(s);
  return key.str();
}

std::string key_of(const char* layer, bool large, const char* layout, const Setting& s) {
  return std::string(layer) + ' ' + c10::toString(s.dtype) + (large ? " large" : " small") + (*layout ? " " : "") +
         layout + device_name(s);
}

std::string hopper_key(const Setting& s) { return "hopper self-test" + device_name(s); }

std::optional<Measurement> find(const std::string& key) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = measured.find(key);
  return found == measured.end() ? std::nullopt : std::make_optional(found->second);
}

void set(const std::string& key, const Measurement& measurement) {
  const std::lock_guard<std::mutex> lock(mutex);
  measured[key] = measurement;
  ++changes;
}

std::pair<Measurement, bool> settle(const std::string& key, const Measurement& measurement) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [known, is_new] = measured.try_emplace(key, measurement);
  if (is_new) ++changes;
  return {known->second, is_new};
}

void clear() {
  const std::lock_guard<std::mutex> lock(mutex);
  measured.clear();
  ++changes;
}

std::vector<std::pair<std::string, Measurement>> all() {
  const std::lock_guard<std::mutex> lock(mutex);
  return {measured.begin(), measured.end()};
}

uint64_t generation() { return changes.load(std::memory_order_acquire); }

std::optional<Backend> candidate_on(c10::DeviceType device) {
  if (device == c10::DeviceType::CUDA && has_cuda_kernels()) return Backend::native;
  if (device == c10::DeviceType::CPU && handicap() >= 0) return Backend::emulated;
  return std::nullopt;
}

void emulate(std::optional<double> handicap) {
  emulated_handicap = handicap.value_or(-1);
  ++changes;
}

double handicap() { return emulated_handicap.load(std::memory_order_relaxed); }

}  // namespace freezekit::choices
