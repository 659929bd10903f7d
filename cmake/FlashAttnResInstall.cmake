# cmake --install: headers, library, and the package that find_package(FlashAttnRes) finds.

include(CMakePackageConfigHelpers)
set(package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/FlashAttnRes")

install(
  TARGETS flash_attn_res
  EXPORT FlashAttnResTargets
  ARCHIVE DESTINATION "${CMAKE_INSTALL_LIBDIR}" COMPONENT cpp
  LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}" COMPONENT cpp
  RUNTIME DESTINATION "${CMAKE_INSTALL_BINDIR}" COMPONENT cpp)
install(FILES ${FLASH_ATTN_RES_HEADERS} DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}/flash_attn_res"
        COMPONENT cpp)
install(EXPORT FlashAttnResTargets NAMESPACE flash_attn_res:: DESTINATION "${package_dir}"
        COMPONENT cpp)

# A static library hands its own dependencies on to whoever links it.
set(needs_openmp OFF)
set(needs_cuda OFF)
if(NOT BUILD_SHARED_LIBS)
  set(needs_openmp ${FLASH_ATTN_RES_OPENMP_FOUND})
  set(needs_cuda ${FLASH_ATTN_RES_CUDA_ENABLED})
endif()
configure_package_config_file(
  "${PROJECT_SOURCE_DIR}/cmake/FlashAttnResConfig.cmake.in"
  "${PROJECT_BINARY_DIR}/FlashAttnResConfig.cmake" INSTALL_DESTINATION "${package_dir}")
write_basic_package_version_file("${PROJECT_BINARY_DIR}/FlashAttnResConfigVersion.cmake"
                                 COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/FlashAttnResConfig.cmake"
              "${PROJECT_BINARY_DIR}/FlashAttnResConfigVersion.cmake"
        DESTINATION "${package_dir}" COMPONENT cpp)
