#include "torch/enable/operator.h"

#include <utility>

namespace freezekit::enable {
namespace {

std::vector<AnyOperator*>& all() {
  static std::vector<AnyOperator*> operators;
  return operators;
}

// Torch registers once and for good: its kernels stay callable.
bool is_torch_s(const std::string& registered) {
  for (const char* source : {"/torch/csrc/autograd/generated/VariableType", "RegisterCompositeImplicitAutograd"}) {
    if (registered.find(source) != std::string::npos) return true;
  }
  return false;
}

class Forward : public c10::OperatorKernel {
 public:
  explicit Forward(c10::SafeKernelFunction kernel) : kernel_(std::move(kernel)) {}
  void operator()(const c10::OperatorHandle& op, DispatchKeySet keys, torch::jit::Stack* stack) {
    kernel_.callBoxed(op, keys, stack);
  }

 private:
  c10::SafeKernelFunction kernel_;
};

}  // namespace

AnyOperator::AnyOperator(const char* name, torch::CppFunction (*stand_in)()) : name_(name), stand_in_(stand_in) {
  all().push_back(this);
}

// False where the kernel of `key` is not torch's own.
bool AnyOperator::find_stock(c10::DispatchKey key) {
  const std::string name = name_, base = name.substr(0, name.find('.'));
  const std::string overload = name.size() > base.size() ? name.substr(base.size() + 1) : "";
  const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(("aten::" + base).c_str(), overload.c_str());
  if (handle.hasKernelForDispatchKey(key)) return false;
  auto kernel = handle.getComputedKernelForDispatchKey(key);
  if (!is_torch_s(kernel.debug())) return false;
  if (stock_.isValid()) return true;
  stock_ = c10::KernelFunction::makeFromBoxedFunctor(std::make_unique<Forward>(std::move(kernel)));
  bind(handle);
  return true;
}

std::vector<std::string> AnyOperator::take_over(torch::Library& library, c10::DispatchKey key) {
  std::vector<std::string> others;
  for (AnyOperator* op : all()) {
    if (op->find_stock(key)) {
      library.impl(op->name_, op->stand_in_());
    } else {
      others.emplace_back(op->name_);
    }
  }
  return others;
}

std::vector<std::string> AnyOperator::names() {
  std::vector<std::string> names;
  for (const AnyOperator* op : all()) names.emplace_back(op->name_);
  return names;
}

}  // namespace freezekit::enable
