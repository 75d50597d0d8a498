// What tells one build of the extension from another. It is compiled by itself, so that the rest is
// one object for the extension and for the emulated one.
#pragma once

namespace pybind11 {
class module_;
}

namespace guard_ops {

struct Build {
  const char *version, *torch;
  const char *cuda, *cuda_architectures;  // cuda: null in a build without its kernels
  const char *compiler, *flags;
  void (*define_cuda)(pybind11::module_&);  // of bindings_cuda.cpp, or null
};

extern const Build build;

}  // namespace guard_ops
