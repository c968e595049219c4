#include "core/step_times.h"

namespace qk {

StepTimes& step_times() {
  static thread_local StepTimes times;
  return times;
}

bool& reuse_memory() {
  static bool reuse = true;
  return reuse;
}

}  // namespace qk
