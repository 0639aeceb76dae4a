// What the parts of the stand-in share: counters, names of kernels, and the rules of a capture.
#pragma once
#include <cuda_runtime_api.h>

#include <atomic>
#include <string>

#include "libraries.h"

namespace stand_in {

// Each counter has the name of a field of `Counts` in __init__.py.
#define STAND_IN_COUNTERS(X) \
  X(launches)                \
  X(library_calls)           \
  X(syncs)                   \
  X(device_to_host)          \
  X(host_to_device)          \
  X(device_to_device)        \
  X(memsets)                 \
  X(mallocs)                 \
  X(illegal)                 \
  X(outside)

struct Counters {
#define STAND_IN_FIELD(name) std::atomic<long> name{0};
  STAND_IN_COUNTERS(STAND_IN_FIELD)
#undef STAND_IN_FIELD
};
extern Counters counters;

// Give the kernel whose host function is `function` its mangled name.
void name_kernel(const void *function, const char *name);
// Count a launch of that kernel for the list of kernels.
void record_kernel(const void *function);
// Count a call of a library, or anything else that has no function, for the same list.
void record_name(const std::string &name);

// Every failure passes through here: PyTorch reads the error of a launch by cudaGetLastError.
// `call`, if known, is the function that is refused; the text of the error names it.
cudaError_t fail(cudaError_t error, const char *call = nullptr);

// ---- captures (capture.cc); each returns what CUDA would return ----

// Work is queued on `stream`. If the stream is captured, the work becomes a node of the graph and
// `*captured` true: it must not be done now. If another stream is captured, it is `outside`.
cudaError_t queue_work(cudaStream_t stream, bool *captured = nullptr);
// `call` waits for `stream`.
cudaError_t wait_for_stream(cudaStream_t stream, const char *call);
// `call` waits for the whole device.
cudaError_t wait_for_device(const char *call);
// `call` waits for `event` or asks about it.
cudaError_t look_at_event(cudaEvent_t event, const char *call);
// `call`, such as cudaMalloc, may wait inside the driver. During a capture of a strict mode CUDA
// forbids it, whichever stream it concerns.
cudaError_t unsafe_call(const char *call);

}  // namespace stand_in
