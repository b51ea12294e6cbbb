"""The emulator of CUDA for the tests; emulator.h describes it, build.py compiles it."""
