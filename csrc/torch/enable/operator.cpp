#include "torch/enable/operator.h"

#include <string_view>
#include <utility>

namespace freezekit::enable {
namespace {

std::vector<AnyStandIn*>& all() {
  static std::vector<AnyStandIn*> operators;
  return operators;
}

c10::OperatorHandle find(const std::string& name) {
  const std::string base = name.substr(0, name.find('.'));
  const std::string overload = name.size() > base.size() ? name.substr(base.size() + 1) : "";
  return c10::Dispatcher::singleton().findSchemaOrThrow(("aten::" + base).c_str(), overload.c_str());
}

// What is registered for an operator, as torch prints it: a line for each key. A look at the kernels would be shorter,
// and leave something behind in them each time.
std::string table_of(const char* name) { return find(name).dumpState(); }

// Whether another library's kernel answers on a key; `key` as in the lines, with "[alias]" for some.
bool has_other(const std::string& lines, const std::string& key) {
  const auto begin = lines.find("\n" + key + ": ");
  if (begin == std::string::npos) return false;
  const std::string line = lines.substr(begin + 1, lines.find('\n', begin + 1) - begin);
  const auto has = [&line](const char* source) { return line.find(source) != std::string::npos; };
  return !has("/torch/csrc/autograd/generated/VariableType") && !has("/aten/src/ATen/Register");
}

bool has_other_autograd(const std::string& lines, c10::DispatchKey key) {
  return has_other(lines, c10::toString(key)) || has_other(lines, "Autograd[alias]") ||
         has_other(lines, "CompositeImplicitAutograd[alias]");
}

// Below autograd. What torch itself has for Meta is registered from Python, as others' kernels are.
bool has_other_kernel(const std::string& lines, c10::DispatchKey autograd) {
  const auto key = c10::toRuntimePerBackendFunctionalityKey(c10::DispatchKey::Dense, c10::toBackendComponent(autograd));
  return key != c10::DispatchKey::Meta &&
         (has_other(lines, c10::toString(key)) || has_other(lines, "CompositeExplicitAutograd[alias]"));
}

}  // namespace

AnyStandIn::AnyStandIn(const char* name, torch::CppFunction (*stand_in)(), const char* computes)
    : name_(name), stand_in_(stand_in), computes_(computes) {
  all().push_back(this);
}

std::vector<std::string> AnyStandIn::take_over(c10::ArrayRef<torch::Library*> libraries,
                                               c10::ArrayRef<c10::DispatchKey> keys) {
  std::vector<std::pair<AnyStandIn*, torch::Library*>> free;
  std::vector<std::string> others;
  for (AnyStandIn* op : all()) {
    op->bind(find(op->name_));
    const std::string own = table_of(op->name_);
    const std::string computed = !op->computes_                                 ? ""
                                 : std::string_view(op->computes_) == op->name_ ? own
                                                                                : table_of(op->computes_);
    const size_t before = free.size();
    for (size_t i = 0; i < keys.size(); ++i) {
      const bool is_taken = has_other_autograd(own, keys[i]) || has_other_autograd(computed, keys[i]) ||
                            has_other_kernel(computed, keys[i]) ||
                            (op->computes_ && has_other_kernel(own, keys[i]));  // an operator that torch composes
      if (!is_taken) free.emplace_back(op, libraries[i]);
    }
    if (free.size() < before + keys.size()) others.emplace_back(op->name_);
  }
  // Not before: what is registered already looks like another library's.
  for (const auto& [op, library] : free) library->impl(op->name_, op->stand_in_());
  return others;
}

std::vector<std::string> AnyStandIn::names() {
  std::vector<std::string> names;
  for (const AnyStandIn* op : all()) names.emplace_back(op->name_);
  return names;
}

}  // namespace freezekit::enable
