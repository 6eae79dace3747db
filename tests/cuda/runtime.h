// A stand-in for the CUDA runtime. Tests say what it answers and which calls fail, and read the
// log of what was asked of it.
#pragma once

#include <cstdlib>
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "torch.h"

struct UserObjectStandIn {
  void* what;
  void (*destroy)(void*);
};
struct GraphStandIn {
  std::vector<cudaUserObject_t> objects;
};

namespace standin {

int live_tensors = 0;
long current_stream = 0;
std::string lines;

// What it answers.
std::map<std::string, int> answers = {{"driver", 13000}, {"processors", 2}, {"cooperative", 1},
                                      {"shared", 227 << 10},
                                      {"blocks", 3},     {"declared", 128},
                                      {"run", 1}};  // 0: launches are logged, and no more
std::map<std::string, std::deque<int>> errors;  // of the next calls by that name; 0: none
long capturing_stream = -1;
unsigned long long captures = 0;
GraphStandIn* graph = nullptr;

void log(const std::string& line) { lines += line + "\n"; }

long number(cudaStream_t stream) { return reinterpret_cast<long>(stream); }

cudaError_t outcome(const char* call) {
  std::deque<int>& left = errors[call];
  if (left.empty()) return cudaSuccess;
  const int error = left.front();
  left.pop_front();
  return static_cast<cudaError_t>(error);
}

}  // namespace standin

const char* cudaGetErrorString(cudaError_t) { return "a stand-in's error"; }
const char* cudaGetErrorName(cudaError_t error) {
  static std::string name;
  name = standin::text("error ", static_cast<int>(error));
  return name.c_str();
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, standin::outcome("count"); }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  const int values[] = {standin::answers["processors"], standin::answers["cooperative"],
                        standin::answers["shared"]};
  return *value = values[name], cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  return *version = standin::answers["driver"], cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->sharedSizeBytes = standin::answers["declared"];
  return standin::outcome("load");
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  standin::log(standin::text("shared memory ", value));
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  return *blocks = standin::answers["blocks"], cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  standin::log(standin::text("copy ", bytes, " bytes on ", standin::number(stream)));
  std::memcpy(to, from, bytes);
  return standin::outcome("copy");
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return standin::outcome("synchronize"); }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t) {
  standin::log(standin::text("wait on ", standin::number(stream)));
  return standin::outcome("wait");
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph, void*, void*,
                                     void*) {
  const bool active = standin::capturing_stream == standin::number(stream);
  *status = active ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  if (active) *id = standin::captures, *graph = standin::graph;
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return *event = reinterpret_cast<cudaEvent_t>(1), cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t stream) {
  standin::log(standin::text("record on ", standin::number(stream)));
  return standin::outcome("record");
}
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* what, void (*destroy)(void*),
                                 unsigned, unsigned) {
  const cudaError_t error = standin::outcome("user object");
  if (error == cudaSuccess) *object = new UserObjectStandIn{what, destroy};
  return error;
}
cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned) {
  object->destroy(object->what);
  delete object;
  return cudaSuccess;
}
cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned,
                                      unsigned) {
  const cudaError_t error = standin::outcome("retain");
  if (error == cudaSuccess) graph->objects.push_back(object);
  return error;
}

// ---- for tests ----------------------------------------------------------------------

extern "C" {

void runtime_answer(const char* name, int value) { standin::answers[name] = value; }
void runtime_fail(const char* call, int error) { standin::errors[call].push_back(error); }
void runtime_stream(long stream) { standin::current_stream = stream; }
int runtime_live_tensors() { return standin::live_tensors; }
// What was logged since it was last asked for.
const char* runtime_log() {
  static std::string shown;
  shown = std::move(standin::lines);
  standin::lines.clear();
  return shown.c_str();
}
void* runtime_begin_capture(long stream) {
  standin::capturing_stream = stream;
  ++standin::captures;
  return standin::graph = new GraphStandIn;
}
void runtime_end_capture() { standin::capturing_stream = -1; }
void runtime_destroy_graph(void* graph) {
  for (cudaUserObject_t object : static_cast<GraphStandIn*>(graph)->objects)
    cudaUserObjectRelease(object, 1);
  delete static_cast<GraphStandIn*>(graph);
}

}  // extern "C"
