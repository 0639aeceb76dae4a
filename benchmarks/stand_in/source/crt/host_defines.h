// The pip packages of CUDA lack this header, which belongs to nvcc. A host compiler needs only the
// names below, and none of them has a meaning for it.
#pragma once
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __builtin_align__(bytes) __align__(bytes)
#define __forceinline__ __inline__ __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __no_return__ __attribute__((noreturn))
#define __specialization_static
#define __annotate__(a)
#define __location__(a)
#define __cdecl
#define __constant__
#define __cudart_builtin__
#define __device__
#define __device_builtin__
#define __device_builtin_surface_type__
#define __device_builtin_texture_type__
#define __export__
#define __global__
#define __host__
#define __import__
#define __managed__
#define __shared__
#define CUDARTAPI
#define CUDARTAPI_CDECL
