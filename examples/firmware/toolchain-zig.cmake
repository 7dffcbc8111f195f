# Cortex-M4 by zig, of pip install ziglang or installed otherwise.
set(CMAKE_SYSTEM_NAME Generic)
set(CMAKE_SYSTEM_PROCESSOR arm)
find_program(ZIG NAMES zig python-zig REQUIRED NO_CMAKE_FIND_ROOT_PATH)
set(CMAKE_C_COMPILER ${ZIG} cc)
set(CMAKE_C_COMPILER_TARGET thumb-freestanding-eabihf)
# No program can be linked before there is a linker script.
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
set(CMAKE_C_FLAGS_INIT "-std=c99 -mcpu=cortex_m4 -ffp-contract=off -I\"${CMAKE_CURRENT_LIST_DIR}/freestanding\"")
set(CMAKE_EXE_LINKER_FLAGS_INIT "-nostdlib -lcompiler_rt")
# CMake takes one word for ar; zig's needs two.
set(CMAKE_C_ARCHIVE_CREATE "\"${ZIG}\" ar qc <TARGET> <OBJECTS>")
set(CMAKE_C_ARCHIVE_FINISH "\"${ZIG}\" ranlib <TARGET>")
set(CMAKE_BUILD_TYPE RelWithDebInfo CACHE STRING "-O2 -g")
