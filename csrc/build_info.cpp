#include "build_info.h"

namespace guard_ops {

#if defined(GUARD_OPS_CUDA_VERSION)
void define_cuda(pybind11::module_& m);
#else
#define GUARD_OPS_CUDA_VERSION nullptr
#define GUARD_OPS_CUDA_ARCHITECTURES ""
constexpr void (*define_cuda)(pybind11::module_&) = nullptr;
#endif

const Build build{GUARD_OPS_VERSION,
                  GUARD_OPS_TORCH_VERSION,
                  GUARD_OPS_CUDA_VERSION,
                  GUARD_OPS_CUDA_ARCHITECTURES,
                  GUARD_OPS_COMPILER,
                  GUARD_OPS_FLAGS,
                  define_cuda};

}  // namespace guard_ops
