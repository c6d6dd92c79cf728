// Operators whose schemas are flat lists of arguments, and whose C++ functions take the settings of a call as one struct.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace freezekit {

template <class... T>
struct Arguments {};

template <class Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// An operator on operands, then settings. `Settings` has
//   using Flat = Arguments<...>;           the C++ types of the arguments that it stands for, in the schema's order
//   Settings(Flat...);
//   apply(f), which calls f(Flat...)
template <class Settings, class Signature, class Flat = typename Settings::Flat>
class SettingsOperator;

template <class Settings, class Result, class... Operands, class... Flat>
class SettingsOperator<Settings, Result(Operands...), Arguments<Flat...>> {
 public:
  using Function = Result (*)(Operands..., const Settings&);

  explicit SettingsOperator(const char* name) : handle_(find_operator<Result(Operands..., Flat...)>(name)) {}

  // Enters torch's dispatcher.
  Result operator()(Operands... operands, const Settings& settings) const {
    return settings.apply([&](Flat... flat) -> Result { return handle_.call(operands..., flat...); });
  }

  // What the dispatcher calls: kFunction behind the schema's flat arguments.
  template <Function kFunction>
  static Result kernel(Operands... operands, Flat... flat) {
    return kFunction(operands..., Settings(flat...));
  }

 private:
  c10::TypedOperatorHandle<Result(Operands..., Flat...)> handle_;
};

}  // namespace freezekit
