#include "torch/backends/route.h"

#include <ATen/Context.h>
#include <c10/core/DeviceGuard.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <unordered_map>
#include <vector>

#include "torch/backends/proof.h"
#include "torch/common/unseen.h"

namespace freezekit {
namespace {

constexpr std::array<const char*, kOps> kNames = {
    "conv2d",         "conv2d_dgrad",   "conv2d_wgrad", "conv2d_bias_grad",   "frozen_conv2d",     "activation",
    "gate",           "dropout",        "max_pool2d",   "max_pool2d_scatter", "max_pool2d_gather", "convolution",
    "batch_norm",     "layer_norm",     "group_norm",   "max_pool3d",         "avg_pool",          "adaptive_avg_pool",
    "reflection_pad", "replication_pad"};
constexpr std::array<const char*, 4> kComputers = {"torch's own formula", "ATen", "freezekit's CPU kernels",
                                                   "freezekit's kernels"};

constexpr const char* kNotFloating = "a tensor is not of a real floating dtype";

// Layers of which nothing is kept where no gradient is recorded: torch's operator is the shortest way then.
bool keeps_for_gradient_alone(Op op) {
  return op == Op::activation || op == Op::dropout || op == Op::max_pool2d || !has_kernels(op);
}

bool has_cpu_kernels(Op op) {
  return op == Op::activation || op == Op::gate || op == Op::dropout || op == Op::max_pool2d ||
         op == Op::max_pool2d_scatter || op == Op::max_pool2d_gather;
}

// The layers whose kernels a proof covers, in whose name the verdict is kept. A gate is the gradient of two of them.
std::initializer_list<Op> proven_with(Op op) {
  static constexpr std::initializer_list<Op> activation = {Op::activation}, dropout = {Op::dropout},
                                             pool = {Op::max_pool2d}, both = {Op::activation, Op::dropout};
  if (op == Op::gate) return both;
  if (op == Op::dropout) return dropout;
  return op == Op::activation || op == Op::frozen_conv2d ? activation : pool;
}

// Who computes by a verdict.
enum class Winner : int8_t { torch, kernel, hopper };

struct Answer {
  Winner winner = Winner::torch;
  bool lasts = true;  // false: there may be another once it may be measured
};

Answer answer_of(const std::optional<choices::Measurement>& found) {
  return {found && found->native_wins() ? Winner::kernel : Winner::torch, found.has_value()};
}

// The answers that this thread has asked for, as long as nothing new is known: a call must not pay for texts. Shapes that
// change all the time must not fill the memory.
constexpr size_t kMostAnswers = 1 << 12;

Winner remembered(const std::string& question, c10::function_ref<Answer()> ask) {
  thread_local uint64_t generation = 0;
  thread_local std::unordered_map<std::string, Winner> known;
  if (generation != choices::generation()) known.clear(), generation = choices::generation();
  if (const auto found = known.find(question); found != known.end()) return found->second;
  const Answer answer = ask();
  const bool lasts = answer.lasts || proof::must_be_repeatable();  // there, nothing is found out later
  if (known.size() >= kMostAnswers) known.clear();
  if (lasts && generation == choices::generation()) known[question] = answer.winner;
  return answer.winner;
}

template <class... Numbers>
std::string question_of(const Tensor& on, Numbers... numbers) {
  const std::array<int64_t, sizeof...(numbers) + 3> all = {on.device().index(), static_cast<int64_t>(on.scalar_type()),
                                                           proof::must_be_repeatable(),
                                                           static_cast<int64_t>(numbers)...};
  return {reinterpret_cast<const char*>(all.data()), sizeof all};
}

constexpr int64_t kLarge = 1 << 20;  // elements; below, most of a layer's time is its launch's

// On the current device. None where it cannot be asked what it is: its driver may serve torch, and be too old for the
// CUDA that freezekit's kernels were built with.
std::optional<choices::Setting> setting_on(const Tensor& on, at::MemoryFormat layout, std::string_view variant = {}) {
  const auto device = on.device().type();
  const Backend candidate = *choices::candidate_on(device);
  const native::HopperScope without(false);
  const KernelLibrary& library = kernel_library(candidate);
  const auto target = native::find_target(library, candidate);
  if (!target) {
    TORCH_WARN_ONCE(
        "freezekit's kernels are not used in this process, torch's operators are: the device's properties "
        "cannot be read",
        library.last_error());
    return std::nullopt;
  }
  return choices::Setting{on.scalar_type(), layout, device, *target, variant};
}

std::string layer_key(Op layer, bool large, const choices::Setting& setting) {
  const char* const name = layer != Op::max_pool2d                            ? ""
                           : setting.layout == at::MemoryFormat::ChannelsLast ? "channels_last"
                                                                              : "contiguous";
  return choices::key_of(to_string(layer), large, name, setting);
}

// Whether freezekit's kernels agreed with torch's, whatever the size and whoever was faster: below autograd, where taps
// or bits are what is at hand, the other way is longer than both. Taps are there in a layout that was proven: that of the
// other tensor does not matter.
bool agreed(Op op, const Tensor& on) {
  const auto own = on.suggest_memory_format();
  const auto ask = [&]() -> Answer {
    const c10::DeviceGuard guard(on.device());
    auto setting = setting_on(on, own);
    if (!setting) return {};
    const bool has_taps = op == Op::max_pool2d_scatter || op == Op::max_pool2d_gather;
    for (const Op layer : proven_with(op)) {
      for (const bool large : {false, true}) {
        for (const auto layout : {at::MemoryFormat::Contiguous, at::MemoryFormat::ChannelsLast}) {
          if (layout != own && !has_taps) continue;
          setting->layout = layout;
          const auto found = choices::find(layer_key(layer, large, *setting));
          if (found && found->agree) return {Winner::kernel};
        }
      }
    }
    return {};
  };
  return remembered(question_of(on, op, own, /*agreed=*/true), ask) == Winner::kernel;
}

// Others kernels could read by a copy alone, which torch's operators do without.
bool can_be_read(Op layer, const Tensor& on) {
  return layer == Op::max_pool2d ? proof::is_image_batch(on) : proof::is_dense(on);
}

// Whether freezekit's kernels won, or win now.
bool won(Op op, const Tensor& on) {
  const Op layer = *proven_with(op).begin();
  if (!can_be_read(layer, on)) return false;  // whatever is known of tensors of that size and layout
  const bool large = on.numel() >= kLarge;
  const auto layout = on.suggest_memory_format();
  const auto ask = [&]() -> Answer {
    const c10::DeviceGuard guard(on.device());
    const auto setting = setting_on(on, layout);
    if (!setting) return {};
    return answer_of(proof::verdict(layer_key(layer, large, *setting), on, [&] {
      if (layer == Op::max_pool2d) return proof::max_pool2d(on);
      return layer == Op::dropout ? proof::dropout(on) : proof::activations(on);
    }));
  };
  return remembered(question_of(on, op, layout, /*agreed=*/false, large), ask) == Winner::kernel;
}

// What `auto` means for a layer on a device where freezekit's kernels compete with torch's operators.
Route by_proof(Op op, const Facts& facts) {
  constexpr Route unproven = {Computer::formula,
                              "torch's own operator serves until a kernel has been equal and not slower here"};
  if (!native::dtype_of(facts.dtype)) return unproven;
  const Tensor& on = *facts.on;
  const bool is_entry = op == Op::activation || op == Op::dropout || op == Op::max_pool2d || op == Op::frozen_conv2d;
  const bool is_compiled = !proof::is_plain(on);
  const Computer computer = op == Op::frozen_conv2d ? Computer::aten : Computer::kernels;
  if (facts.is_step || !is_entry || (is_compiled && op != Op::activation && op != Op::dropout)) {
    return agreed(op, on) ? Route{computer, "it has been equal to torch's operator here"} : unproven;
  }
  if (is_compiled) return {Computer::formula, "a compiler fuses it with its neighbours"};
  // What is kept must not depend on what was proven meanwhile: selective checkpoints compare it with what they see later.
  if (proof::is_watched()) return {Computer::formula, "a tracer or a dispatch mode sees torch's own operator"};
  return won(op, on) ? Route{computer, "it has been equal to torch's operator here, and not slower"} : unproven;
}

// What `auto` and `aten` mean. On the meta device a layer keeps what it keeps on a CPU.
Route automatic(Op op, Backend backend, const Facts& facts) {
  if (!has_cpu_kernels(op) && op != Op::frozen_conv2d) return {Computer::aten, "ATen computes it"};
  if (backend == Backend::automatic && choices::candidate_on(facts.device)) return by_proof(op, facts);
  if (facts.device != c10::DeviceType::CPU && facts.device != c10::DeviceType::Meta) {
    return {Computer::formula, "torch's own operator serves on this device"};
  }
  return op == Op::frozen_conv2d ? Route{Computer::aten, "ATen computes it"} : Route{Computer::cpu, "it runs on a CPU"};
}

// That a demand for freezekit's kernels can be met.
void check_demand(Op op, Backend backend, const Facts& facts) {
  if (facts.device == c10::DeviceType::Meta) return;
  const auto wanted = backend == Backend::native ? c10::DeviceType::CUDA : c10::DeviceType::CPU;
  if (facts.device != wanted) {
    refuse(to_string(op), backend,
           "it needs " + c10::DeviceTypeName(wanted) + " tensors, got one on " +
               c10::DeviceTypeName(facts.device, /*lower_case=*/true));
  }
  if (!native::dtype_of(facts.dtype)) {
    refuse(to_string(op), backend,
           std::string("it takes float32, float64, float16 and bfloat16, got ") + c10::toString(facts.dtype));
  }
  kernel_library(backend);
}

std::string in_microseconds(double seconds) {
  char text[32];
  std::snprintf(text, sizeof text, "%.4g us", seconds * 1e6);
  return text;
}

// A kernel of freezekit's for a problem. Those of sm_90a are among them where their self-test has passed on this device.
struct Option {
  Selection selection;
  bool hopper;

  Winner winner() const { return hopper ? Winner::hopper : Winner::kernel; }
};

// Memory that torch's operator does without.
bool copies_too_much(Operator op, const Conv2dProblem& problem, const choices::Setting& setting) {
  const int64_t bytes = (problem.x_numel() + problem.y_numel()) * static_cast<int64_t>(c10::elementSize(setting.dtype));
  return op == Operator::wgrad && setting.layout != at::MemoryFormat::ChannelsLast && bytes > native::kCopiedBytes;
}

std::vector<Option> options_for(Operator op, const Conv2dProblem& problem, const choices::Setting& setting) {
  if (copies_too_much(op, problem, setting)) return {};
  const auto dtype = native::dtype_of(setting.dtype);
  Target target = setting.target;
  target.hopper = false;
  std::vector<Option> options;
  if (const Selection s = select(op, problem, *dtype, target); s.family != Family::none) options.push_back({s, false});
  const auto tested = choices::find(choices::hopper_key(setting));
  if (!tested || !tested->agree) return options;
  target.hopper = true;
  if (setting.device == c10::DeviceType::CPU) target.sm = 90;  // emulated as one
  if (const Selection s = select(op, problem, *dtype, target); s.family == Family::hopper) options.push_back({s, true});
  return options;
}

std::string problem_key(Operator op, const Conv2dProblem& problem, const choices::Setting& setting, const Option& o) {
  return choices::key_of(op, problem, setting) + (o.hopper ? std::string(" by ") + o.selection.kernel : "");
}

// Where torch looks for the fastest way per problem, so is done here; elsewhere one problem speaks for its class.
bool each_problem() { return at::globalContext().benchmarkCuDNN(); }

// What is known of this problem, which may be loaded under any setting of cudnn.benchmark, or of its class.
std::optional<choices::Measurement> known_of(Operator op, const Conv2dProblem& problem, const choices::Setting& setting,
                                             const Option& option) {
  auto found = proof::known(problem_key(op, problem, setting, option));
  if (!found && (!each_problem() || proof::must_be_repeatable())) {
    found = proof::known(choices::class_of(op, problem, setting, option.selection));
  }
  return found;
}

// Less is better, below 1 than torch's.
double share_of(const choices::Measurement& m) {
  return m.aten_seconds > 0 ? m.native_seconds / m.aten_seconds : m.native_seconds > 0 ? HUGE_VAL : 0;
}

// The kernel that is proven for this problem, now or before.
Winner proven(const Conv2dStep& step, Run run, Rehearse rehearse) {
  if (!native::dtype_of(step.on.scalar_type()) || step.on.layout() != at::kStrided) return Winner::torch;
  const bool each = each_problem();
  std::string question =
      question_of(step.on, op_of(step.op), step.layout, each, at::globalContext().allowTF32CuDNN(at::Float32Op::CONV));
  question.append(reinterpret_cast<const char*>(&step.problem), sizeof step.problem).append(step.variant);
  return remembered(question, [&]() -> Answer {
    const c10::DeviceGuard guard(step.on.device());
    const auto setting = setting_on(step.on, step.layout, step.variant);
    if (!setting) return {};
    Answer answer;
    double least = HUGE_VAL;
    for (const Option& option : options_for(step.op, step.problem, *setting)) {
      const native::HopperScope scope(option.hopper);
      auto found = known_of(step.op, step.problem, *setting, option);
      if (!found) {
        const std::string key = each ? problem_key(step.op, step.problem, *setting, option)
                                     : choices::class_of(step.op, step.problem, *setting, option.selection);
        found = proof::verdict(key, step.on, [&] { return proof::conv2d(step, option.selection, run, rehearse); });
      }
      if (!found) answer.lasts = false;
      if (!found || !found->native_wins() || share_of(*found) >= least) continue;
      answer.winner = option.winner(), least = share_of(*found);
    }
    return answer;
  });
}

}  // namespace

const char* to_string(Op op) { return kNames[static_cast<size_t>(op)]; }
const char* to_string(Computer computer) { return kComputers[static_cast<size_t>(computer)]; }

const char* obstacle_in(const Tensor& tensor) {
  // Transforms and forward-mode AD want formulas that a node in C++ cannot give, and torch has.
  constexpr c10::DispatchKeySet transforms(
      {c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper});
  if (tensor.key_set().has_any(transforms)) return "a tensor belongs to a torch.func transform";
  if (has_tangent(tensor)) return "a tensor has a forward-mode gradient";
  if (tensor.layout() != at::kStrided || tensor.is_nested()) return "a tensor is not a dense, strided one";
  if (!at::isFloatingType(tensor.scalar_type())) return kNotFloating;
  return nullptr;
}

Route route(Op op, Backend backend, const Facts& facts) {
  const bool demanded = is_own(backend) && has_kernels(op);
  if (facts.obstacle) {
    if (demanded) {
      const bool of_dtype = facts.obstacle == kNotFloating;
      refuse(to_string(op), backend,
             facts.obstacle + (of_dtype ? std::string(", got ") + c10::toString(facts.dtype) : ""));
    }
    return {Computer::formula, facts.obstacle};
  }
  if (demanded) {
    check_demand(op, backend, facts);
    return {Computer::kernels, "as demanded"};
  }
  if (!facts.records && keeps_for_gradient_alone(op)) {
    return {Computer::formula, "no gradient is recorded, so there is nothing to keep"};
  }
  return automatic(op, backend, facts);
}

void refuse(std::string_view what, Backend backend, const std::string& why) {
  TORCH_CHECK(false, "backend='", to_string(backend), "' cannot compute ", what, ": ", why,
              "; backend='aten' computes it");
}

Tensor computed_by_choice(const Conv2dStep& step, Backend backend, Run run, Rehearse rehearse) {
  if (backend != Backend::automatic) {
    route_step(op_of(step.op), backend, step.on);  // refuses what cannot be
    return run(backend);
  }
  const Winner winner = proven(step, run, rehearse);
  if (winner == Winner::torch) return run(Backend::aten);
  try {
    const native::HopperScope scope(winner == Winner::hopper);
    return run(*choices::candidate_on(step.on.device().type()));
  } catch (const c10::OutOfMemoryError&) {
    // Of copies and partial sums that torch's way may do without. Where results are to repeat, memory must not decide.
    if (proof::must_be_repeatable()) throw;
  }
  return run(Backend::aten);
}

Foreseen foreseen(Operator op, const Conv2dProblem& problem, const choices::Setting& setting) {
  const auto candidate = choices::candidate_on(setting.device);
  Foreseen result = {
      Backend::aten, "",
      proof::must_be_repeatable() ? "ATen, since results are to repeat and no choice was loaded" : choices::kRule};
  if (!candidate) return result;
  if (copies_too_much(op, problem, setting))
    result.why = "ATen: in NCHW an own wgrad of this size copies too much memory";
  double least = HUGE_VAL;
  for (const Option& option : options_for(op, problem, setting)) {
    const auto found = known_of(op, problem, setting, option);
    if (!found || (found->agree && share_of(*found) >= least)) continue;
    if (!found->agree) {
      if (least == HUGE_VAL) result.why = "held against ATen, " + found->note;
      continue;
    }
    least = share_of(*found);
    const std::string why = "measured: ATen " + in_microseconds(found->aten_seconds) + ", own kernel " +
                            in_microseconds(found->native_seconds);
    result = {found->native_wins() ? *candidate : Backend::aten, option.selection.kernel, why};
  }
  return result;
}

}  // namespace freezekit
