// Captures of streams as graphs: which streams they hold, what is illegal meanwhile, and replays.
//
// A captured stream holds the nodes on which its next work depends. An event that is recorded there
// carries them to the stream that waits for it, which so joins the capture. At the end every node
// must lead back to the first stream, or CUDA refuses the graph as unjoined.
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <set>
#include <thread>

#include "stand_in.h"

namespace stand_in {
namespace {

using Nodes = std::set<size_t>;

struct Graph {
  size_t nodes = 0;
};

struct Capture {
  unsigned long long id;
  cudaStream_t origin;
  cudaStreamCaptureMode mode;
  std::thread::id thread = std::this_thread::get_id();
  Graph *graph;
  bool is_invalid = false;
  Nodes ends;  // nodes on which no other node depends
};

struct Frontier {
  std::shared_ptr<Capture> capture;
  Nodes nodes;  // on which the next work depends
};

// Guards all of the following: autograd captures from a thread of its own.
std::mutex mutex;
std::map<cudaStream_t, Frontier> captured_streams;
std::map<cudaEvent_t, Frontier> captured_events;  // by their last record
unsigned long long captures_so_far = 0;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

Frontier *frontier_of(cudaStream_t stream) {
  auto found = captured_streams.find(stream);
  return found == captured_streams.end() ? nullptr : &found->second;
}

cudaError_t invalidate(Capture &capture, const char *call) {
  counters.illegal++;
  capture.is_invalid = true;
  return fail(cudaErrorStreamCaptureUnsupported, call);
}

// The capture that forbids unsafe calls to this thread, or null.
std::shared_ptr<Capture> strict_capture() {
  if (thread_mode == cudaStreamCaptureModeRelaxed) return nullptr;
  for (auto &[stream, frontier] : captured_streams) {
    auto &capture = *frontier.capture;
    bool is_own = capture.thread == std::this_thread::get_id();
    if (capture.mode == cudaStreamCaptureModeGlobal ||
        (capture.mode == cudaStreamCaptureModeThreadLocal && is_own))
      return frontier.capture;
  }
  return nullptr;
}

cudaError_t unsafe_call_locked(const char *call) {
  auto capture = strict_capture();
  return capture ? invalidate(*capture, call) : cudaSuccess;
}

cudaError_t begin(cudaStream_t stream, cudaStreamCaptureMode mode, Graph *graph) {
  std::lock_guard lock(mutex);
  if (stream == nullptr || stream == cudaStreamLegacy)  // CUDA cannot capture the default stream
    return fail(cudaErrorStreamCaptureUnsupported);
  if (frontier_of(stream)) return fail(cudaErrorIllegalState);
  auto capture = std::make_shared<Capture>();
  capture->id = ++captures_so_far;
  capture->origin = stream;
  capture->mode = mode;
  capture->graph = graph ? graph : new Graph;
  captured_streams[stream] = {capture, {}};
  return cudaSuccess;
}

// The error of a capture that ends now on `stream`, whose frontier is given.
cudaError_t error_at_end(cudaStream_t stream, const Frontier &frontier) {
  auto &capture = *frontier.capture;
  if (capture.origin != stream) return cudaErrorStreamCaptureUnmatched;
  if (capture.mode != cudaStreamCaptureModeRelaxed && capture.thread != std::this_thread::get_id())
    return cudaErrorStreamCaptureWrongThread;
  if (capture.is_invalid) return cudaErrorStreamCaptureInvalidated;
  for (auto node : capture.ends)
    if (!frontier.nodes.count(node)) return cudaErrorStreamCaptureUnjoined;
  return cudaSuccess;
}

template <class Key>
void forget(std::map<Key, Frontier> &places, const Capture &capture) {
  for (auto place = places.begin(); place != places.end();)
    place = place->second.capture.get() == &capture ? places.erase(place) : std::next(place);
}

}  // namespace

cudaError_t queue_work(cudaStream_t stream, bool *captured) {
  std::lock_guard lock(mutex);
  auto *frontier = frontier_of(stream);
  if (captured) *captured = frontier != nullptr;
  if (!frontier) {
    if (!captured_streams.empty()) counters.outside++;
    return cudaSuccess;
  }
  auto &capture = *frontier->capture;
  if (capture.is_invalid) return fail(cudaErrorStreamCaptureInvalidated);
  size_t node = ++capture.graph->nodes;
  for (auto before : frontier->nodes) capture.ends.erase(before);
  capture.ends.insert(node);
  frontier->nodes = {node};
  return cudaSuccess;
}

cudaError_t wait_for_stream(cudaStream_t stream, const char *call) {
  std::lock_guard lock(mutex);
  counters.syncs++;
  if (auto *frontier = frontier_of(stream)) return invalidate(*frontier->capture, call);
  return unsafe_call_locked(call);
}

cudaError_t wait_for_device(const char *call) {
  std::lock_guard lock(mutex);
  counters.syncs++;
  if (captured_streams.empty()) return cudaSuccess;
  return invalidate(*captured_streams.begin()->second.capture, call);
}

cudaError_t look_at_event(cudaEvent_t event, const char *call) {
  std::lock_guard lock(mutex);
  auto found = captured_events.find(event);
  if (found != captured_events.end()) return invalidate(*found->second.capture, call);
  return unsafe_call_locked(call);
}

cudaError_t unsafe_call(const char *call) {
  std::lock_guard lock(mutex);
  return unsafe_call_locked(call);
}

}  // namespace stand_in

using namespace stand_in;

extern "C" {

// ---- events ----

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  std::lock_guard lock(mutex);
  captured_events.erase(event);
  if (auto *frontier = frontier_of(stream)) captured_events[event] = *frontier;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  std::lock_guard lock(mutex);
  auto recorded = captured_events.find(event);
  auto *frontier = frontier_of(stream);
  if (recorded == captured_events.end()) {
    // A captured stream cannot depend on work that is not captured.
    return frontier ? fail(cudaErrorStreamCaptureIsolation) : cudaSuccess;
  }
  auto &joined = captured_streams[stream];
  if (joined.capture && joined.capture != recorded->second.capture)
    return fail(cudaErrorStreamCaptureMerge);
  joined.capture = recorded->second.capture;
  joined.nodes.insert(recorded->second.nodes.begin(), recorded->second.nodes.end());
  return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  counters.syncs++;
  return look_at_event(event, __func__);
}

cudaError_t cudaEventQuery(cudaEvent_t event) { return look_at_event(event, __func__); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  std::lock_guard lock(mutex);
  captured_events.erase(event);
  return cudaSuccess;
}

// ---- captures ----

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  return begin(stream, mode, nullptr);
}

cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t stream, cudaGraph_t graph,
                                          const cudaGraphNode_t *, const cudaGraphEdgeData *,
                                          size_t, cudaStreamCaptureMode mode) {
  return begin(stream, mode, reinterpret_cast<Graph *>(graph));
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  std::lock_guard lock(mutex);
  *graph = nullptr;
  auto *found = frontier_of(stream);
  if (!found) return fail(cudaErrorIllegalState);
  Frontier frontier = *found;
  auto error = error_at_end(stream, frontier);
  if (error == cudaErrorStreamCaptureUnmatched || error == cudaErrorStreamCaptureWrongThread)
    return fail(error);  // the capture continues
  forget(captured_streams, *frontier.capture);
  forget(captured_events, *frontier.capture);
  if (error != cudaSuccess) return fail(error);
  *graph = reinterpret_cast<cudaGraph_t>(frontier.capture->graph);
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *status) {
  return cudaStreamGetCaptureInfo(stream, status, nullptr, nullptr, nullptr, nullptr, nullptr);
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus *status,
                                     unsigned long long *id, cudaGraph_t *graph,
                                     const cudaGraphNode_t **nodes,
                                     const cudaGraphEdgeData **edges, size_t *count) {
  std::lock_guard lock(mutex);
  *status = cudaStreamCaptureStatusNone;
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  auto *frontier = frontier_of(stream);
  if (!frontier) return cudaSuccess;
  auto &capture = *frontier->capture;
  *status = capture.is_invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
  if (id) *id = capture.id;
  if (graph) *graph = reinterpret_cast<cudaGraph_t>(capture.graph);
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *mode) {
  std::swap(thread_mode, *mode);
  return cudaSuccess;
}

// ---- graphs ----

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *, size_t *count) {
  *count = reinterpret_cast<Graph *>(graph)->nodes;
  return cudaSuccess;
}

// An executable graph is a copy of the number of nodes: PyTorch may destroy the graph.
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *executable, cudaGraph_t graph,
                                 unsigned long long) {
  *executable = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph *>(graph)));
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph,
                                          unsigned long long flags) {
  return cudaGraphInstantiate(executable, graph, flags);
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  counters.launches++;
  auto nodes = reinterpret_cast<Graph *>(executable)->nodes;
  record_name("graph of " + std::to_string(nodes) + " nodes");
  return queue_work(stream);
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Graph *>(graph);
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete reinterpret_cast<Graph *>(executable);
  return cudaSuccess;
}
}
