# find_package(mpq) with mpq_DIR=$(python -m mpq_kernels.capi --cmake): targets mpq::cpu and, where it was built,
# mpq::cuda.
get_filename_component(_mpq_root "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
foreach(_mpq_name cpu cuda)
  set(_mpq_library "${_mpq_root}/lib/libmpq_${_mpq_name}.so")
  if(EXISTS "${_mpq_library}" AND NOT TARGET mpq::${_mpq_name})
    add_library(mpq::${_mpq_name} SHARED IMPORTED)
    set_target_properties(mpq::${_mpq_name} PROPERTIES
      IMPORTED_LOCATION "${_mpq_library}"
      IMPORTED_SONAME "libmpq_${_mpq_name}.so"
      INTERFACE_INCLUDE_DIRECTORIES "${_mpq_root}/include")
  endif()
endforeach()
