# Decides whether the CUDA backend is built, says so, and enables the language.
#
# Sets FLASH_ATTN_RES_CUDA_ENABLED and FLASH_ATTN_RES_CUDA_STATUS (for people).

set(FLASH_ATTN_RES_CUDA_ENABLED OFF)
set(cuda_sources_exist OFF)
if(EXISTS "${PROJECT_SOURCE_DIR}/src/cuda/CMakeLists.txt")
  set(cuda_sources_exist ON)
endif()

if(FLASH_ATTN_RES_CUDA STREQUAL "AUTO")
  if(cuda_sources_exist)
    include(CheckLanguage)
    check_language(CUDA)
    if(CMAKE_CUDA_COMPILER)
      set(FLASH_ATTN_RES_CUDA_ENABLED ON)
    else()
      set(FLASH_ATTN_RES_CUDA_STATUS "not built: no nvcc found (set CUDACXX or PATH)")
    endif()
  else()
    set(FLASH_ATTN_RES_CUDA_STATUS "not built: this source tree has no CUDA sources")
  endif()
elseif(FLASH_ATTN_RES_CUDA)
  if(NOT cuda_sources_exist)
    message(FATAL_ERROR "FLASH_ATTN_RES_CUDA is ON, but this source tree has no src/cuda")
  endif()
  set(FLASH_ATTN_RES_CUDA_ENABLED ON)
else()
  set(FLASH_ATTN_RES_CUDA_STATUS "not built: FLASH_ATTN_RES_CUDA is OFF")
endif()

if(FLASH_ATTN_RES_CUDA_ENABLED)
  # Must be chosen before the language is enabled: otherwise CMake fills in nvcc's own default.
  set(use_default_architectures OFF)
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
    set(use_default_architectures ON)
    set(CMAKE_CUDA_ARCHITECTURES 80)
  endif()
  enable_language(CUDA)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.4)
    message(FATAL_ERROR "CUDA 12.4 or later is needed, found ${CMAKE_CUDA_COMPILER_VERSION} "
                        "(${CMAKE_CUDA_COMPILER}); or set FLASH_ATTN_RES_CUDA=OFF")
  endif()
  if(use_default_architectures)
    # "80" keeps the PTX too: GPUs that none of the machine codes fits compile it when they load it.
    set(CMAKE_CUDA_ARCHITECTURES 80 89-real 90a-real)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
      list(APPEND CMAKE_CUDA_ARCHITECTURES 100a-real 120-real)
    endif()
  endif()
  if(NOT DEFINED CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
    # CMake 3.25 does not know that nvcc speaks C++20, which the sources of CUDA get from C++.
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
  endif()
  find_package(CUDAToolkit REQUIRED)
  string(REPLACE ";" " " architectures "${CMAKE_CUDA_ARCHITECTURES}")
  set(FLASH_ATTN_RES_CUDA_STATUS
      "${CMAKE_CUDA_COMPILER_VERSION} for architectures ${architectures}")
endif()

include(FlashAttnResHopper)

# Defines the target flash_attn_res_cutlass (headers only) for sources written with CuTe, if the
# headers are found. They are needed to build, never to use the library.
function(flash_attn_res_find_cutlass)
  if(NOT FLASH_ATTN_RES_CUTLASS_INCLUDE_DIR)
    find_package(Python COMPONENTS Interpreter)
    if(Python_EXECUTABLE)
      # cutlass_library is looked up, not imported: importing it loads half of SciPy.
      execute_process(
        COMMAND
          "${Python_EXECUTABLE}" -c
          "import importlib.util as u; s = u.find_spec('cutlass_library'); print(list(s.submodule_search_locations)[0] if s else '')"
        OUTPUT_VARIABLE package OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
      if(package AND EXISTS "${package}/source/include/cute/tensor.hpp")
        set(FLASH_ATTN_RES_CUTLASS_INCLUDE_DIR "${package}/source/include"
            CACHE PATH "CUTLASS headers, for the Hopper kernels" FORCE)
      endif()
    endif()
  endif()
  if(NOT EXISTS "${FLASH_ATTN_RES_CUTLASS_INCLUDE_DIR}/cute/tensor.hpp")
    message(
      WARNING
        "The Hopper kernels are left out, and phase 1 runs on the general ones, which take about "
        "twice as long: the CUTLASS headers (4.2 or later) were not found. Either\n"
        "  pip install --no-deps nvidia-cutlass==4.2.0.0\n"
        "into the Python that CMake found (${Python_EXECUTABLE}), or pass\n"
        "  -DFLASH_ATTN_RES_CUTLASS_INCLUDE_DIR=<cutlass>/include\n"
        "It is '${FLASH_ATTN_RES_CUTLASS_INCLUDE_DIR}' now.")
    return()
  endif()
  add_library(flash_attn_res_cutlass INTERFACE)
  target_include_directories(flash_attn_res_cutlass SYSTEM
                             INTERFACE "${FLASH_ATTN_RES_CUTLASS_INCLUDE_DIR}")
endfunction()
