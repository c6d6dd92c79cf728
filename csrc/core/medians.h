// Which of two ways is faster: medians of runs that take turns, so that both meet the same clock, caches and neighbours.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

namespace freezekit {

inline double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

// Medians of `runs` (odd) runs of each; `seconds(way)` runs it once and says how long it took.
template <class Seconds, class First, class Second>
std::pair<double, double> interleaved_medians(int runs, Seconds seconds, First first, Second second) {
  std::vector<double> of_first, of_second;
  for (int i = 0; i < runs; ++i) {
    of_first.push_back(seconds(first));
    of_second.push_back(seconds(second));
  }
  return {median(std::move(of_first)), median(std::move(of_second))};
}

}  // namespace freezekit
