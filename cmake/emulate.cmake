# The CUDA kernels for the emulated device of csrc/tests: the same files, compiled for the host. Only
# targets that test them build this.
file(GLOB emulated_kernels CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/cuda/*.cu)
set_source_files_properties(${emulated_kernels} PROPERTIES LANGUAGE CXX)
add_library(guard_ops_emulated OBJECT EXCLUDE_FROM_ALL
  ${emulated_kernels} ${PROJECT_SOURCE_DIR}/csrc/tests/emulate.cpp
  ${PROJECT_SOURCE_DIR}/csrc/tests/emulate_runtime.cpp)
target_include_directories(guard_ops_emulated BEFORE PUBLIC ${PROJECT_SOURCE_DIR}/csrc/tests/emulated)
target_compile_definitions(guard_ops_emulated PUBLIC GUARD_OPS_EMULATE)
target_compile_options(guard_ops_emulated PRIVATE -O2 -Wno-unknown-pragmas -Wno-unused-function
  $<$<COMPILE_LANGUAGE:CXX>:-xc++>)

# Makes the CUDA operators of an extension those of the emulated device.
function(guard_ops_add_emulated target)
  target_sources(${target} PRIVATE ${PROJECT_SOURCE_DIR}/csrc/bindings_cuda.cpp)
  target_link_libraries(${target} PRIVATE guard_ops_emulated)
  target_compile_definitions(${target} PRIVATE GUARD_OPS_CUDA_VERSION="emulated"
    GUARD_OPS_CUDA_ARCHITECTURES="emulated")
  set_target_properties(${target} PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/emulated)
endfunction()
