# Which lists of CUDA architectures get the Hopper kernels; needs no nvcc.

cmake_minimum_required(VERSION 3.25)
include("${CMAKE_CURRENT_LIST_DIR}/../../cmake/FlashAttnResHopper.cmake")

function(expect wanted)
  flash_attn_res_has_hopper_code("${ARGN}" found)
  if((wanted AND NOT found) OR (found AND NOT wanted))
    message(SEND_ERROR "architectures '${ARGN}': Hopper kernels are ${found}, expected ${wanted}")
  endif()
endfunction()

expect(ON 90a)
expect(ON 90a-real)
expect(ON 80 89-real 90a-real 100a-real 120-real)
expect(ON 80 90a-virtual)
# A Hopper GPU compiles the PTX for sm_80, or runs plain sm_90: no kernel of sm_90a is there.
expect(OFF 80)
expect(OFF 80-virtual)
expect(OFF 90)
expect(OFF 90-real)
expect(OFF 80 100a-real)
expect(OFF native)
expect(OFF all-major)
expect(OFF OFF)
expect(OFF)
