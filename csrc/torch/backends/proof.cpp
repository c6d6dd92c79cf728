#include "torch/backends/proof.h"

#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/stack.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/Event.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <limits>
#include <new>
#include <tuple>
#include <vector>

#include "core/medians.h"
#include "torch/backends/native.h"
#include "torch/common/computing.h"

namespace freezekit::proof {
namespace {

using c10::DispatchKeySet;
using choices::Measurement;

constexpr int kRuns = 3;                  // timed: what interrupts one of them decides nothing
constexpr int64_t kPieceBytes = 4 << 20;  // of the values compared at once, in the dtype that they are compared in

c10::Stream stream_on(const Tensor& on) {
  return c10::impl::VirtualGuardImpl(on.device().type()).getStream(on.device());
}

void synchronize(const Tensor& on) {
  if (on.is_cuda()) stream_on(on).synchronize();
}

// Instants between the runs of a stream, as the device meets them: what the host takes to launch one run passes while the
// device computes the one before, as in a training step.
class Marks {
 public:
  explicit Marks(const Tensor& on) : on_(on) {}

  void set() {
    if (!on_.is_cuda()) {
      instants_.push_back(Clock::now());
      return;
    }
    events_.emplace_back(on_.device().type(), c10::EventFlag::BACKEND_DEFAULT);
    events_.back().record(stream_on(on_));
  }

  // Once the device has met all: between a mark and the next.
  double seconds_after(size_t mark) const {
    if (on_.is_cuda()) return events_[mark].elapsedTime(events_[mark + 1]) / 1e3;
    return std::chrono::duration<double>(instants_[mark + 1] - instants_[mark]).count();
  }

 private:
  using Clock = std::chrono::steady_clock;

  const Tensor& on_;
  std::vector<c10::Event> events_;
  std::vector<Clock::time_point> instants_;
};

void time(const Contest& contest, Backend candidate, const Tensor& on, Measurement& result) {
  Marks marks(on);
  marks.set();
  for (int i = 0; i < kRuns; ++i) {
    for (const Backend backend : {Backend::aten, candidate}) contest.run(backend), marks.set();
  }
  synchronize(on);
  const auto seconds = [&, next = size_t{0}](Backend backend) mutable {
    const double passed = marks.seconds_after(next++);
    return candidate == Backend::emulated && backend == candidate ? passed * choices::handicap() : passed;
  };
  std::tie(result.aten_seconds, result.native_seconds) = interleaved_medians(kRuns, seconds, Backend::aten, candidate);
}

// Code for one architecture alone, as sm_90a, and code that an older driver cannot translate show when they are launched.
bool lacks_code(const std::string& error) {
  for (const char* const text : {"no kernel image is available", "PTX was compiled with an unsupported toolchain"}) {
    if (error.find(text) != std::string::npos) return true;
  }
  return false;
}

Measurement held(const Tensor& on, Backend candidate, const std::function<Contest()>& make) {
  Measurement result;
  try {
    const BelowAutogradAndAutocast below;
    const c10::DeviceGuard guard(on.device());
    if (!native::target_on(kernel_library(candidate), candidate).has_code) {
      result.note = kNoCode;
      return result;
    }
    const Contest contest = make();
    result.note = contest.faults();
    if (!result.note.empty()) return result;
    time(contest, candidate, on, result);
    result.agree = true;
  } catch (const c10::OutOfMemoryError&) {
    result.note = kNoMemory;
  } catch (const std::bad_alloc&) {
    result.note = kNoMemory;
  } catch (const c10::Error& error) {
    const std::string text = error.what_without_backtrace();
    result.note = lacks_code(text) ? kNoCode : "it failed: " + text;
  } catch (const std::exception& error) {
    result.note = std::string("it failed: ") + error.what();
  } catch (...) {
    result.note = "it failed";
  }
  return result;
}

bool is_fault(const Measurement& m) {
  return !m.agree && m.note != kNoMemory && m.note != kNoCode && m.note != kUntold;
}

// Once for each operator: other sizes and dtypes of one fault are found by whoever mends it.
void warn(const std::string& key, const std::string& note) {
  const std::string op = key.substr(0, key.find(' ') + 1);
  for (const auto& [other, known] : choices::all()) {
    if (other != key && other.compare(0, op.size(), op) == 0 && is_fault(known)) return;
  }
  TORCH_WARN("freezekit's kernel for [", key, "] is not used in this process, torch's operator is: held against it, ",
             note,
             ". Results are right all the same. Please report this to freezekit's authors, with the output of "
             "`freezekit info` and of freezekit.tuning.dump_choices()");
}

double largest_of(at::ScalarType type) {
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, type, "freezekit::proof",
                                         [] { return static_cast<double>(std::numeric_limits<scalar_t>::max()); });
}

// An earlier launch may have failed, which is not the next kernel's fault. And where torch was told to raise an error at
// every wait (torch.cuda.set_sync_debug_mode), a proof would raise one.
bool may_wait(const Tensor& on) {
  try {
    synchronize(on);
    return true;
  } catch (const c10::Error&) {
    return false;
  }
}

bool is_possible(const Tensor& on, Backend candidate) {
  return on.numel() > 0 && !must_be_repeatable() && is_plain(on) && !is_watched() &&
         !native::is_capturing(on, candidate);
}

// A proof waits for its stream and may allocate. Where a CUDA graph is captured elsewhere, by another thread perhaps, either
// would end that capture, unless this thread says that its calls have nothing to do with it; torch's allocator says so, too.
class BesideCaptures {
 public:
  explicit BesideCaptures(Backend candidate)
      : table_(*kernel_library(candidate).table), outer_(table_.exchange_capture_mode(CaptureMode::relaxed)) {}
  ~BesideCaptures() { table_.exchange_capture_mode(outer_); }
  BesideCaptures(const BesideCaptures&) = delete;
  BesideCaptures& operator=(const BesideCaptures&) = delete;

 private:
  const KernelTable& table_;
  CaptureMode outer_;
};

// In memory order of that layout: pieces are dense.
Tensor flat(const Tensor& t, at::MemoryFormat format) { return t.contiguous(format).as_strided({t.numel()}, {1}); }

// Where torch's way of summing left a number that is not finite, ours need not leave it.
Tensor not_finite(const Tensor& sizes) { return sizes.le(largest_of(sizes.scalar_type())).logical_not_(); }

at::ScalarType wide_type(const Tensor& of) { return of.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// (Where a piece begins, how many elements it has), one after another.
template <class F>
void for_each_piece(const Tensor& of, const F& f) {
  const int64_t step = kPieceBytes / static_cast<int64_t>(c10::elementSize(wide_type(of)));
  for (int64_t i = 0; i < of.numel(); i += step) f(i, std::min(step, of.numel() - i));
}

double most(const std::vector<Tensor>& of) { return of.empty() ? 0 : at::stack(of).max().item<double>(); }

}  // namespace

double largest_in(const Tensor& tensor) {
  const Tensor row = flat(tensor, tensor.suggest_memory_format());
  std::vector<Tensor> largest;
  for_each_piece(row, [&](int64_t i, int64_t count) {
    Tensor size = row.narrow(0, i, count).to(wide_type(row)).abs();
    const Tensor skipped = not_finite(size);
    largest.push_back(size.masked_fill_(skipped, 0).max());
  });
  return most(largest);
}

std::string difference(const Tensor& expected, const Tensor& own, const Bound& bound, double large) {
  if (expected.numel() == 0) return {};
  if (!expected.is_floating_point()) {
    const int64_t count = expected.ne(own).sum().item<int64_t>();
    return count == 0 ? "" : std::to_string(count) + " of " + std::to_string(expected.numel()) + " words differ";
  }
  const bool are_sums = bound.of_largest > 0;
  const double end = largest_of(own.scalar_type());
  const auto format = expected.suggest_memory_format();
  const Tensor a = flat(expected, format), b = flat(own, format);
  std::vector<Tensor> excess, largest;
  for_each_piece(a, [&](int64_t i, int64_t count) {
    const Tensor x = a.narrow(0, i, count).to(wide_type(a)), y = b.narrow(0, i, count);
    Tensor apart, skipped;
    if (are_sums) {
      Tensor size = x.abs();
      skipped = not_finite(size);
      apart = (x - y.clamp(-end, end)).abs_().sub_(size, bound.of_value);
      largest.push_back(size.masked_fill_(skipped, 0).max());
    } else {
      skipped = x.eq(y).logical_or_(x.isnan().logical_and_(y.isnan()));  // infinities are equal too
      apart = (x - y).abs_();
    }
    excess.push_back(apart.masked_fill_(skipped, 0).max());  // NaN stays NaN
  });
  const double by = most(excess), allowed = are_sums ? bound.of_largest * std::max(most(largest), large) : 0;
  if (by <= allowed) return {};
  char text[96];
  std::snprintf(text, sizeof text, "a value differs by %.3g where %.3g is allowed", std::abs(by), allowed);
  return text;
}

bool is_watched() {
  // What every eager call includes.
  constexpr DispatchKeySet eager = c10::default_included_set | c10::autocast_dispatch_keyset;
  const DispatchKeySet included = c10::impl::tls_local_dispatch_key_set().included_;
  return (included | eager) != eager || c10::impl::TorchDispatchModeTLS::any_modes_set();
}

bool must_be_repeatable() {
  const auto& context = at::globalContext();
  return context.deterministicAlgorithms() || context.deterministicCuDNN();
}

std::optional<Measurement> known(const std::string& key) {
  const auto found = choices::find(key);
  return found && (!must_be_repeatable() || found->loaded) ? found : std::nullopt;
}

std::optional<Measurement> verdict(const std::string& key, const Tensor& on, const std::function<Contest()>& contest) {
  if (const auto found = known(key)) return found;
  const auto candidate = choices::candidate_on(on.device().type());
  if (!candidate || !is_possible(on, *candidate)) return std::nullopt;
  const BesideCaptures beside(*candidate);
  if (!may_wait(on)) return std::nullopt;
  // Threads that meet a key at once all measure: none waits for another, whose stream may wait for it, and a checkpoint of
  // none keeps what torch's operator keeps and makes again what a kernel keeps.
  const auto [result, is_new] = choices::settle(key, held(on, *candidate, contest));
  if (is_new && is_fault(result)) warn(key, result.note);
  return result;
}

}  // namespace freezekit::proof
