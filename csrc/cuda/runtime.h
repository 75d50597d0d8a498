// What the launches ask of a device, remembered, and the launch itself. The tests have a run time
// of their own.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

namespace guard_ops::cuda {

#if defined(GUARD_OPS_EMULATE)
constexpr int stream_threads = 64, cooperative_threads = 96, cluster_threads = 64;
#else
constexpr int stream_threads = 256, cooperative_threads = 512, cluster_threads = 256;
#endif

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // it is reported here, not by whoever asks next
  throw std::runtime_error(std::string("guard_ops: ") + what + ": " + cudaGetErrorString(status));
}

struct Device {
  int number, multiprocessors, shared_bytes;  // a block's most
  bool cooperative, clusters;
  int cache_bytes;  // second level
  int registers;    // of a multiprocessor
};

inline const Device& device() {
  static std::mutex mutex;
  static std::map<int, Device> known;
  int number = 0;
  check(cudaGetDevice(&number), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(number);
  if (found != known.end()) return found->second;
  const auto attribute = [&](cudaDeviceAttr a) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, a, number), "cudaDeviceGetAttribute");
    return value;
  };
  const Device d{number,
                 attribute(cudaDevAttrMultiProcessorCount),
                 attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                 attribute(cudaDevAttrCooperativeLaunch) != 0,
                 attribute(cudaDevAttrClusterLaunch) != 0,
                 attribute(cudaDevAttrL2CacheSize),
                 attribute(cudaDevAttrMaxRegistersPerMultiprocessor)};
  return known.emplace(number, d).first->second;
}

// Why the device cannot run this kernel, whatever it was compiled for; empty where it can. Throws
// what says nothing of that (a device without memory left), so that nobody remembers it.
inline std::string why_not(const void* kernel) {
  cudaFuncAttributes attributes{};
  const cudaError_t status = cudaFuncGetAttributes(&attributes, kernel);
  switch (status) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidKernelImage:
    case cudaErrorInvalidPtx:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorJitCompilationDisabled:
      cudaGetLastError();
      return cudaGetErrorString(status);
    default:
      check(status, "cudaFuncGetAttributes");
      return "";
  }
}

// Whether an error says that the device cannot launch a kernel so, and never will.
inline bool refused(cudaError_t status) {
  return status == cudaErrorInvalidValue || status == cudaErrorInvalidConfiguration ||
         status == cudaErrorInvalidClusterSize || status == cudaErrorNotSupported ||
         status == cudaErrorLaunchOutOfResources || status == cudaErrorCooperativeLaunchTooLarge;
}

// What the current device runs a kernel by.
struct Code {
  bool sm_90;  // device and code know of clusters and chained launches: PTX for sm_80 that a driver
               // compiles for sm_90 would take each of a cluster's blocks for a whole one, and wait
               // for nothing
  int registers;  // of a thread, as they are handed out: by eights
};

inline Code code_of(const void* kernel) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, Code> known;
  const Device& d = device();
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({d.number, kernel});
  if (found != known.end()) return found->second;
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  return known[{d.number, kernel}] = {d.clusters && attributes.ptxVersion >= 90,
                                      (attributes.numRegs + 7) / 8 * 8};
}

struct Launch {
  int blocks, threads, shared_bytes;
  bool cooperative = false;
  int cluster = 1;
  bool chained = false;  // may begin before the launch before it ends: see device.h
};

// How many blocks of this kernel, or clusters, the device runs at once: 0 where it cannot.
inline int at_once(const void* kernel, const Launch& launch) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int, int, int>, int> known;
  const Device& d = device();
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key =
      std::make_tuple(d.number, kernel, launch.threads, launch.shared_bytes, launch.cluster);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  int count = 0;
  // The most that any launch may ask for; a smaller later one must not take it back. As much shared
  // memory as there is, of any kernel: blocks of two whose shares differ would not run side by
  // side.
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, d.shared_bytes);
  if (status == cudaSuccess &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                           cudaSharedmemCarveoutMaxShared) != cudaSuccess) {
    cudaGetLastError();  // a hint
  }
  if (status == cudaSuccess && launch.cluster > 1) {
    if (!code_of(kernel).sm_90) return known.emplace(key, 0).first->second;
    if (launch.cluster > 8) {  // more than every device has to have
      status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(launch.cluster);
    config.blockDim = dim3(launch.threads);
    config.dynamicSmemBytes = launch.shared_bytes;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = launch.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
    if (status == cudaSuccess) status = cudaOccupancyMaxActiveClusters(&count, kernel, &config);
  } else if (status == cudaSuccess) {
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, launch.threads,
                                                           launch.shared_bytes);
    count *= d.multiprocessors;
  }
  if (refused(status)) {
    cudaGetLastError();
    status = cudaSuccess;
    count = 0;
  }
  check(status, "occupancy");
  return known.emplace(key, count).first->second;
}

// Whether the second kernel's blocks can begin while the first's run: whether a multiprocessor has
// registers for `blocks` of these and one of those.
inline bool overlap(const void* first, int blocks, const void* second, int threads) {
  const Code p = code_of(first), q = code_of(second);
  return p.sm_90 && q.sm_90 && (blocks * p.registers + q.registers) * threads <= device().registers;
}

// False where the device, for all that it said, does not launch so: no room for blocks that have to
// run at once, under MPS, or busy.
template <class Argument>
bool starts(void (*kernel)(Argument), const Launch& launch, void* stream, Argument argument) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(launch.blocks);
  config.blockDim = dim3(launch.threads);
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute{};
  if (launch.cooperative) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  } else if (launch.cluster > 1) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = launch.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  const void* const code = reinterpret_cast<const void*>(kernel);
  const bool chained = launch.chained && code_of(code).sm_90;
  if (chained) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  config.attrs = &attribute;
  config.numAttrs = launch.cooperative || launch.cluster > 1 || chained ? 1 : 0;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, argument);
  if (config.numAttrs > 0 && status != cudaErrorInvalidValue && refused(status)) {
    cudaGetLastError();
    return false;
  }
  check(status, "kernel launch");
  return true;
}

template <class Argument>
void start(void (*kernel)(Argument), const Launch& launch, void* stream, Argument argument) {
  if (starts(kernel, launch, stream, argument)) return;
  Launch plain = launch;
  plain.chained = false;
  if (!starts(kernel, plain, stream, argument)) throw std::runtime_error("guard_ops: no launch");
}

}  // namespace guard_ops::cuda
