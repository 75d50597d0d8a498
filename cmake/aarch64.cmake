# The toolchain of scripts/arm.py: Debian's g++-aarch64-linux-gnu, and qemu-user-static to run what it
# links. Programs are static, so that no folder of libraries has to be found.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_EXE_LINKER_FLAGS_INIT -static)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64-static)
