// torch's streams; the emulated device has only one.
#pragma once

namespace c10::cuda {

struct CUDAStream {
  void* stream() const { return nullptr; }
};

inline CUDAStream getCurrentCUDAStream() { return {}; }

}  // namespace c10::cuda
