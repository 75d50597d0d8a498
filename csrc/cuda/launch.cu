// What launches need to know of the device, which is asked once and remembered; the choice of a
// path; the workspace; and the counters by which blocks find out who comes last.
#include <atomic>
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

namespace {

std::mutex devices_mutex;

// The current device in what is known of all of them. The caller has the mutex.
Device& known_device() {
  static std::map<int, Device> known;
  int number = 0;
  check(cudaGetDevice(&number), "cudaGetDevice");
  const auto found = known.find(number);
  if (found != known.end()) return found->second;
  const auto attribute = [&](cudaDeviceAttr a) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, a, number), "cudaDeviceGetAttribute");
    return value;
  };
  const Device d{number, attribute(cudaDevAttrMultiProcessorCount),
                 attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                 attribute(cudaDevAttrCooperativeLaunch) != 0,
                 attribute(cudaDevAttrClusterLaunch) != 0};
  return known.emplace(number, d).first->second;
}

}  // namespace

Device device() {
  const std::lock_guard<std::mutex> lock(devices_mutex);
  return known_device();
}

void refused_launch(Path path) {
  const std::lock_guard<std::mutex> lock(devices_mutex);
  (path == Path::cluster ? known_device().clusters : known_device().cooperative) = false;
}

// One kernel stands for all of them, as they were compiled for the same devices. An error that says
// nothing about that (a device without memory left) is thrown, so that no caller remembers it.
std::string unsupported() {
  cudaFuncAttributes attributes{};
  const cudaError_t status = cudaFuncGetAttributes(&attributes, kernel_of(Path::two_launches));
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

bool runs_as_sm_90(const void* kernel) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, bool> known;
  const Device d = device();
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({d.number, kernel});
  if (found != known.end()) return found->second;
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  int clusters = 0;
  check(cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, d.number),
        "cudaDeviceGetAttribute");
  return known[{d.number, kernel}] = clusters != 0 && attributes.ptxVersion >= 90;
}

int at_once(const void* kernel, const Launch& launch) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int, int, int>, int> known;
  const Device d = device();
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
    if (!runs_as_sm_90(kernel)) return known.emplace(key, 0).first->second;
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

// ---- the choice of a path -----------------------------------------------------------------------

namespace {

constexpr int most_cluster = 16;  // blocks; every device with clusters runs 8, and some 16

std::atomic<int> left_free{0};

// How many tiles the busiest warp of a block has.
uint32_t tiles_of(uint32_t chunks, int threads, const Plan& p) {
  const uint32_t warps = threads / warp_size;
  return (chunks + warps - 1) / warps * p.chunk_tiles;
}

// Makes room in a launch's shared memory, behind the slots, for evaluate()'s numbers and the rows'
// sums, if at least `least` blocks, or clusters, still run at once. Returns how many do then.
int make_room(const Machine& on, const Plan& p, int least, Choice& c) {
  const int running = on.at_once(c.path, c.launch);
  const int64_t at = (c.launch.shared_bytes + 15) / 16 * 16;
  const int64_t end = at + scratch_bytes(p.rows, p.batch) + p.rows * sizeof(Sums);
  if (running == 0 || end > on.shared_bytes) return running;
  Launch larger = c.launch;
  larger.shared_bytes = int(end);
  const int still = on.at_once(c.path, larger);
  if (still < std::min(least, running)) return running;
  c.launch = larger;
  c.scratch_offset = uint32_t(at);
  return still;
}

// Clusters of so many blocks that hold a row each. Returns how many run at once; 0 where that is
// impossible.
int plan_clusters(const Machine& on, const Plan& p, int size, Choice& c) {
  c.path = Path::cluster;
  c.block_chunks = (p.row_chunks + size - 1) / size;
  const uint32_t tiles = tiles_of(c.block_chunks, on.cluster_threads, p);
  const int64_t partials = partial_bytes(c.block_chunks);
  c.room = room_to_keep(p, bytes_a_warp(on.shared_bytes - partials, on.cluster_threads), tiles);
  if (c.room.slots == 0 || resident_of(c.room, tiles) < tiles) return 0;
  c.launch = {int(p.rows) * size, on.cluster_threads,
              shared_bytes(p, on.cluster_threads, c.room) + int(partials)};
  c.launch.cluster = size;
  return make_room(on, p, int(p.rows), c);
}

// The smallest clusters that hold a row; larger ones as long as multiprocessors would be without a
// block and all clusters run at once; and larger ones that share a multiprocessor between two
// blocks, where there are as many: while one waits for its cluster, the other works.
bool choose_clusters(const Machine& on, const Plan& p, Choice* chosen) {
  int resident = 0;  // blocks at once, by the choice so far
  for (int size = 1; size <= (on.clusters ? most_cluster : 1); size *= 2) {
    if (uint32_t(size) > p.row_chunks) break;  // there would be blocks without a chunk
    Choice c;
    const int running = plan_clusters(on, p, size, c);
    if (running == 0) continue;
    const bool filled = chosen->launch.blocks >= on.multiprocessors;
    const int two_each = 2 * on.multiprocessors;
    const bool better =
        filled ? running * size >= two_each && c.launch.blocks >= two_each : running >= int(p.rows);
    if (resident != 0 && !better) continue;
    *chosen = c;
    resident = running * size;
    if (resident >= two_each && c.launch.blocks >= on.multiprocessors) break;
  }
  return resident != 0;
}

// One block a multiprocessor with all its shared memory, if that holds at least one `fraction`-th
// of the batch; the rest is read twice. A fraction of 0 asks for nothing.
bool choose_cooperative(const Machine& on, const Plan& p, uint32_t fraction, Choice* chosen) {
  if (!on.cooperative) return false;
  Choice c;
  c.path = Path::cooperative;
  c.launch = {on.multiprocessors, on.cooperative_threads, 0};
  const uint32_t block_chunks = (p.chunks + c.launch.blocks - 1) / c.launch.blocks;
  const uint32_t tiles = tiles_of(block_chunks, on.cooperative_threads, p);
  c.room = room_to_keep(p, bytes_a_warp(on.shared_bytes, on.cooperative_threads), tiles);
  if (c.room.slots == 0) return false;
  if (fraction != 0 && tiles > fraction * resident_of(c.room, tiles)) return false;
  c.launch.shared_bytes = shared_bytes(p, on.cooperative_threads, c.room);
  c.launch.cooperative = true;
  const int running = std::min(make_room(on, p, c.launch.blocks, c), on.multiprocessors);
  c.sums_in_shared = c.scratch_offset != 0 && !adds_up_by_row(p, on.cooperative_threads);
  c.launch.blocks = std::min(running, int(p.chunks));
  if (running == 0) return false;
  *chosen = c;
  return true;
}

}  // namespace

void leave_free(int multiprocessors) {
  if (multiprocessors < 0) {
    throw std::invalid_argument("guard_ops: " + std::to_string(multiprocessors) +
                                " multiprocessors cannot be left free");
  }
  left_free = multiprocessors;
}

Machine machine() {
  const Device d = device();
  return {std::max(d.multiprocessors - left_free, 1),
          d.shared_bytes,
          d.cooperative,
          d.clusters,
          cooperative_threads,
          cluster_threads,
          [](Path path, const Launch& launch) { return at_once(kernel_of(path), launch); }};
}

Choice choose(const Machine& on, const Plan& p, const Wish& wish) {
  Choice chosen;
  const auto may = [&](Path path) {
    return wish.path == path || (wish.path == Path::automatic && wish.gradient);
  };
  if (may(Path::cluster) && wish.independent && choose_clusters(on, p, &chosen)) return chosen;
  const uint32_t fraction = wish.path == Path::cooperative ? 0 : 8;
  if (may(Path::cooperative) && choose_cooperative(on, p, fraction, &chosen)) return chosen;
  if (wish.path == Path::automatic || wish.path == Path::two_launches) return chosen;
  throw std::runtime_error(std::string("guard_ops: this device cannot run this loss by the path ") +
                           name_of(wish.path) + "; unset it");
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
