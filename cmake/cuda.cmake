# The CUDA kernels, compiled by custom commands and not by enable_language(CUDA): CMake's own
# support wants to link a program with the toolkit's run time first, which a compiler that comes from
# pip does not have. Nothing here links that run time: torch has loaded it before the extension is,
# and its c10_cuda, which the extension needs, names it.
#
#   CMAKE_CUDA_COMPILER       nvcc; else the one on PATH
#   CMAKE_CUDA_ARCHITECTURES  as CMake defines it: 90-real is machine code, 90-virtual PTX, 90 both
#   GUARD_OPS_CUDA_VERSION    what build_info()["cuda"] says; else what nvcc says
#   GUARD_OPS_CUDA_INCLUDES   folders of the run time's headers that are not beside nvcc
#   GUARD_OPS_NVCC_FLAGS      more flags, e.g. -Xptxas -v

if(NOT CMAKE_CUDA_COMPILER)
  find_program(CMAKE_CUDA_COMPILER nvcc REQUIRED)
endif()
# Beside the PTX of the newest, that of 80 and of 90 is for the devices in between that have no machine
# code here: sm_87, sm_110. It is made on the way to machine code, so it costs no compilation.
if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 80-virtual 86-real 89-real 90-real 90-virtual 100-real 120)
endif()
execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --version
  OUTPUT_VARIABLE nvcc_version COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" _ "${nvcc_version}")
if(NOT GUARD_OPS_CUDA_VERSION)
  set(GUARD_OPS_CUDA_VERSION ${CMAKE_MATCH_1})
endif()
# Where nvcc really is, behind links and wrapper scripts: the headers are beside it.
execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --dryrun -c -x cu /dev/null -o /dev/null
  ERROR_VARIABLE dryrun OUTPUT_VARIABLE dryrun)
string(REGEX MATCH "#\\$ TOP=([^\n]*)" _ "${dryrun}")
get_filename_component(cuda_root "${CMAKE_MATCH_1}" ABSOLUTE)
file(GLOB cuda_includes ${cuda_root}/include ${cuda_root}/targets/*/include)
list(APPEND cuda_includes ${GUARD_OPS_CUDA_INCLUDES})

# Machine code of several architectures is assembled from one intermediate code, that of the oldest of
# them: much of a compilation is spent on that. The kernels differ from sm_90 on (clusters) and on
# sm_100 (pairs of numbers).
set(generate_code "")
set(cuda_architectures "")
set(reals_before_90 "")
set(reals_from_90 "")
set(reals_from_100 "")
foreach(architecture ${CMAKE_CUDA_ARCHITECTURES})
  if(NOT architecture MATCHES "^([0-9]+[af]?)(-real|-virtual)?$")
    message(FATAL_ERROR "CMAKE_CUDA_ARCHITECTURES has ${architecture}; it needs 90, 90-real or 90-virtual")
  endif()
  set(number ${CMAKE_MATCH_1})
  set(kind "${CMAKE_MATCH_2}")
  if(number MATCHES "^[1-7][0-9][af]?$")
    message(FATAL_ERROR "CMAKE_CUDA_ARCHITECTURES has ${architecture}; the kernels need 80 or newer")
  endif()
  if(kind STREQUAL "-real" AND number MATCHES "^[0-9]+$")
    if(number LESS 90)
      list(APPEND reals_before_90 ${number})
    elseif(number LESS 100)
      list(APPEND reals_from_90 ${number})
    else()
      list(APPEND reals_from_100 ${number})
    endif()
    list(APPEND cuda_architectures sm_${number})
    continue()
  endif()
  if(NOT kind STREQUAL "-virtual")
    list(APPEND generate_code -gencode=arch=compute_${number},code=sm_${number})
    list(APPEND cuda_architectures sm_${number})
  endif()
  if(NOT kind STREQUAL "-real")
    list(APPEND generate_code -gencode=arch=compute_${number},code=compute_${number})
    list(APPEND cuda_architectures compute_${number})
  endif()
endforeach()
foreach(reals IN ITEMS "${reals_before_90}" "${reals_from_90}" "${reals_from_100}")
  if(reals)
    list(SORT reals COMPARE NATURAL)
    list(GET reals 0 oldest)
    list(JOIN reals ",sm_" codes)
    list(APPEND generate_code "-gencode=arch=compute_${oldest},code=[sm_${codes}]")
  endif()
endforeach()
list(JOIN cuda_architectures " " cuda_architectures)

# nvcc takes the compiler itself: under CXX="ccache g++" CMake has the first word as the compiler, and
# the others as its arguments.
set(host_compiler ${CMAKE_CXX_COMPILER})
if(CMAKE_CXX_COMPILER_ARG1 MATCHES "^ *([^- ][^ ]*)")
  set(host_compiler ${CMAKE_MATCH_1})
endif()

file(GLOB cuda_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/cuda/*.cu)
list(TRANSFORM cuda_includes PREPEND -I OUTPUT_VARIABLE cuda_include_flags)
set(cuda_objects "")
foreach(source ${cuda_sources})
  get_filename_component(name ${source} NAME_WE)
  set(object ${PROJECT_BINARY_DIR}/cuda/${name}.o)
  file(MAKE_DIRECTORY ${PROJECT_BINARY_DIR}/cuda)
  # -fmad=false: every rounding is written down, as on the CPU.
  add_custom_command(OUTPUT ${object} DEPENDS ${source} DEPFILE ${object}.d
    COMMAND ${CMAKE_CUDA_COMPILER} -c ${source} -o ${object} -MD -MF ${object}.d -O3 -std=c++17
      -fmad=false -ccbin ${host_compiler} -Xcompiler -fPIC,-fvisibility=hidden,-ffp-contract=off
      ${cuda_include_flags} ${generate_code} ${GUARD_OPS_NVCC_FLAGS}
    COMMAND_EXPAND_LISTS VERBATIM COMMENT "Compiling ${name}.cu for ${cuda_architectures}")
  list(APPEND cuda_objects ${object})
endforeach()
add_custom_target(guard_ops_cuda DEPENDS ${cuda_objects})

function(guard_ops_add_cuda target)
  target_sources(${target} PRIVATE ${cuda_objects} ${PROJECT_SOURCE_DIR}/csrc/bindings_cuda.cpp)
  set_source_files_properties(${cuda_objects} PROPERTIES EXTERNAL_OBJECT ON GENERATED ON)
  add_dependencies(${target} guard_ops_cuda)
  target_include_directories(${target} SYSTEM PRIVATE ${cuda_includes})
  target_link_libraries(${target} PRIVATE torch_cuda c10_cuda)
  target_compile_definitions(${target} PRIVATE GUARD_OPS_CUDA_VERSION="${GUARD_OPS_CUDA_VERSION}"
    GUARD_OPS_CUDA_ARCHITECTURES="${cuda_architectures}")
endfunction()
