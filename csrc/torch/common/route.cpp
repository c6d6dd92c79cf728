#include "torch/common/route.h"

#include <ATen/Context.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>
#include <unordered_map>

#include "torch/backends/layer_proofs.h"

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

// The verdicts that this thread has asked for, as long as nothing new is known: a call must not pay for texts.
bool remembered(const std::string& question, const std::function<std::optional<bool>()>& answer) {
  thread_local uint64_t generation = 0;
  thread_local std::unordered_map<std::string, bool> known;
  if (generation != choices::generation()) known.clear(), generation = choices::generation();
  if (const auto found = known.find(question); found != known.end()) return found->second;
  const auto verdict = answer();
  const bool lasts = verdict || proof::must_be_repeatable();  // there, nothing is found out later
  if (lasts && generation == choices::generation()) known[question] = verdict.value_or(false);
  return verdict.value_or(false);
}

template <class... Numbers>
std::string question_of(const Tensor& on, Numbers... numbers) {
  const std::array<int64_t, sizeof...(numbers) + 3> all = {on.device().index(), static_cast<int64_t>(on.scalar_type()),
                                                           proof::must_be_repeatable(),
                                                           static_cast<int64_t>(numbers)...};
  return {reinterpret_cast<const char*>(all.data()), sizeof all};
}

constexpr int64_t kLarge = 1 << 20;  // elements; below, most of a layer's time is its launch's

choices::Setting setting_on(const Tensor& on, at::MemoryFormat layout, std::string_view variant = {}) {
  const auto device = on.device().type();
  const Backend candidate = *choices::candidate_on(device);
  return {on.scalar_type(), layout, device, native::target_on(kernel_library(candidate), candidate), variant};
}

std::string layer_key(Op layer, const Tensor& on, bool large, at::MemoryFormat layout) {
  const char* const name = layer != Op::max_pool2d                    ? ""
                           : layout == at::MemoryFormat::ChannelsLast ? "channels_last"
                                                                      : "contiguous";
  return choices::key_of(to_string(layer), large, name, setting_on(on, layout));
}

// Whether freezekit's kernels agreed with torch's, whatever the size and whoever was faster: below autograd, where taps
// or bits are what is at hand, the other way is longer than both. Taps are there in a layout that was proven: that of the
// other tensor does not matter.
bool agreed(Op op, const Tensor& on) {
  const auto own = on.suggest_memory_format();
  return remembered(question_of(on, op, own, /*agreed=*/true), [&]() -> std::optional<bool> {
    const c10::DeviceGuard guard(on.device());
    const bool has_taps = op == Op::max_pool2d_scatter || op == Op::max_pool2d_gather;
    for (const Op layer : proven_with(op)) {
      for (const bool large : {false, true}) {
        for (const auto layout : {at::MemoryFormat::Contiguous, at::MemoryFormat::ChannelsLast}) {
          if (layout != own && !has_taps) continue;
          const auto found = choices::find(layer_key(layer, on, large, layout));
          if (found && found->agree) return true;
        }
      }
    }
    return false;
  });
}

bool can_be_held(Op layer, const Tensor& on) {
  return layer == Op::max_pool2d ? proof::is_image_batch(on) : proof::is_dense(on);
}

// Whether freezekit's kernels won, or win now.
bool won(Op op, const Tensor& on) {
  const Op layer = *proven_with(op).begin();
  const bool large = on.numel() >= kLarge;
  const auto layout = on.suggest_memory_format();
  return remembered(question_of(on, op, layout, /*agreed=*/false, large), [&]() -> std::optional<bool> {
    if (!can_be_held(layer, on)) return std::nullopt;
    const c10::DeviceGuard guard(on.device());
    const auto found = proof::verdict(layer_key(layer, on, large, layout), on, [&] {
      if (layer == Op::max_pool2d) return proof::max_pool2d(on);
      return layer == Op::dropout ? proof::dropout(on)
                                  : proof::activations(on, *choices::candidate_on(on.device().type()));
    });
    return found ? std::make_optional(found->native_wins()) : std::nullopt;
  });
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

// How far two ways of summing may be apart, as proof::Contest says it: by the rounding of what is multiplied and stored, or
// by that of the sums, whose error grows with the root of their length. Winograd's transforms, which torch may choose,
// lose a digit.
double tolerance_of(const Conv2dStep& step, const Target& target) {
  const Conv2dProblem& p = step.problem;
  const int64_t terms = step.op == Operator::fprop   ? p.c_per_group() * p.r * p.s
                        : step.op == Operator::dgrad ? p.k_per_group() * p.r * p.s
                                                     : p.n * p.p * p.q;
  const auto type = step.on.scalar_type();
  const double epsilon =
      type == at::kDouble ? std::numeric_limits<double>::epsilon() : std::numeric_limits<float>::epsilon();
  const double of_sums = 16 * epsilon * (8 + std::sqrt(static_cast<double>(terms)));
  constexpr double tf32 = 0x1p-10, half = 0x1p-10, bfloat16 = 0x1p-7;
  const bool rounds_to_tf32 = type == at::kFloat && step.on.is_cuda() && target.allow_tf32;
  const double of_values = type == at::kHalf ? half : type == at::kBFloat16 ? bfloat16 : rounds_to_tf32 ? tf32 : 0;
  return std::max(of_sums, of_values);
}

// Where torch looks for the fastest way per problem, so is done here; elsewhere one problem speaks for its class.
std::string key_of(const Conv2dStep& step, const choices::Setting& setting, const char* kernel) {
  return at::globalContext().benchmarkCuDNN() ? choices::key_of(step.op, step.problem, setting)
                                              : choices::class_of(step.op, step.problem, setting, kernel);
}

// The backend that is proven for this problem, now or before; ATen where none is.
Backend proven(const Conv2dStep& step, const Run& run) {
  const auto dtype = native::dtype_of(step.on.scalar_type());
  if (!dtype || step.on.layout() != at::kStrided) return Backend::aten;
  const Backend candidate = *choices::candidate_on(step.on.device().type());
  const auto& context = at::globalContext();
  std::string question = question_of(step.on, op_of(step.op), step.layout, context.benchmarkCuDNN(),
                                     context.allowTF32CuDNN(at::Float32Op::CONV));
  question.append(reinterpret_cast<const char*>(&step.problem), sizeof step.problem).append(step.variant);
  const bool wins = remembered(question, [&]() -> std::optional<bool> {
    const c10::DeviceGuard guard(step.on.device());
    const choices::Setting setting = setting_on(step.on, step.layout, step.variant);
    const Selection selection = select(step.op, step.problem, *dtype, setting.target);
    if (selection.family == Family::none) return false;
    // A choice for the very problem may have been loaded, whoever measures what.
    auto found = choices::find(choices::key_of(step.op, step.problem, setting));
    if (!found || (proof::must_be_repeatable() && !found->loaded)) {
      found = proof::verdict(key_of(step, setting, selection.kernel), step.on, [&] {
        proof::Contest contest;
        contest.run = [&](Backend on) { return std::vector<Tensor>{run(on)}; };
        contest.tolerance = tolerance_of(step, setting.target);
        if (step.faults) contest.faults = [&](const std::vector<Tensor>& own) { return step.faults(own[0]); };
        return contest;
      });
    }
    return found ? std::make_optional(found->native_wins()) : std::nullopt;
  });
  return wins ? candidate : Backend::aten;
}

}  // namespace

const char* to_string(Op op) { return kNames[static_cast<size_t>(op)]; }
const char* to_string(Computer computer) { return kComputers[static_cast<size_t>(computer)]; }

const char* obstacle_in(const Tensor& tensor) {
  // Transforms and forward-mode AD want formulas that a node in C++ cannot give, and torch has.
  constexpr c10::DispatchKeySet transforms(
      {c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper});
  if (tensor.key_set().has_any(transforms)) return "a tensor belongs to a torch.func transform";
  if (torch::autograd::isFwGradDefined(tensor)) return "a tensor has a forward-mode gradient";
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

Tensor computed_by_choice(const Conv2dStep& step, Backend backend, const Run& run) {
  if (backend != Backend::automatic) {
    route_step(op_of(step.op), backend, step.on);  // refuses what cannot be
    return run(backend);
  }
  const native::WithoutHopper without_hopper;  // what is chosen never leads there
  return run(proven(step, run));
}

Foreseen foreseen(Operator op, const Conv2dProblem& problem, const choices::Setting& setting, const char* kernel) {
  const auto candidate = choices::candidate_on(setting.device);
  auto found = candidate ? choices::find(choices::key_of(op, problem, setting)) : std::nullopt;
  if (candidate && !found) found = choices::find(choices::class_of(op, problem, setting, kernel));
  if (!found) return {Backend::aten, choices::kRule};
  if (!found->agree) return {Backend::aten, "held against ATen, " + found->note};
  return {found->native_wins() ? *candidate : Backend::aten, "measured: ATen " + in_microseconds(found->aten_seconds) +
                                                                 ", own kernel " +
                                                                 in_microseconds(found->native_seconds)};
}

}  // namespace freezekit
