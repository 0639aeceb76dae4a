// What the generated stubs call. They include no header of CUDA, which declares other arguments.
#pragma once

struct CUstream_st;

namespace stand_in {

// A call by which a library starts kernels, on the stream of its handle.
int library_call(const char *name, const void *handle);
// A new handle or descriptor. Streams and events are handles too, and none is ever freed: a freed
// one could come back with the state of the old one.
void *new_handle();
void set_stream(const void *handle, CUstream_st *stream);

}  // namespace stand_in
