// cuBLAS and cuDNN: a call that computes is counted, and a question gets the simplest answer.
//
// PyTorch describes a convolution to cuDNN by descriptors with attributes, asks for the engines
// that compute it, makes a plan of one and executes the plan. So this part knows descriptors, and a
// convolution only by its name. BatchNorms in fp32 take older functions, one for each task.
#include <cublasLt.h>
#include <cublas_v2.h>
#include <cudnn.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

#include "stand_in.h"

namespace stand_in {
namespace {

std::mutex mutex;
std::map<const void *, cudaStream_t> streams;  // of the handles

// A descriptor of cuDNN remembers the descriptors that it was given: a plan leads to an engine's
// configuration, that to a graph, and that to an operation, which names the launch.
struct Descriptor {
  cudnnBackendDescriptorType_t type;
  std::vector<Descriptor *> parts;
};

const char *operation_name(const Descriptor &descriptor) {
  switch (descriptor.type) {
    case CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR: return "convolution forward";
    case CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_DATA_DESCRIPTOR:
      return "convolution backward data";
    case CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_FILTER_DESCRIPTOR:
      return "convolution backward filter";
    case CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR: return "matmul";
    default: break;
  }
  for (auto *part : descriptor.parts)
    if (auto *name = operation_name(*part)) return name;
  return nullptr;
}

cudaStream_t stream_of(const void *handle) {
  std::lock_guard lock(mutex);
  auto found = streams.find(handle);
  return found == streams.end() ? nullptr : found->second;
}

int library_call_on(const std::string &name, cudaStream_t stream) {
  counters.library_calls++;
  record_name(name);
  return queue_work(stream);
}

}  // namespace

void *new_handle() { return std::malloc(64); }

void set_stream(const void *handle, cudaStream_t stream) {
  std::lock_guard lock(mutex);
  streams[handle] = stream;
}

int library_call(const char *name, const void *handle) {
  return library_call_on(name, stream_of(handle));
}

}  // namespace stand_in

using namespace stand_in;

extern "C" {

// ---- cuBLAS ----

cublasStatus_t cublasGetMathMode(cublasHandle_t, cublasMath_t *mode) {
  *mode = CUBLAS_DEFAULT_MATH;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetPointerMode(cublasHandle_t, cublasPointerMode_t *mode) {
  *mode = CUBLAS_POINTER_MODE_HOST;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatmulPreference_t, int,
                                              cublasLtMatmulHeuristicResult_t results[],
                                              int *count) {
  results[0] = {};
  *count = 1;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t, const void *, const void *,
                              cublasLtMatrixLayout_t, const void *, cublasLtMatrixLayout_t,
                              const void *, const void *, cublasLtMatrixLayout_t, void *,
                              cublasLtMatrixLayout_t, const cublasLtMatmulAlgo_t *, void *, size_t,
                              cudaStream_t stream) {
  return static_cast<cublasStatus_t>(library_call_on("cublasLtMatmul", stream));
}

// ---- cuDNN ----

size_t cudnnGetVersion() { return CUDNN_VERSION; }

cudnnStatus_t cudnnGetProperty(libraryPropertyType which, int *value) {
  static const int version[] = {CUDNN_MAJOR, CUDNN_MINOR, CUDNN_PATCHLEVEL};
  *value = version[which];
  return CUDNN_STATUS_SUCCESS;
}

size_t cudnnGetCudartVersion() { return CUDART_VERSION; }

const char *cudnnGetErrorString(cudnnStatus_t) { return "error of the stand-in"; }

void cudnnGetLastErrorString(char *text, size_t size) {
  std::strncpy(text, "error of the stand-in", size);
}

cudnnStatus_t cudnnGetStream(cudnnHandle_t handle, cudaStream_t *stream) {
  *stream = stream_of(handle);
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t type,
                                           cudnnBackendDescriptor_t *descriptor) {
  *descriptor = new Descriptor{type, {}};
  return CUDNN_STATUS_SUCCESS;
}

// Never freed: the plans that PyTorch keeps lead to it.
cudnnStatus_t cudnnBackendDestroyDescriptor(cudnnBackendDescriptor_t) {
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnBackendSetAttribute(cudnnBackendDescriptor_t descriptor,
                                       cudnnBackendAttributeName_t,
                                       cudnnBackendAttributeType_t type, int64_t count,
                                       const void *values) {
  if (type != CUDNN_TYPE_BACKEND_DESCRIPTOR) return CUDNN_STATUS_SUCCESS;
  auto *parts = static_cast<Descriptor *const *>(values);
  static_cast<Descriptor *>(descriptor)->parts.assign(parts, parts + count);
  return CUDNN_STATUS_SUCCESS;
}

// PyTorch passes empty descriptors to fill. There is one engine, without notes and
// knobs, and no plan needs a workspace.
cudnnStatus_t cudnnBackendGetAttribute(cudnnBackendDescriptor_t descriptor,
                                       cudnnBackendAttributeName_t,
                                       cudnnBackendAttributeType_t type, int64_t capacity,
                                       int64_t *count, void *values) {
  bool is_number = type == CUDNN_TYPE_INT64;
  bool is_descriptor = type == CUDNN_TYPE_BACKEND_DESCRIPTOR;
  if (count) *count = is_number || is_descriptor;
  if (capacity < 1 || !values) return CUDNN_STATUS_SUCCESS;
  if (is_number) *static_cast<int64_t *>(values) = 0;
  if (is_descriptor)
    (*static_cast<Descriptor **>(values))->parts = {static_cast<Descriptor *>(descriptor)};
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnBackendExecute(cudnnHandle_t handle, cudnnBackendDescriptor_t plan,
                                  cudnnBackendDescriptor_t) {
  auto *operation = operation_name(*static_cast<Descriptor *>(plan));
  auto name = std::string("cudnn ") + (operation ? operation : "operation");
  return static_cast<cudnnStatus_t>(library_call_on(name, stream_of(handle)));
}

cudnnStatus_t cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(
    cudnnHandle_t, cudnnBatchNormMode_t, cudnnBatchNormOps_t, const cudnnTensorDescriptor_t,
    const cudnnTensorDescriptor_t, const cudnnTensorDescriptor_t, const cudnnTensorDescriptor_t,
    const cudnnActivationDescriptor_t, size_t *size) {
  *size = 0;
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnGetBatchNormalizationBackwardExWorkspaceSize(
    cudnnHandle_t, cudnnBatchNormMode_t, cudnnBatchNormOps_t, const cudnnTensorDescriptor_t,
    const cudnnTensorDescriptor_t, const cudnnTensorDescriptor_t, const cudnnTensorDescriptor_t,
    const cudnnTensorDescriptor_t, const cudnnTensorDescriptor_t,
    const cudnnActivationDescriptor_t, size_t *size) {
  *size = 0;
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnGetBatchNormalizationTrainingExReserveSpaceSize(
    cudnnHandle_t, cudnnBatchNormMode_t, cudnnBatchNormOps_t, const cudnnActivationDescriptor_t,
    const cudnnTensorDescriptor_t, size_t *size) {
  *size = 0;
  return CUDNN_STATUS_SUCCESS;
}
}
