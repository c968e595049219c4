// What tools and tests ask of the operator network beside its results.
#pragma once
#include <vector>

#include "core/isa.h"

namespace qk {

struct StepTimes {
  bool wanted = false;
  std::vector<double> seconds;  // of each step of this thread's last call
};
QK_EXPORT StepTimes& step_times();  // of this thread

// Whether values that are never alive together share memory: true but where a test compares.
QK_EXPORT bool& reuse_memory();

}  // namespace qk
