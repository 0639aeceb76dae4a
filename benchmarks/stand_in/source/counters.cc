// The counters and the list of kernels, and the functions by which Python reads them.
#include <map>
#include <mutex>
#include <unordered_map>

#include "stand_in.h"

namespace stand_in {

Counters counters;

namespace {
// Kernels register while libraries load, before this file's own statics would exist.
struct Kernels {
  std::mutex mutex;
  std::unordered_map<const void *, std::string> names;
  std::unordered_map<const void *, long> by_function;
  std::map<std::string, long> by_name;
};
Kernels &kernels() {
  static auto *only = new Kernels;
  return *only;
}
}  // namespace

void name_kernel(const void *function, const char *name) {
  std::lock_guard lock(kernels().mutex);
  kernels().names[function] = name;
}

void record_kernel(const void *function) {
  std::lock_guard lock(kernels().mutex);
  kernels().by_function[function]++;
}

void record_name(const std::string &name) {
  std::lock_guard lock(kernels().mutex);
  kernels().by_name[name]++;
}

}  // namespace stand_in

using namespace stand_in;

extern "C" {

// The names of the counters, each followed by a space, in the order of stand_in_counts.
const char *stand_in_names() {
#define STAND_IN_NAME(name) #name " "
  return STAND_IN_COUNTERS(STAND_IN_NAME);
#undef STAND_IN_NAME
}

void stand_in_counts(long *values) {
#define STAND_IN_VALUE(name) *values++ = counters.name;
  STAND_IN_COUNTERS(STAND_IN_VALUE)
#undef STAND_IN_VALUE
}

void stand_in_reset() {
#define STAND_IN_RESET(name) counters.name = 0;
  STAND_IN_COUNTERS(STAND_IN_RESET)
#undef STAND_IN_RESET
  std::lock_guard lock(kernels().mutex);
  kernels().by_function.clear();
  kernels().by_name.clear();
}

// Lines of "COUNT NAME". The text is valid until the next call.
const char *stand_in_kernels() {
  static std::string text;
  std::lock_guard lock(kernels().mutex);
  auto found = kernels().by_name;
  for (auto &[function, count] : kernels().by_function) {
    auto name = kernels().names.find(function);
    found[name == kernels().names.end() ? "unnamed" : name->second] += count;
  }
  text.clear();
  for (auto &[name, count] : found) text += std::to_string(count) + " " + name + "\n";
  return text.c_str();
}
}
