/* Runs the C tests: `test_c` for all. Built with the address and undefined-behaviour sanitizers by tests/test_sanitizers.py. */
#include "check.h"

int main(void) {
    test_core();
    test_kernels();
    test_mmdit();
    test_autoencoder();
    test_discriminator();
    ladd_empty_cache();
    CHECK(ladd_memory_in_use() == 0);
    printf("ok %s\n", ladd_cpu_backend(LADD_F32)->name);
    return 0;
}
