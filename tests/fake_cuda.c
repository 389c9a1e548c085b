/* A driver without a GPU: it notes what it is asked for. Tests load it as libcuda.so.1 and read `launches`. */
#include <cuda.h>
#include <stdint.h>
#include <string.h>

typedef struct {
  uint64_t function, grid, block, shared, stream;
  uint8_t arguments[1024];
} Launch;

typedef struct { /* what a tensor map was encoded from, in its place */
  uint32_t type, rank;
  uint64_t address, sizes[4], strides[3];
  uint32_t box[4], every[4];
  uint8_t interleave, swizzle, promotion, fill;
} Encoded;

_Static_assert(sizeof(Encoded) <= sizeof(CUtensorMap), "an encoded map fits");

Launch launches[64];
int launched = 0, loaded = 0, failing = 0;
int sizes_of_arguments[64], count_of_arguments = 0;

static CUresult note(CUfunction function, unsigned grid, unsigned block, unsigned shared, CUstream stream, void **given) {
  Launch *one = &launches[launched++];
  one->function = (uint64_t)function;
  one->grid = grid;
  one->block = block;
  one->shared = shared;
  one->stream = (uint64_t)stream;
  uint8_t *place = one->arguments;
  for (int i = 0; i < count_of_arguments; place += sizes_of_arguments[i++]) memcpy(place, given[i], sizes_of_arguments[i]);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **given, void **extra) {
  if (config->numAttrs || config->gridDimY != 1 || config->gridDimZ != 1) return CUDA_ERROR_INVALID_VALUE;
  return note(function, config->gridDimX, config->blockDimX, config->sharedMemBytes, config->hStream, given);
}

CUresult cuLaunchKernel(
    CUfunction function, unsigned x, unsigned y, unsigned z, unsigned block, unsigned block_y, unsigned block_z,
    unsigned shared, CUstream stream, void **given, void **extra) {
  if (y != 1 || z != 1 || block_y != 1 || block_z != 1 || extra) return CUDA_ERROR_INVALID_VALUE;
  return note(function, x, block, shared, stream, given);
}

CUresult cuTensorMapEncodeTiled(
    CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address, const cuuint64_t *sizes,
    const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *every, CUtensorMapInterleave interleave,
    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  if (failing || rank != 4) return CUDA_ERROR_INVALID_VALUE;
  Encoded encoded = {type, rank, (uint64_t)address, {0}, {0}, {0}, {0}, interleave, swizzle, promotion, fill};
  memcpy(encoded.sizes, sizes, sizeof encoded.sizes);
  memcpy(encoded.strides, strides, sizeof encoded.strides);
  memcpy(encoded.box, box, sizeof encoded.box);
  memcpy(encoded.every, every, sizeof encoded.every);
  memset(map, 0, sizeof *map);
  memcpy(map, &encoded, sizeof encoded);
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)(uint64_t)++loaded;
  return memcmp(image, "\177ELF", 4) ? CUDA_ERROR_INVALID_IMAGE : CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)module;
  return strcmp(name, "attention_hopper") ? CUDA_ERROR_NOT_FOUND : CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  memcpy(value, &pointer, sizeof pointer);
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = 232448; /* bytes of shared memory; of the rest nothing is read */
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult code, const char **text) {
  *text = "what the driver says";
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

/* What Triton's module is linked with, and nothing here calls. */
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) { return CUDA_ERROR_NOT_SUPPORTED; }

/* Newer than any for which Triton 3.9 mends maps of tensors below 128 KiB; 3.6 never does. */
CUresult cuDriverGetVersion(int *version) { return *version = 99000, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return cuCtxGetCurrent(context); }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }

int32_t aoti_torch_get_current_cuda_stream(int32_t device, void **stream) { return *stream = (void *)0x51, 0; }
