# The target torch_stable: headers and libraries of PyTorch's stable C ABI, and nothing else.
#
# find_package(Torch) is not used on purpose: it brings compiler flags, CUDA settings and libraries
# that tie the result to one PyTorch version. What the extension module uses is stable: built
# against any PyTorch from 2.10 on, it loads on every PyTorch from 2.10 on. So any installed torch
# will do. It is searched in this order:
#
#   1. FLASH_ATTN_RES_TORCH_DIR, as CMake variable or environment variable: <site-packages>/torch
#   2. the Python of this build, without PYTHONPATH: pip's build isolation hides the packages of
#      the environment that it installs into by means of PYTHONPATH alone
#   3. the active virtual or conda environment, and the python3 on PATH
#
# PyTorch is deliberately no build requirement in pyproject.toml: with build isolation, pip would
# download gigabytes of it for the sake of a few headers.

function(flash_attn_res_find_torch result)
  if(FLASH_ATTN_RES_TORCH_DIR)
    set(${result} "${FLASH_ATTN_RES_TORCH_DIR}" PARENT_SCOPE)
    return()
  endif()
  if(DEFINED ENV{FLASH_ATTN_RES_TORCH_DIR})
    set(${result} "$ENV{FLASH_ATTN_RES_TORCH_DIR}" PARENT_SCOPE)
    return()
  endif()

  find_package(Python COMPONENTS Interpreter)
  find_program(path_python NAMES python3 python NO_CACHE)
  set(interpreters "${Python_EXECUTABLE}" "$ENV{VIRTUAL_ENV}/bin/python"
                   "$ENV{CONDA_PREFIX}/bin/python" "${path_python}")
  set(tried "")
  foreach(interpreter IN LISTS interpreters)
    if(NOT EXISTS "${interpreter}" OR interpreter IN_LIST tried)
      continue()
    endif()
    list(APPEND tried "${interpreter}")
    # torch is looked up, not imported, which takes seconds. -E ignores PYTHONPATH.
    execute_process(
      COMMAND
        "${interpreter}" -E -c
        "import importlib.util as u; s = u.find_spec('torch'); print(list(s.submodule_search_locations)[0] if s and s.submodule_search_locations else '')"
      WORKING_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}"
      OUTPUT_VARIABLE folder OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    if(folder)
      set(${result} "${folder}" PARENT_SCOPE)
      return()
    endif()
  endforeach()
  list(JOIN tried "\n  " tried)
  message(
    FATAL_ERROR
      "PyTorch (2.10 or later) is needed to build the Python package of flash-attn-res, and none "
      "of these Pythons has it:\n  ${tried}\n"
      "Install PyTorch first (the CPU build is enough), then repeat the command. If PyTorch is "
      "installed where the build does not look, name its folder:\n"
      "  FLASH_ATTN_RES_TORCH_DIR=<site-packages>/torch pip install .\n"
      "or build in the environment itself: pip install --no-build-isolation .")
endfunction()

flash_attn_res_find_torch(torch_dir)
foreach(file include/torch/csrc/stable/library.h lib/libtorch.so lib/libtorch_cpu.so version.py)
  if(NOT EXISTS "${torch_dir}/${file}")
    message(FATAL_ERROR "PyTorch 2.10 or later is needed, but ${torch_dir} has no ${file}")
  endif()
endforeach()
file(STRINGS "${torch_dir}/version.py" torch_version REGEX "^__version__")
string(REGEX MATCH "[0-9]+\\.[0-9]+\\.[0-9]+" torch_version "${torch_version}")
if(torch_version VERSION_LESS 2.10)
  message(FATAL_ERROR "PyTorch 2.10 or later is needed, but ${torch_dir} is ${torch_version}")
endif()
message(STATUS "PyTorch ${torch_version}: ${torch_dir}")

add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE "${torch_dir}/include")
# The oldest PyTorch that the result loads on. Bytes: major, minor in hexadecimal; 0x020a is 2.10.
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020a000000000000ULL)
# libtorch.so is an empty library that depends on libtorch_cuda.so where PyTorch has CUDA: naming it
# puts the CUDA functions, which are weak references here, into the loader's reach.
target_link_options(torch_stable INTERFACE LINKER:--no-as-needed)
target_link_libraries(torch_stable INTERFACE "${torch_dir}/lib/libtorch.so"
                                             "${torch_dir}/lib/libtorch_cpu.so")
