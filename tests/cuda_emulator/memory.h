/* Device memory of the emulator: one reserved range of addresses, a buffer between pages that cannot be accessed. */
#ifndef LADD_EMULATOR_MEMORY_H
#define LADD_EMULATOR_MEMORY_H
#include <mutex>
#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace ladd_emulator {

extern std::recursive_mutex lock;

/* Sets what cudaGetLastError and cudaGetErrorString tell, and returns it. */
cudaError_t set_error(cudaError_t error, const std::string &text);

/* The contents of all buffers at one time. */
struct Snapshot {
    std::vector<char> bytes;
    void take();
    void restore() const;
    std::string difference() const; /* where memory differs from it now; empty: nowhere */
};

std::string damaged();                /* a buffer beside which something was written; empty: none */
std::string describe(const char *at); /* an address of the range that no buffer holds, in words; empty: outside of the range */

}  // namespace ladd_emulator

#endif
