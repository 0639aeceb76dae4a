// The CUDA runtime and driver: a device on paper, memory of the host, and launches that do nothing.
#include <cuda.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "stand_in.h"

namespace stand_in {
namespace {

thread_local cudaError_t last_error = cudaSuccess;
thread_local std::string refused;  // the function that the last error names

struct ErrorText {
  const char *name, *text;
};

// The names and texts of CUDA, for the errors that the stand-in returns.
const std::map<cudaError_t, ErrorText> error_texts = {
#define STAND_IN_ERROR(error, text) {error, {#error, text}}
    STAND_IN_ERROR(cudaSuccess, "no error"),
    STAND_IN_ERROR(cudaErrorInvalidValue, "invalid argument"),
    STAND_IN_ERROR(cudaErrorMemoryAllocation, "out of memory"),
    STAND_IN_ERROR(cudaErrorIllegalState, "the operation cannot be performed in the present state"),
    STAND_IN_ERROR(cudaErrorStreamCaptureUnsupported,
                   "operation not permitted when stream is capturing"),
    STAND_IN_ERROR(cudaErrorStreamCaptureInvalidated,
                   "operation failed due to a previous error during capture"),
    STAND_IN_ERROR(cudaErrorStreamCaptureMerge,
                   "operation would result in a merge of separate capture sequences"),
    STAND_IN_ERROR(cudaErrorStreamCaptureUnmatched, "capture was not ended in its original stream"),
    STAND_IN_ERROR(cudaErrorStreamCaptureUnjoined, "capturing stream has unjoined work"),
    STAND_IN_ERROR(cudaErrorStreamCaptureIsolation,
                   "dependency created on uncaptured work in another stream"),
    STAND_IN_ERROR(cudaErrorStreamCaptureWrongThread,
                   "attempt to terminate a thread-local capture sequence from another thread"),
#undef STAND_IN_ERROR
};

// An H100, so that PyTorch takes the paths of a current card. Only what it reads is set.
constexpr int kThreadsPerBlock = 1024;
constexpr int kProcessors = 132;
constexpr size_t kMemory = size_t{80} << 30;
constexpr int kSharedPerBlock = 48 << 10;
constexpr int kSharedPerProcessor = 228 << 10;
constexpr int kSharedOptIn = 227 << 10;
constexpr int kRegisters = 64 << 10;
constexpr int kGridX = 2147483647, kGridYZ = 65535;

std::mutex mutex;
std::map<const char *, size_t> blocks;  // of the device: their sizes by their starts
std::map<const char *, size_t> pinned;

bool holds(const std::map<const char *, size_t> &memory, const void *address) {
  auto *byte = static_cast<const char *>(address);
  auto after = memory.upper_bound(byte);
  return after != memory.begin() && byte < std::prev(after)->first + std::prev(after)->second;
}

cudaMemoryType type_of(const void *address) {
  std::lock_guard lock(mutex);
  if (holds(blocks, address)) return cudaMemoryTypeDevice;
  return holds(pinned, address) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
}

void count_copy(void *to, const void *from, cudaMemcpyKind kind) {
  bool to_device = type_of(to) == cudaMemoryTypeDevice;
  bool from_device = type_of(from) == cudaMemoryTypeDevice;
  if (kind != cudaMemcpyDefault) {
    to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  }
  if (to_device && from_device) counters.device_to_device++;
  else if (to_device) counters.host_to_device++;
  else if (from_device) counters.device_to_host++;
}

cudaError_t launch(const void *function, cudaStream_t stream) {
  counters.launches++;
  record_kernel(function);
  return queue_work(stream);
}

// What `<<<blocks, threads, shared, stream>>>` passes to the kernel's host function.
struct Configuration {
  dim3 blocks, threads;
  size_t shared;
  cudaStream_t stream;
};
thread_local std::vector<Configuration> configurations;

}  // namespace

cudaError_t fail(cudaError_t error, const char *call) {
  refused = call ? call : "";
  return last_error = error;
}

}  // namespace stand_in

using namespace stand_in;

extern "C" {

// ---- device ----

cudaError_t cudaGetDeviceCount(int *count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int) {
  *properties = {};
  std::strcpy(properties->name, "stand-in");
  properties->major = 9;
  properties->minor = 0;
  properties->multiProcessorCount = kProcessors;
  properties->totalGlobalMem = kMemory;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = kThreadsPerBlock;
  properties->maxThreadsPerMultiProcessor = 2 * kThreadsPerBlock;
  properties->maxBlocksPerMultiProcessor = 32;
  properties->sharedMemPerBlock = kSharedPerBlock;
  properties->sharedMemPerBlockOptin = kSharedOptIn;
  properties->sharedMemPerMultiprocessor = kSharedPerProcessor;
  properties->regsPerBlock = properties->regsPerMultiprocessor = kRegisters;
  properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = kThreadsPerBlock;
  properties->maxThreadsDim[2] = 64;
  properties->maxGridSize[0] = kGridX;
  properties->maxGridSize[1] = properties->maxGridSize[2] = kGridYZ;
  properties->l2CacheSize = 50 << 20;
  properties->textureAlignment = 512;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
  static const std::map<cudaDeviceAttr, int> values = {
      {cudaDevAttrComputeCapabilityMajor, 9},
      {cudaDevAttrComputeCapabilityMinor, 0},
      {cudaDevAttrMaxThreadsPerBlock, kThreadsPerBlock},
      {cudaDevAttrMaxThreadsPerMultiProcessor, 2 * kThreadsPerBlock},
      {cudaDevAttrMultiProcessorCount, kProcessors},
      {cudaDevAttrWarpSize, 32},
      {cudaDevAttrMaxRegistersPerBlock, kRegisters},
      {cudaDevAttrMaxSharedMemoryPerBlock, kSharedPerBlock},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, kSharedOptIn},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, kSharedPerProcessor},
      {cudaDevAttrMaxGridDimX, kGridX},
      {cudaDevAttrMaxGridDimY, kGridYZ},
      {cudaDevAttrMaxGridDimZ, kGridYZ},
  };
  auto found = values.find(attribute);
  *value = found == values.end() ? 1 : found->second;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *name, int size, int) {
  std::strncpy(name, "0000:00:00.0", size);
  return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int, int) {
  *can = 0;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() { return wait_for_device(__func__); }

// ---- errors ----

cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

const char *cudaGetErrorName(cudaError_t error) {
  auto found = error_texts.find(error);
  return found == error_texts.end() ? "unknown" : found->second.name;
}

const char *cudaGetErrorString(cudaError_t error) {
  static thread_local std::string text;
  auto found = error_texts.find(error);
  text = found == error_texts.end() ? "unknown error" : found->second.text;
  if (error != cudaSuccess && !refused.empty()) text += " (" + refused + ")";
  return text.c_str();
}

// ---- memory ----

cudaError_t cudaMalloc(void **start, size_t size) {
  counters.mallocs++;
  *start = nullptr;
  if (size == 0) return cudaSuccess;
  if (auto error = unsafe_call(__func__)) return error;
  // Nothing is written to most of it, so it costs nothing: a page is there once it is touched.
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void *block = mmap(nullptr, size, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (block == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
  std::lock_guard lock(mutex);
  blocks[static_cast<char *>(*start = block)] = size;
  return cudaSuccess;
}

cudaError_t cudaFree(void *start) {
  if (!start) return cudaSuccess;
  if (auto error = unsafe_call(__func__)) return error;
  std::lock_guard lock(mutex);
  auto found = blocks.find(static_cast<char *>(start));
  if (found == blocks.end()) return fail(cudaErrorInvalidValue);
  munmap(start, found->second);
  blocks.erase(found);
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
  *available = *total = kMemory;
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **start, size_t size, unsigned) {
  if (auto error = unsafe_call(__func__)) return error;
  std::lock_guard lock(mutex);
  *start = std::aligned_alloc(4096, (size + 4095) & ~size_t{4095});
  pinned[static_cast<char *>(*start)] = size;
  return cudaSuccess;
}

cudaError_t cudaMallocHost(void **start, size_t size) { return cudaHostAlloc(start, size, 0); }

cudaError_t cudaFreeHost(void *start) {
  if (auto error = unsafe_call(__func__)) return error;
  std::lock_guard lock(mutex);
  pinned.erase(static_cast<char *>(start));
  std::free(start);
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *address) {
  *attributes = {};
  attributes->type = type_of(address);
  attributes->devicePointer = const_cast<void *>(address);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  count_copy(to, from, kind);
  bool captured;
  auto error = queue_work(stream, &captured);
  if (!captured) std::memmove(to, from, size);
  return error;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t size, cudaMemcpyKind kind) {
  count_copy(to, from, kind);
  std::memmove(to, from, size);
  return wait_for_stream(nullptr, __func__);
}

cudaError_t cudaMemsetAsync(void *start, int value, size_t size, cudaStream_t stream) {
  counters.memsets++;
  bool captured;
  auto error = queue_work(stream, &captured);
  if (!captured) std::memset(start, value, size);
  return error;
}

cudaError_t cudaMemset(void *start, int value, size_t size) {
  return cudaMemsetAsync(start, value, size, nullptr);
}

cudaError_t cudaGetSymbolAddress(void **address, const void *) {
  static char symbols[1 << 16];  // what kernels keep there, no kernel reads
  *address = symbols;
  return cudaSuccess;
}

// ---- streams and events ----

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned, int) {
  *stream = static_cast<cudaStream_t>(new_handle());
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) {
  return cudaStreamCreateWithPriority(stream, 0, 0);
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) {
  return cudaStreamCreateWithPriority(stream, 0, 0);
}

cudaError_t cudaStreamGetPriority(cudaStream_t, int *priority) {
  *priority = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return wait_for_stream(stream, __func__); }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) {
  *event = static_cast<cudaEvent_t>(new_handle());
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1;
  return cudaSuccess;
}

// ---- kernels ----

void __cudaRegisterFunction(void **, const char *function, char *, const char *name, int, uint3 *,
                            uint3 *, dim3 *, dim3 *, int *) {
  name_kernel(function, name);
}

unsigned __cudaPushCallConfiguration(dim3 blocks, dim3 threads, size_t shared,
                                     cudaStream_t stream) {
  configurations.push_back({blocks, threads, shared, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *blocks, dim3 *threads, size_t *shared, void *stream) {
  auto &given = configurations.back();
  *blocks = given.blocks;
  *threads = given.threads;
  *shared = given.shared;
  *static_cast<cudaStream_t *>(stream) = given.stream;
  configurations.pop_back();
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void *>(function));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void **, size_t,
                               cudaStream_t stream) {
  return launch(kernel, stream);
}

cudaError_t cudaLaunchKernel(const void *function, dim3, dim3, void **, size_t,
                             cudaStream_t stream) {
  return launch(function, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **) {
  return launch(function, config->stream);
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, const void *) {
  *attributes = {};
  attributes->maxThreadsPerBlock = kThreadsPerBlock;
  attributes->numRegs = 32;
  attributes->binaryVersion = attributes->ptxVersion = 90;
  attributes->maxDynamicSharedSizeBytes = kSharedPerBlock;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *, int,
                                                                   size_t, unsigned) {
  *count = 2;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *count, const void *function,
                                                          int size, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(count, function, size, shared, 0);
}

// ---- driver ----

CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned *flags, int *is_active) {
  *flags = 0;
  *is_active = 1;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice) {
  return cuCtxGetCurrent(context);
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  static char only;
  *context = reinterpret_cast<CUcontext>(&only);
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult, const char **text) {
  *text = "error of the stand-in";
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned, unsigned, unsigned, unsigned, unsigned,
                        unsigned, unsigned, CUstream stream, void **, void **) {
  return static_cast<CUresult>(launch(function, stream));
}

// PyTorch asks for functions of the driver by name. Those that are not defined above do nothing.
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult *result) {
  static int (*const do_nothing)() = [] { return 0; };
  *function = dlsym(RTLD_DEFAULT, name);
  if (!*function) *function = reinterpret_cast<void *>(do_nothing);
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
}
