// What launches need to know of the device, which is asked once and remembered; the workspace; and
// the counters by which blocks find out who comes last.
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>

#include "launch.h"

namespace guard_ops::cuda {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // the error is reported here, so whoever asks next must not find it
  throw std::runtime_error(std::string("guard_ops: ") + what + ": " + cudaGetErrorString(status));
}

const Device& device() {
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

// One kernel stands for all of them, as they were compiled for the same devices. An error that says
// nothing about that (a device without memory left) is thrown, so that no caller remembers it.
std::string unsupported() {
  cudaFuncAttributes attributes{};
  const cudaError_t status = cudaFuncGetAttributes(&attributes, gradient_kernel());
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

bool refused(cudaError_t status) {
  return status == cudaErrorInvalidValue || status == cudaErrorInvalidConfiguration ||
         status == cudaErrorInvalidClusterSize || status == cudaErrorNotSupported ||
         status == cudaErrorLaunchOutOfResources || status == cudaErrorCooperativeLaunchTooLarge;
}

namespace {

// The code by which the current device runs a kernel.
struct Code {
  bool sm_90;     // see runs_as_sm_90
  int registers;  // of a thread, rounded up, as a device hands them out by eights
};

Code code_of(const void* kernel) {
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

}  // namespace

bool runs_as_sm_90(const void* kernel) { return code_of(kernel).sm_90; }

bool overlap(const void* first, int blocks, const void* second, int threads) {
  const Code p = code_of(first), q = code_of(second);
  return p.sm_90 && q.sm_90 && (blocks * p.registers + q.registers) * threads <= device().registers;
}

int at_once(const void* kernel, const Launch& launch) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int, int, int>, int> known;
  const Device& d = device();
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key =
      std::make_tuple(d.number, kernel, launch.threads, launch.shared_bytes, launch.cluster);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  int count = 0;
  // As much shared memory as a block may have, so that a later smaller launch does not take back
  // what a larger one needs; and as much as there is for every kernel, since a multiprocessor does
  // not run blocks of kernels side by side that want different shares.
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, d.shared_bytes);
  if (status == cudaSuccess &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                           cudaSharedmemCarveoutMaxShared) != cudaSuccess) {
    cudaGetLastError();  // it is a hint, and may fail
  }
  if (status == cudaSuccess && launch.cluster > 1) {
    if (!code_of(kernel).sm_90) return known.emplace(key, 0).first->second;
    if (launch.cluster > 8) {  // more than every device with clusters has to run
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

// ---- the workspace ------------------------------------------------------------------------------

int64_t workspace_layout(const Plan& p, char* base, Workspace* out) {
  int64_t at = 0;
  const auto take = [&](int64_t bytes) {
    char* const data = base + at;
    at += (bytes + 255) / 256 * 256;
    return data;
  };
  Workspace w{};
  const int64_t rows = p.rows;
  w.partials = reinterpret_cast<double*>(take(3 * int64_t(p.chunks) * sizeof(double)));
  w.parts = reinterpret_cast<Sums*>(take(rows * p.row_parts * sizeof(Sums)));
  w.sums = reinterpret_cast<Sums*>(take(rows * sizeof(Sums)));
  w.assumed = reinterpret_cast<Coefficients*>(take(rows * sizeof(Coefficients)));
  w.scratch = scratch_at(take(scratch_bytes(rows, p.batch)), rows);
  if (out != nullptr) *out = w;
  return at;
}

int64_t workspace_bytes(const Batch& t) {
  const Doubles none[3] = {};
  return workspace_layout(plan_of(t, none), nullptr, nullptr);
}

// ---- the counters -------------------------------------------------------------------------------
//
// Every launch leaves them at 0, so they are zeroed once a device and not once a call, which would
// take a launch before the launch.
namespace {

constexpr int64_t reserved = 1 << 20;  // counters of a device: 4 MB
constexpr int64_t least = 1024;        // counters of a stream, at least

struct Reserve {
  uint32_t* data = nullptr;
  int64_t taken = 0;
  std::map<unsigned long long, std::pair<uint32_t*, int64_t>> of_stream;

  uint32_t* take(int64_t count) {
    count = (count + counter_line - 1) / counter_line *
            counter_line;  // no two calls share a cache line
    if (data == nullptr || taken + count > reserved) return nullptr;
    taken += count;
    return data + taken - count;
  }
};

// Allocates and zeroes a device's counters. The memory is not torch's, as it has to outlive every
// pool that a graph's capture allocates from. This waits for a stream of its own. Null where torch
// has taken all memory there is; then the next call asks again.
uint32_t* zeroed() {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;  // another thread's capture goes on
  check(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
  void* data = nullptr;
  cudaStream_t stream = nullptr;
  cudaError_t status = cudaMalloc(&data, reserved * sizeof(uint32_t));
  if (status == cudaSuccess) status = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (status == cudaSuccess) {
    status = cudaMemsetAsync(data, 0, reserved * sizeof(uint32_t), stream);
    if (status == cudaSuccess) status = cudaStreamSynchronize(stream);
    cudaStreamDestroy(stream);
  }
  if (status != cudaSuccess && data != nullptr) {
    cudaFree(data);
    data = nullptr;
  }
  cudaThreadExchangeStreamCaptureMode(&mode);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
  } else {
    check(status, "the counters' memory");
  }
  return static_cast<uint32_t*>(data);
}

}  // namespace

uint32_t* counters_of(int64_t count, Stream of) {
  static std::mutex mutex;
  static auto& reserves =
      *new std::map<int, Reserve>;  // never freed, as the driver may be gone first
  const auto stream = static_cast<cudaStream_t>(of);
  if (stream == cudaStreamPerThread) return nullptr;
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &capture), "cudaStreamIsCapturing");
  const int number = device().number;
  const std::lock_guard<std::mutex> lock(mutex);
  Reserve& reserve = reserves[number];
  if (capture != cudaStreamCaptureStatusNone) return reserve.take(count);
  if (reserve.data == nullptr) reserve.data = zeroed();
  if (reserve.data == nullptr) return nullptr;
  unsigned long long id = 0;
  check(cudaStreamGetId(stream, &id), "cudaStreamGetId");
  auto& [data, size] = reserve.of_stream[id];
  if (size >= count) return data;
  const int64_t larger = std::max(least, count);
  uint32_t* const found = reserve.take(larger);
  if (found != nullptr) {  // otherwise the stream keeps what it has, for smaller calls
    data = found;
    size = larger;
  }
  return found;
}

}  // namespace guard_ops::cuda
