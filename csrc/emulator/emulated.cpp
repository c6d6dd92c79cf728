// What the emulated build of the kernels exports beside freezekit_kernel_table() and freezekit_last_error(): its
// settings and counters. Needs g++ alone:
//
//   g++ -std=c++17 -O2 -fPIC -shared -fvisibility=hidden -Wno-unknown-pragmas -Icsrc
//       -x c++ csrc/emulator/*.cpp csrc/kernels/*.cu -o freezekit/_emulated.so
#include <cstring>

#include "emulator/emulator.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using freezekit::emulator::Counters;
using freezekit::emulator::CpAsync;

struct Named {
  const char* name;
  uint64_t Counters::* value;
};

constexpr Named kCounters[] = {
    {"launches", &Counters::launches},
    {"blocks", &Counters::blocks},
    {"switches", &Counters::switches},
    {"cp_async", &Counters::cp_async},
    {"mma", &Counters::mma},
    {"tensor_copies", &Counters::tensor_copies},
    {"wgmma", &Counters::wgmma},
    {"ldmatrix_phases", &Counters::ldmatrix_phases},
    {"ldmatrix_conflicts", &Counters::ldmatrix_conflicts},
    {"global_read_bytes", &Counters::global_read_bytes},
    {"global_write_bytes", &Counters::global_write_bytes},
};

}  // namespace

EXPORT void freezekit_emulator_set_seed(unsigned seed) { freezekit::emulator::settings.seed = seed; }

// "lazy", "eager" or "mixed"; false for any other.
EXPORT bool freezekit_emulator_set_cp_async(const char* mode) {
  constexpr const char* kNames[] = {"lazy", "eager", "mixed"};
  for (int i = 0; i < 3; i++) {
    if (std::strcmp(mode, kNames[i]) != 0) continue;
    freezekit::emulator::settings.cp_async = static_cast<CpAsync>(i);
    return true;
  }
  return false;
}

// Name of the i-th counter, null past the last one.
EXPORT const char* freezekit_emulator_counter_name(int i) {
  return i >= 0 && i < static_cast<int>(sizeof kCounters / sizeof *kCounters) ? kCounters[i].name : nullptr;
}

// Value of the counter of that name, 2^64 - 1 where there is none.
EXPORT uint64_t freezekit_emulator_counter(const char* name) {
  for (const Named& counter : kCounters) {
    if (std::strcmp(counter.name, name) == 0) return freezekit::emulator::counters.*counter.value;
  }
  return ~uint64_t{0};
}

EXPORT void freezekit_emulator_reset_counters() { freezekit::emulator::counters = {}; }
