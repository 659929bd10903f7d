# Warnings, visibility and sanitizers, applied to every target of this project and to no other.

function(flash_attn_res_compiler_flags target)
  target_compile_options(
    ${target}
    PRIVATE $<$<COMPILE_LANGUAGE:C,CXX>:-Wall
            -Wextra
            -Wconversion
            -Wno-sign-conversion
            # Designated initialisers leave out what is to keep its default: that is their point.
            -Wno-missing-field-initializers
            $<$<BOOL:${FLASH_ATTN_RES_WERROR}>:-Werror>>
            $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
    # False alarms of GCC 12: overlapping copies in `"text" + std::string` (GCC bug 105651), and
    # the undefined operands that its own AVX-512 intrinsics pass on purpose (GCC bug 105593).
    target_compile_options(
      ${target}
      PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wno-restrict;-Wno-uninitialized;-Wno-maybe-uninitialized>)
  endif()
  if(FLASH_ATTN_RES_SANITIZE)
    set(flags -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:C,CXX>:${flags}>)
    target_link_options(${target} PUBLIC -fsanitize=address,undefined)
  endif()
endfunction()
