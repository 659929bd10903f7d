# Whether code for these architectures (the form of CMAKE_CUDA_ARCHITECTURES) has the Hopper kernels.
#
# They are written for sm_90a and compile to nothing for any other architecture. A Hopper GPU runs
# the code for 90a wherever there is some; else what its driver makes of older PTX, or code for plain
# sm_90, neither of which has them. So without 90a the library must not have them to choose from.
function(flash_attn_res_has_hopper_code architectures result)
  set(found OFF)
  foreach(architecture IN LISTS architectures)
    if(architecture MATCHES "^90a(-real|-virtual)?$")
      set(found ON)
    endif()
  endforeach()
  set(${result} ${found} PARENT_SCOPE)
endfunction()
