// The counters by which blocks find out who comes last. Every launch leaves them at 0, so they are
// zeroed once a device and not once a call, which would be a launch before the launch.
#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

#include "kernels.h"
#include "runtime.h"

namespace guard_ops::cuda {
namespace {

constexpr int64_t reserved = 1 << 20;  // integers, 4 MB a device
constexpr int64_t least = 1024;        // of a stream

struct Reserve {
  uint32_t* data = nullptr;
  int64_t taken = 0;
  std::map<unsigned long long, std::pair<uint32_t*, int64_t>> of_stream;

  uint32_t* take(int64_t count) {
    count = (count + counter_line - 1) / counter_line * counter_line;  // no two share one
    if (data == nullptr || taken + count > reserved) return nullptr;
    taken += count;
    return data + taken - count;
  }
};

// Not torch's memory: it outlives every pool that a graph's capture allocates from. Waits for its
// own stream, once a device. Null where torch has taken all memory there is; the next call asks
// again.
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
  static auto& reserves = *new std::map<int, Reserve>;  // never freed: a driver may be gone first
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
  if (found != nullptr) {  // else it keeps what it has, for smaller calls
    data = found;
    size = larger;
  }
  return found;
}

}  // namespace guard_ops::cuda
