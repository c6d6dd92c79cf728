// interleaved_medians on a fake clock.
#include "core/medians.h"

#include <cstdio>
#include <string>

using freezekit::interleaved_medians;

int main() {
  std::string turns;
  int run = 0;
  const auto seconds = [&](char way) {
    turns += way;
    if (way == 'a') return run++ == 2 ? 100.0 : 2.0;  // an interruption
    return 3.0;
  };
  const auto [first, second] = interleaved_medians(5, seconds, 'a', 'b');
  const bool right = first == 2.0 && second == 3.0 && turns == "ababababab";
  if (!right) std::printf("medians %g and %g after %s\n", first, second, turns.c_str());
  return right ? 0 : 1;
}
