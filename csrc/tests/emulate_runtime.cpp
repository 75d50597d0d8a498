#include "emulate_runtime.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <utility>

#include "emulate_grids.h"

namespace guard_ops::cuda::emulation {

bool synchronous = false;
int refusals = 0;
std::vector<const void*> being_captured;
std::vector<Node>* recording = nullptr;
void (*recorder)(const void* argument, size_t bytes) = nullptr;

namespace {

constexpr int registers_a_thread = 40, most_threads = 1024;
constexpr int reserved_bytes = 1024;       // shared memory of a block that the system keeps
constexpr int unasked_bytes = 48 << 10;    // shared memory that needs no attribute
constexpr int portable = 8, largest = 16;  // sizes of clusters

struct Kernel {
  int shared_bytes = unasked_bytes;  // the most that a launch may ask for
  bool any_cluster = false;
};

Machine now;
int number = 0;
std::map<const void*, Kernel> kernels;  // what the present device was told of each
cudaError_t last = cudaSuccess;
cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

cudaError_t said(cudaError_t error) {
  if (error != cudaSuccess) last = error;
  return error;
}

int blocks_a_multiprocessor(const void* kernel, int threads, size_t shared_bytes) {
  if (shared_bytes > size_t(kernels[kernel].shared_bytes)) return 0;
  return std::min({(now.shared_bytes + reserved_bytes) / (int(shared_bytes) + reserved_bytes),
                   now.registers / (registers_a_thread * threads), now.threads / threads});
}

cudaError_t refusal(const void* kernel, int cluster) {
  if (cluster <= 1) return cudaSuccess;
  if (!now.clusters) return cudaErrorNotSupported;
  const bool fits = cluster <= (kernels[kernel].any_cluster ? largest : portable);
  return fits ? cudaSuccess : cudaErrorInvalidClusterSize;
}

}  // namespace

void become(const Machine& machine) {
  finish();
  now = machine;
  ++number;
  refusals = 0;
  kernels.clear();
}

void replay(const std::vector<Node>& nodes) {
  for (const Node& node : nodes) enqueue(node.shape, node.thread);
}

namespace {

// Why the device does not launch this.
cudaError_t refusal(const void* kernel, const cudaLaunchConfig_t& config, GridShape& shape) {
  bool cooperative = false;
  for (unsigned n = 0; n < config.numAttrs; ++n) {
    const cudaLaunchAttribute& a = config.attrs[n];
    if (a.id == cudaLaunchAttributeCooperative) {
      cooperative = a.val.cooperative;
    } else if (a.id == cudaLaunchAttributeClusterDimension) {
      shape.cluster = int(a.val.clusterDim.x);
    } else {
      shape.chained = a.val.programmaticStreamSerializationAllowed;
    }
  }
  if (now.architecture == 0) return cudaErrorNoKernelImageForDevice;
  if (shape.blocks < 1 || shape.threads < 1 || shape.threads > most_threads) {
    return cudaErrorInvalidConfiguration;
  }
  if (shape.threads % 32 != 0) std::abort();  // a device would run it, but emulated warps are whole
  const bool newer = now.clusters && now.architecture >= 90;
  if (shape.chained && !(newer && now.chains)) return cudaErrorNotSupported;
  const int running = blocks_a_multiprocessor(kernel, shape.threads, shape.shared_bytes);
  if (shape.shared_bytes > kernels[kernel].shared_bytes) return cudaErrorInvalidValue;
  if (running == 0) return cudaErrorLaunchOutOfResources;
  if (const auto error = refusal(kernel, shape.cluster)) return error;
  if (shape.blocks % shape.cluster != 0) return cudaErrorInvalidClusterSize;
  if (cooperative && !now.cooperative) return cudaErrorNotSupported;
  if ((cooperative || shape.cluster > 1) && now.busy && now.vague) return cudaErrorInvalidValue;
  if (cooperative && (now.busy || shape.blocks > running * now.multiprocessors)) {
    return cudaErrorCooperativeLaunchTooLarge;
  }
  if (shape.cluster > 1 && now.busy) return cudaErrorLaunchOutOfResources;
  return cudaSuccess;
}

}  // namespace

cudaError_t launch(const void* kernel, const cudaLaunchConfig_t& config, const void* argument,
                   size_t bytes, std::function<void()> thread) {
  GridShape shape{int(config.gridDim.x), int(config.blockDim.x), int(config.dynamicSmemBytes)};
  shape.stream = config.stream;
  if (const auto error = refusal(kernel, config, shape)) {
    ++refusals;
    return said(error);
  }
  if (recorder != nullptr) {
    recorder(argument, bytes);
    return cudaSuccess;
  }
  if (recording != nullptr) {
    recording->push_back({shape, std::move(thread)});
    return cudaSuccess;
  }
  enqueue(shape, std::move(thread));
  if (synchronous) finish();
  return cudaSuccess;
}

}  // namespace guard_ops::cuda::emulation

using namespace guard_ops::cuda::emulation;

cudaError_t cudaGetLastError() { return std::exchange(last, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : "an error of the emulated device";
}

cudaError_t cudaGetDevice(int* device) {
  *device = number;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = now.multiprocessors;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = now.shared_bytes;
      break;
    case cudaDevAttrCooperativeLaunch:
      *value = now.cooperative;
      break;
    case cudaDevAttrClusterLaunch:
      *value = now.clusters;
      break;
  }
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  if (now.architecture == 0) return said(cudaErrorNoKernelImageForDevice);
  *attributes = {now.architecture};
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value > now.shared_bytes) return said(cudaErrorInvalidValue);
    kernels[kernel].shared_bytes = value;
  } else if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    if (!now.clusters) return said(cudaErrorNotSupported);
    kernels[kernel].any_cluster = value != 0;
  }
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel,
                                                          int threads, size_t shared_bytes) {
  *blocks = blocks_a_multiprocessor(kernel, threads, shared_bytes);
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel,
                                           const cudaLaunchConfig_t* config) {
  const int size = int(config->attrs[0].val.clusterDim.x);
  if (const auto error = refusal(kernel, size)) return said(error);
  *clusters = now.multiprocessors *
              blocks_a_multiprocessor(kernel, int(config->blockDim.x), config->dynamicSmemBytes) /
              size;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** data, size_t bytes) {
  if (!being_captured.empty() && capture_mode != cudaStreamCaptureModeRelaxed) {
    return said(cudaErrorStreamCaptureUnsupported);
  }
  if (!now.has_memory) return said(cudaErrorMemoryAllocation);
  *data = std::malloc(bytes);
  std::memset(*data, 0xFF, bytes);
  return cudaSuccess;
}

cudaError_t cudaFree(void* data) {
  std::free(data);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = nullptr;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const auto& all = being_captured;
  const bool captured = std::find(all.begin(), all.end(), stream) != all.end();
  *status = captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  *id = reinterpret_cast<unsigned long long>(stream);
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, capture_mode);
  return cudaSuccess;
}
