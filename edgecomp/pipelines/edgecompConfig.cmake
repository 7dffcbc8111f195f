# Networks in C within a firmware's own build; cmake 3.20 or newer, Ninja or Unix Makefiles, any compiler of C99.
#
#   find_package(edgecomp CONFIG REQUIRED)     # cmake -Dedgecomp_DIR=$(edgecomp --cmake-dir) ...
#   edgecomp_add_model(TARGET digits PLAN model/plan.json BUDGET_FLASH 64K BUDGET_RAM 32K)
#   target_link_libraries(firmware PRIVATE digits)
#
# The target is a static library. Its header is "network.h", and "digits/network.h" where there are several networks.
#
#   PLAN file           plan.json, from which the C is written while building; or
#   FOLDER path         with C that `edgecomp export` or `edgecomp build` has written before
#   GRAPH file          of the plan; by default graph.edgecomp beside it
#   BUDGET_FLASH bytes  a build with more weights and scales fails; 64K is 65,536
#   BUDGET_RAM bytes    so does one with a larger arena
#   MAX_DROP points     so does one that is less accurate than the float network by more
#   MANIFEST file       of the build that the plan is of: it knows the accuracy; by default manifest.json beside the plan
#   BASELINE file       an earlier manifest.json or network.c: what has grown since?
#   CORE name           budgets are of code and stack, too: the network is linked for that core, e.g. cortex-m4, and run
#                       in an emulator; needs edgecomp[firmware]
#   NAME name           what the functions in C begin with, where two networks have the same
#   WEIGHTS_AT_REST x   native or int8, as `edgecomp export` takes it
#
# EDGECOMP_COMMAND may say how edgecomp is called, e.g. -DEDGECOMP_COMMAND='python3;-m;edgecomp'.
cmake_minimum_required(VERSION 3.20)

get_filename_component(_edgecomp_package "${CMAKE_CURRENT_LIST_DIR}/.." REALPATH)

if(NOT EDGECOMP_COMMAND)
  # First of all the command of the environment that this file was installed into.
  find_program(
    EDGECOMP_COMMAND edgecomp
    HINTS "${_edgecomp_package}/../../../../bin" "${_edgecomp_package}/../../../Scripts"
    NO_CMAKE_FIND_ROOT_PATH
    DOC "how edgecomp is called")
endif()
if(NOT EDGECOMP_COMMAND)
  set(edgecomp_FOUND FALSE)
  set(edgecomp_NOT_FOUND_MESSAGE "the command edgecomp is not on the PATH; name it: -DEDGECOMP_COMMAND='python3;-m;edgecomp'")
  return()
endif()
execute_process(
  COMMAND ${EDGECOMP_COMMAND} --cmake-dir
  OUTPUT_VARIABLE _edgecomp_dir
  ERROR_VARIABLE _edgecomp_error
  RESULT_VARIABLE _edgecomp_result
  OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_STRIP_TRAILING_WHITESPACE)
get_filename_component(_edgecomp_own "${CMAKE_CURRENT_LIST_DIR}" REALPATH)
if(NOT _edgecomp_result EQUAL 0 OR NOT _edgecomp_dir STREQUAL _edgecomp_own)
  set(edgecomp_FOUND FALSE)
  set(edgecomp_NOT_FOUND_MESSAGE
      "'${EDGECOMP_COMMAND}' --cmake-dir says '${_edgecomp_dir}${_edgecomp_error}', expected ${_edgecomp_own}: it is another edgecomp than this package is of; name this one's command with -DEDGECOMP_COMMAND=...")
  return()
endif()

# Write a file only where it says something else, so that what depends on it is made again only then.
function(_edgecomp_note file)
  set(text "${ARGN}\n")
  set(before "")
  if(EXISTS "${file}")
    file(READ "${file}" before)
  endif()
  if(NOT text STREQUAL before)
    file(WRITE "${file}" "${text}")
  endif()
endfunction()

function(edgecomp_add_model)
  set(paths PLAN FOLDER GRAPH MANIFEST BASELINE)
  # Found out here, and not where the package is found: another folder of the project may call this.
  get_filename_component(init "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/../__init__.py" REALPATH)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${init}")
  file(STRINGS "${init}" version REGEX "^__version__ = ")
  cmake_parse_arguments(
    PARSE_ARGV 0 arg "" "TARGET;${paths};BUDGET_FLASH;BUDGET_RAM;MAX_DROP;CORE;NAME;WEIGHTS_AT_REST" "")
  set(us "edgecomp_add_model(TARGET ${arg_TARGET} ...)")
  if(DEFINED arg_UNPARSED_ARGUMENTS OR DEFINED arg_KEYWORDS_MISSING_VALUES)
    message(FATAL_ERROR "${us}: cannot read '${arg_UNPARSED_ARGUMENTS}${arg_KEYWORDS_MISSING_VALUES}'; the words it takes "
                        "stand at the top of ${CMAKE_CURRENT_FUNCTION_LIST_FILE}")
  endif()
  if(NOT arg_TARGET)
    message(FATAL_ERROR "${us}: expected TARGET, the name of the library")
  endif()
  if((arg_PLAN AND arg_FOLDER) OR NOT (arg_PLAN OR arg_FOLDER))
    message(FATAL_ERROR "${us}: expected either PLAN, to write the C from, or FOLDER, where it is")
  endif()
  if(arg_FOLDER AND (arg_GRAPH OR arg_NAME OR arg_WEIGHTS_AT_REST))
    message(FATAL_ERROR "${us}: GRAPH, NAME and WEIGHTS_AT_REST are for PLAN; the C in FOLDER is compiled as it is")
  endif()
  get_property(languages GLOBAL PROPERTY ENABLED_LANGUAGES)
  if(NOT "C" IN_LIST languages)
    message(FATAL_ERROR "${us}: the project has no C; expected project(... LANGUAGES C)")
  endif()
  foreach(path IN LISTS paths)
    if(arg_${path})
      cmake_path(ABSOLUTE_PATH arg_${path} BASE_DIRECTORY "${CMAKE_CURRENT_SOURCE_DIR}" NORMALIZE)
    endif()
  endforeach()

  set(ours "${CMAKE_CURRENT_BINARY_DIR}/edgecomp")
  set(made "${ours}/${arg_TARGET}")
  set(folder "${made}")
  set(names network.c edgecomp_kernels.c network.h edgecomp_kernels.h)
  if(arg_FOLDER)
    set(folder "${arg_FOLDER}")
    _edgecomp_note("${made}/network.h" "#include \"${folder}/network.h\"")
  endif()
  list(TRANSFORM names PREPEND "${folder}/" OUTPUT_VARIABLE files)

  if(arg_PLAN)
    if(NOT arg_GRAPH)
      cmake_path(REPLACE_FILENAME arg_PLAN graph.edgecomp OUTPUT_VARIABLE arg_GRAPH)
    endif()
    if(NOT arg_WEIGHTS_AT_REST)
      set(arg_WEIGHTS_AT_REST native)
    endif()
    set(command ${EDGECOMP_COMMAND} export "${arg_PLAN}" --graph "${arg_GRAPH}" --format c --weights-at-rest
                "${arg_WEIGHTS_AT_REST}" --force -o "${folder}")
    if(arg_NAME)
      list(APPEND command --name "${arg_NAME}")
    endif()
    _edgecomp_note("${ours}/${arg_TARGET}.export.txt" "${version} ${command}")
    add_custom_command(
      OUTPUT ${files}
      COMMAND ${command}
      DEPENDS "${arg_PLAN}" "${arg_GRAPH}" "${ours}/${arg_TARGET}.export.txt" "${init}"
      COMMENT "edgecomp: ${arg_TARGET} in C"
      VERBATIM)
  endif()

  add_library(${arg_TARGET} STATIC ${files})
  target_include_directories(${arg_TARGET} PUBLIC "${folder}" "${ours}")
  target_compile_features(${arg_TARGET} PRIVATE c_std_99)
  # With -Wl,--gc-sections a firmware has only the kernels that its networks call.
  target_compile_options(
    ${arg_TARGET} PRIVATE $<$<C_COMPILER_ID:GNU,Clang,AppleClang,ARMClang>:-ffunction-sections;-fdata-sections>)

  set(budgets)
  foreach(pair IN ITEMS BUDGET_FLASH=--max-flash BUDGET_RAM=--max-ram MAX_DROP=--max-drop)
    string(REPLACE "=" ";" pair "${pair}")
    list(GET pair 0 word)
    list(GET pair 1 option)
    if(DEFINED arg_${word})
      list(APPEND budgets ${option} "${arg_${word}}")
    endif()
  endforeach()
  if(NOT budgets)
    return()
  endif()
  if(DEFINED arg_MAX_DROP AND arg_PLAN AND NOT arg_MANIFEST)
    cmake_path(REPLACE_FILENAME arg_PLAN manifest.json OUTPUT_VARIABLE beside)
    if(EXISTS "${beside}")
      set(arg_MANIFEST "${beside}")
    endif()
  endif()
  set(known "${arg_MANIFEST}" "${arg_BASELINE}")
  if(arg_FOLDER AND EXISTS "${arg_FOLDER}/manifest.json")
    list(APPEND known "${arg_FOLDER}/manifest.json")
  endif()
  list(REMOVE_ITEM known "")
  foreach(pair IN ITEMS CORE=--target BASELINE=--baseline MANIFEST=--manifest)
    string(REPLACE "=" ";" pair "${pair}")
    list(GET pair 0 word)
    list(GET pair 1 option)
    if(arg_${word})
      list(APPEND budgets ${option} "${arg_${word}}")
    endif()
  endforeach()
  # A changed budget is judged anew, and nothing else is done: the library only waits for the judgement.
  _edgecomp_note("${ours}/${arg_TARGET}.budget.txt" "${version} ${budgets}")
  add_custom_command(
    OUTPUT "${ours}/${arg_TARGET}.gate.txt"
    COMMAND ${EDGECOMP_COMMAND} gate "${folder}" ${budgets} --report "${ours}/${arg_TARGET}.gate.txt"
    DEPENDS ${files} ${known} "${ours}/${arg_TARGET}.budget.txt"
    COMMENT "edgecomp: budgets of ${arg_TARGET}"
    VERBATIM)
  add_custom_target(${arg_TARGET}_gate ALL DEPENDS "${ours}/${arg_TARGET}.gate.txt")
  add_dependencies(${arg_TARGET} ${arg_TARGET}_gate)
endfunction()
