/* Runs CUDA kernels on the host, for tests: a kernel file of cuda/ is compiled as C++ with this folder before CUDA's own headers.
 *
 * A block runs at a time, its threads are fibers: each runs until it meets a barrier or a warp-wide operation. So a launch is deterministic for one
 * order of blocks and threads; it is run in several orders (first to last, last to first, shuffled) from the same memory, and memory must come out
 * the same bits: a missing barrier or two blocks that write the same place show. What else is an error, named with kernel, block and thread:
 *   - a barrier or a warp operation that not all of its threads reach, or reach in different lines;
 *   - an access outside of a device buffer or of dynamic shared memory (buffers end at a page that cannot be accessed; what lies between is watched);
 *   - a vector access that is not aligned, an index outside of a static array (the compiler's checks, which trap);
 *   - a pointer argument that is not device memory; the host touching device memory outside of a copy (it is locked while no kernel runs);
 *   - a launch that no device would take: block or grid too large, shared memory beyond what was asked for.
 * Fresh device memory and shared memory are filled with NaN. Asynchronous copies land when they are waited for, not before.
 * What it cannot show: the weak order of memory between blocks of one launch, bank conflicts, speed.
 */
#ifndef LADD_EMULATOR_H
#define LADD_EMULATOR_H
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
typedef struct ladd_emulator_stream *cudaStream_t;
enum cudaError_t : int;

namespace ladd_emulator {

/* What the running thread may ask for. */
struct Thread {
    uint3 index;
    int linear, lane, warp;
};
extern Thread *thread;
extern uint3 block_index;
extern dim3 block_size, grid_size;

void *dynamic_shared();
bool in_shared(const void *pointer, size_t bytes); /* dynamic shared memory, or static storage of this library */
bool in_device(const void *pointer);               /* device memory, or NULL */
/* Ends the launch with an error; the sentence says which kernel, block and thread. */
[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

void barrier(int line);
/* Leaves `mine` (at most 32 bytes) for the other lanes of `mask`, waits for them, returns what all left: [32][4] 64-bit words. Free it by taken(). */
const uint64_t (*exchange(uint32_t mask, const void *mine, size_t bytes, int line))[4];
void taken();

void copy_async(void *shared, const void *global, bool valid);
void copy_commit();
void copy_wait(int newest);

cudaError_t run(const char *name, const void *kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void *), void *argument);
cudaError_t bad_argument(const char *name, int index);
cudaError_t allow_shared(const void *kernel, int bytes);

/* While a stream is captured, work is kept for the graph and not done; false: it is to be done now. */
bool captured(std::function<cudaError_t()> work);

/* While one lives, host code may touch device memory: copies, and library calls that the tests replace by the CPU's. */
struct HostAccess {
    HostAccess();
    ~HostAccess();
};

template <typename P>
bool good_argument(const P &value) {
    if constexpr (std::is_pointer_v<P>) return in_device((const void *)value);
    return true;
}

template <typename... P, typename... A>
cudaError_t launch(const char *name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, A... arguments) {
    static_assert(sizeof...(P) == sizeof...(A), "as many arguments as the kernel has");
    std::tuple<P...> values(static_cast<P>(arguments)...);
    int bad = 0, at = 0;
    std::apply([&](const P &...value) { ((at++, bad = !bad && !good_argument(value) ? at : bad), ...); }, values);
    if (bad) return bad_argument(name, bad);
    auto work = [=] {
        auto body = [&] { std::apply(kernel, values); };
        return run(name, (const void *)kernel, grid, block, shared_bytes, [](void *call) { (*static_cast<decltype(body) *>(call))(); }, &body);
    };
    return captured(work) ? cudaError_t() : work();
}

template <typename V>
V shuffle(uint32_t mask, V value, int from, int line) {
    static_assert(sizeof(V) <= 8, "a shuffle moves at most 8 bytes");
    const uint64_t (*all)[4] = exchange(mask, &value, sizeof value, line);
    V got;
    memcpy(&got, all[from & 31], sizeof got);
    taken();
    if (!(mask >> (from & 31) & 1)) fail("shuffle from lane %d, which is not in the mask %08x", from & 31, mask);
    return got;
}

inline uint32_t vote(uint32_t mask, int predicate, int line) {
    const uint64_t (*all)[4] = exchange(mask, &predicate, sizeof predicate, line);
    uint32_t bits = 0;
    for (int lane = 0; lane < 32; lane++)
        if ((mask >> lane & 1) && *(const int *)all[lane]) bits |= 1u << lane;
    taken();
    return bits;
}

}  // namespace ladd_emulator

#endif
