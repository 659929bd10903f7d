# Installs the library under a temporary prefix, builds examples/cpp against it with
# find_package(FlashAttnRes), runs the program and looks at what it prints.
#
#   cmake -D BUILD_DIR=... -D SOURCE_DIR=... -D WORK_DIR=... -D BUILD_TYPE=... -P install_test.cmake

file(REMOVE_RECURSE "${WORK_DIR}")

function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE result OUTPUT_VARIABLE output
                  ERROR_VARIABLE output)
  if(NOT result EQUAL 0)
    list(JOIN ARGN " " command)
    message(FATAL_ERROR "${command}\nended with ${result}:\n${output}")
  endif()
  set(output "${output}" PARENT_SCOPE)
endfunction()

run("${CMAKE_COMMAND}" --install "${BUILD_DIR}" --component cpp --prefix "${WORK_DIR}/prefix")
run("${CMAKE_COMMAND}" -S "${SOURCE_DIR}/examples/cpp" -B "${WORK_DIR}/build" -G "${GENERATOR}"
    "-DCMAKE_BUILD_TYPE=${BUILD_TYPE}" "-DCMAKE_PREFIX_PATH=${WORK_DIR}/prefix"
    "-DCMAKE_CXX_COMPILER=${CXX_COMPILER}" "-DCMAKE_CXX_FLAGS=${CXX_FLAGS}")
run("${CMAKE_COMMAND}" --build "${WORK_DIR}/build")
run("${WORK_DIR}/build/attention_residuals")

foreach(title "input of sublayer 2" "gradient of the embedding" "gradient of the pseudo-queries")
  if(NOT output MATCHES "${title}")
    message(FATAL_ERROR "The example did not print '${title}':\n${output}")
  endif()
endforeach()
if(output MATCHES "nan|inf")
  message(FATAL_ERROR "The example printed numbers that are not finite:\n${output}")
endif()

# The larger example builds against the installed library too; the Python tests run it.
if(DECODER)
  run("${CMAKE_COMMAND}" -S "${SOURCE_DIR}/examples/cpp/decoder" -B "${WORK_DIR}/decoder" -G
      "${GENERATOR}" "-DCMAKE_BUILD_TYPE=${BUILD_TYPE}" "-DCMAKE_PREFIX_PATH=${WORK_DIR}/prefix"
      "-DCMAKE_CXX_COMPILER=${CXX_COMPILER}" "-DCMAKE_CXX_FLAGS=${CXX_FLAGS}")
  run("${CMAKE_COMMAND}" --build "${WORK_DIR}/decoder")
endif()

# The headers are complete and stand on their own, each one.
file(GLOB headers RELATIVE "${WORK_DIR}/prefix/include" "${WORK_DIR}/prefix/include/*/*.h")
list(LENGTH headers count)
if(count LESS 8)
  message(FATAL_ERROR "Only these headers were installed: ${headers}")
endif()
foreach(header IN LISTS headers)
  file(WRITE "${WORK_DIR}/header.cpp" "#include \"${header}\"\n")
  run("${CXX_COMPILER}" -std=c++20 -fsyntax-only -Wall -Wextra -Werror
      "-I${WORK_DIR}/prefix/include" "${WORK_DIR}/header.cpp")
endforeach()
