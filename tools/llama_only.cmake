# Included by CMake after every project(): the wheel of llama-cpp-python has no use for llama.cpp's `common` library,
# which serves its command line programs, and which is a third of what there is to compile.
set(LLAMA_BUILD_COMMON OFF)
