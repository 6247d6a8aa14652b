# cmake --install: headers, library, program, licence; the CMake package (thriftattn::thriftattn) and a pkg-config file.
include(CMakePackageConfigHelpers)
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/thriftattn)

install(DIRECTORY include/thriftattn DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN "*.h")
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})
install(TARGETS thriftattn EXPORT thriftattnTargets)
install(EXPORT thriftattnTargets NAMESPACE thriftattn:: DESTINATION ${package_dir})
if(TARGET thriftattn_cli)
  set_target_properties(thriftattn_cli PROPERTIES INSTALL_RPATH $ORIGIN/../${CMAKE_INSTALL_LIBDIR})
  install(TARGETS thriftattn_cli)
endif()

configure_package_config_file(cmake/thriftattnConfig.cmake.in ${CMAKE_CURRENT_BINARY_DIR}/thriftattnConfig.cmake
                              INSTALL_DESTINATION ${package_dir})
# Until 1.0 each minor version may change the interface.
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/thriftattnConfigVersion.cmake
                                 COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/thriftattnConfig.cmake
              ${CMAKE_CURRENT_BINARY_DIR}/thriftattnConfigVersion.cmake DESTINATION ${package_dir})

# Who links an archive links what it needs too; a shared library knows that itself.
file(RELATIVE_PATH PC_PREFIX /${CMAKE_INSTALL_LIBDIR}/pkgconfig /)
if(NOT BUILD_SHARED_LIBS)
  set(PC_LIBS " -lstdc++ -lm -pthread")
  if(THRIFTATTN_CUDA)
    string(APPEND PC_LIBS " ${CUDA_cudart_static_LIBRARY} -ldl -lrt")
  endif()
  set(PC_REQUIRES " fmt libhwy")
endif()
configure_file(cmake/thriftattn.pc.in ${CMAKE_CURRENT_BINARY_DIR}/thriftattn.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/thriftattn.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
