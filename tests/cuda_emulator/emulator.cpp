/* The emulator's scheduler and its device memory; emulator.h says what is checked. */
#include "emulator.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "memory.h"

namespace ladd_emulator {

Thread *thread;
uint3 block_index;
dim3 block_size, grid_size;

namespace {

enum { MAX_THREADS = 1024, STACK_BYTES = 128 << 10, DEFAULT_SHARED = 48 << 10, MOST_SHARED = 227 << 10, SHARED_ROOM = 256 << 10, POOL = 33 };

/* ---- fibers ---------------------------------------------------------------------------------------------------------- */

#if !defined(__x86_64__)
#error "the emulator switches stacks by hand and knows x86-64 only"
#endif

extern "C" void ladd_emulator_switch(void **save, void *load);
__asm__(
    ".text\n"
    ".p2align 4\n"
    "ladd_emulator_switch:\n"
    "    pushq %rbp\n    pushq %rbx\n    pushq %r12\n    pushq %r13\n    pushq %r14\n    pushq %r15\n"
    "    movq %rsp, (%rdi)\n"
    "    movq %rsi, %rsp\n"
    "    popq %r15\n    popq %r14\n    popq %r13\n    popq %r12\n    popq %rbx\n    popq %rbp\n"
    "    ret\n");

enum State { READY, AT_BARRIER, AT_WARP, ENDED };

struct Copy {
    void *to;
    unsigned char bytes[16];
    int group;
};

struct Fiber : Thread {
    void *stack_pointer;
    State state;
    int line;  /* where it waits */
    int group; /* of asynchronous copies, the open one */
    std::vector<Copy> copies;
};

struct Warp {
    uint32_t present, waiting, mask[32];
    uint64_t left[32][4];
    struct {
        int readers;
        uint64_t words[32][4];
    } pool[POOL]; /* what the lanes of one operation left, until each of them has read it: at most one a lane */
    int pool_of[32];
};

Fiber fibers[MAX_THREADS];
Warp warps[MAX_THREADS / 32];
char *stacks;
void *scheduler_stack;
char *shared_end; /* dynamic shared memory ends where a page begins that cannot be accessed */
size_t shared_size;
int n_threads, waiting_at_barrier;
void (*body)(void *);
void *body_argument;
const char *kernel_name;
std::map<const void *, int> allowed_shared;

sigjmp_buf failed;
char message[640];

void yield() { ladd_emulator_switch(&static_cast<Fiber *>(thread)->stack_pointer, scheduler_stack); }

void fiber_main() {
    body(body_argument);
    static_cast<Fiber *>(thread)->state = ENDED;
    yield();
}

void prepare(int i) {
    Fiber &f = fibers[i];
    const dim3 &size = block_size;
    f.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    f.linear = i;
    f.lane = i % 32;
    f.warp = i / 32;
    f.state = READY;
    f.group = 0;
    f.copies.clear();
    /* As if fiber_main had been called from the bottom of the stack: six registers, its address, and an alignment that a call leaves. */
    void **top = reinterpret_cast<void **>(stacks + (size_t)(i + 1) * STACK_BYTES) - 1;
    *--top = reinterpret_cast<void *>(fiber_main);
    top -= 6;
    f.stack_pointer = top;
}

const char *where() {
    static char text[160];
    if (thread)
        snprintf(text, sizeof text, "kernel %s, block (%u, %u, %u), thread (%u, %u, %u)", kernel_name, block_index.x, block_index.y, block_index.z,
                 thread->index.x, thread->index.y, thread->index.z);
    else
        snprintf(text, sizeof text, "kernel %s, block (%u, %u, %u)", kernel_name, block_index.x, block_index.y, block_index.z);
    return text;
}

void no_progress() {
    int ended = 0, barrier_line = 0, warp_line = 0, in_warp = 0;
    for (int i = 0; i < n_threads; i++) {
        ended += fibers[i].state == ENDED;
        in_warp += fibers[i].state == AT_WARP;
        if (fibers[i].state == AT_BARRIER) barrier_line = fibers[i].line;
        if (fibers[i].state == AT_WARP) warp_line = fibers[i].line;
    }
    thread = nullptr;
    fail(
        "all %d threads expected at a barrier or warp operation; %d wait at __syncthreads (line %d), %d in a warp operation (line %d), %d have ended",
        n_threads, waiting_at_barrier, barrier_line, in_warp, warp_line, ended);
}

void run_block(const std::vector<int> &order) {
    for (int i = 0; i < n_threads; i++) prepare(i);
    for (int w = 0; w * 32 < n_threads; w++) {
        const int lanes = std::min(32, n_threads - 32 * w);
        warps[w].present = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1;
        warps[w].waiting = 0;
        for (auto &slot : warps[w].pool) slot.readers = 0;
    }
    waiting_at_barrier = 0;
    memset(shared_end - SHARED_ROOM, 0xff, SHARED_ROOM);
    for (int left = n_threads; left;) {
        bool ran = false;
        for (int i : order) {
            Fiber &f = fibers[i];
            if (f.state != READY) continue;
            ran = true;
            thread = &f;
            ladd_emulator_switch(&scheduler_stack, f.stack_pointer);
            left -= f.state == ENDED;
        }
        if (!ran) no_progress();
    }
    thread = nullptr;
    for (char *p = shared_end - SHARED_ROOM; p < shared_end - ((shared_size + 15) & ~(size_t)15); p++)
        if (*p != (char)0xff)
            fail("a write before the start of dynamic shared memory (%zu bytes), %td bytes before its end", shared_size, shared_end - p);
}

/* Every thread order is a permutation; 0: first to last, 1: last to first, then shuffled with the number as seed. */
std::vector<int> permutation(int n, int order, unsigned salt) {
    std::vector<int> p(n);
    for (int i = 0; i < n; i++) p[i] = order == 1 ? n - 1 - i : i;
    if (order > 1) std::shuffle(p.begin(), p.end(), std::mt19937(salt * 1000003u + order));
    return p;
}

void run_grid(int order) {
    const int blocks = (int)(grid_size.x * grid_size.y * grid_size.z);
    std::vector<int> threads = permutation(n_threads, order, 0);
    const std::vector<int> block_order = permutation(blocks, order, 1);
    for (int b : block_order) {
        block_index = {b % grid_size.x, b / grid_size.x % grid_size.y, b / (grid_size.x * grid_size.y)};
        if (order > 1) threads = permutation(n_threads, order, 2 + b);
        run_block(threads);
    }
}

/* ---- traps ----------------------------------------------------------------------------------------------------------- */

void on_signal(int number, siginfo_t *info, void *) {
    if (number == SIGSEGV || number == SIGBUS) {
        const char *at = static_cast<const char *>(info->si_addr);
        const std::string text = describe(at);
        if (!text.empty()) fail("an access to %s", text.c_str());
        if (at >= shared_end && at < shared_end + 4096)
            fail("an access %td bytes past the end of dynamic shared memory (%zu bytes)", at - shared_end, shared_size);
        fail("an access to %p, which is no memory", info->si_addr);
    }
    Dl_info symbol = {};
    dladdr(info->si_addr, &symbol);
    fail(
        "a check of the compiler failed: an index outside of an array, a misaligned access, an integer overflow or division by zero (at offset 0x%tx "
        "of "
        "%s)",
        static_cast<char *>(info->si_addr) - static_cast<char *>(symbol.dli_fbase), symbol.dli_fname ? symbol.dli_fname : "?");
}

/* Handlers for the time of a launch; Python's own come back after it. */
struct Traps {
    static constexpr int numbers[4] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
    struct sigaction before[4];
    stack_t stack_before;
    Traps() {
        static char *stack = static_cast<char *>(malloc(64 << 10)); /* handlers cannot run on a fiber's stack that has just overflowed */
        stack_t own = {};
        own.ss_sp = stack;
        own.ss_size = 64 << 10;
        sigaltstack(&own, &stack_before);
        struct sigaction action = {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        for (int i = 0; i < 4; i++) sigaction(numbers[i], &action, &before[i]);
    }
    ~Traps() {
        for (int i = 0; i < 4; i++) sigaction(numbers[i], &before[i], nullptr);
        sigaltstack(&stack_before, nullptr);
    }
};

bool prepare_once() {
    if (stacks) return true;
    void *room = mmap(nullptr, (size_t)MAX_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    void *shared = mmap(nullptr, SHARED_ROOM + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (room == MAP_FAILED || shared == MAP_FAILED) return false;
    shared_end = static_cast<char *>(shared) + SHARED_ROOM;
    mprotect(shared_end, 4096, PROT_NONE);
    stacks = static_cast<char *>(room);
    return true;
}

}  // namespace

/* ---- what kernels call ----------------------------------------------------------------------------------------------- */

void fail(const char *format, ...) {
    char text[400];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    snprintf(message, sizeof message, "%s: %s", where(), text);
    thread = nullptr;
    siglongjmp(failed, 1);
}

void *dynamic_shared() { return shared_end - ((shared_size + 15) & ~(size_t)15); }

bool in_shared(const void *pointer, size_t bytes) {
    const char *p = static_cast<const char *>(pointer), *start = static_cast<const char *>(dynamic_shared());
    if (p >= start && p + bytes <= shared_end) return true;
    Dl_info symbol, own;
    return dladdr(pointer, &symbol) && dladdr(&kernel_name, &own) && symbol.dli_fbase == own.dli_fbase;
}

void barrier(int line) {
    Fiber *f = static_cast<Fiber *>(thread);
    f->state = AT_BARRIER;
    f->line = line;
    if (++waiting_at_barrier < n_threads) return yield();
    waiting_at_barrier = 0;
    for (int i = 0; i < n_threads; i++) {
        if (fibers[i].line != line) fail("one barrier for all threads expected, got lines %d and %d", fibers[i].line, line);
        fibers[i].state = READY;
    }
}

const uint64_t (*exchange(uint32_t mask, const void *mine, size_t bytes, int line))[4] {
    Fiber *f = static_cast<Fiber *>(thread);
    Warp &w = warps[f->warp];
    if (!(mask >> f->lane & 1)) fail("a mask with the calling lane %d expected, got %08x", f->lane, mask);
    mask &= w.present;
    memcpy(w.left[f->lane], mine, bytes);
    w.mask[f->lane] = mask;
    w.waiting |= 1u << f->lane;
    f->line = line;
    if ((w.waiting & mask) != mask) {
        f->state = AT_WARP;
        yield();
        return w.pool[w.pool_of[f->lane]].words;
    }
    int slot = 0;
    while (w.pool[slot].readers) slot++;
    memcpy(w.pool[slot].words, w.left, sizeof w.left);
    w.pool[slot].readers = __builtin_popcount(mask);
    for (int lane = 0; lane < 32; lane++) {
        if (!(mask >> lane & 1)) continue;
        Fiber &other = fibers[32 * f->warp + lane];
        if (w.mask[lane] != mask || other.line != line)
            fail("one warp operation expected, got mask %08x in line %d and mask %08x in line %d", mask, line, w.mask[lane], other.line);
        w.pool_of[lane] = slot;
        other.state = READY;
    }
    w.waiting &= ~mask;
    return w.pool[slot].words;
}

void taken() {
    const Fiber *f = static_cast<Fiber *>(thread);
    Warp &w = warps[f->warp];
    w.pool[w.pool_of[f->lane]].readers--;
}

void copy_async(void *shared, const void *global, bool valid) {
    if ((uintptr_t)shared % 16 || !in_shared(shared, 16)) fail("cp.async to %p: an address in shared memory expected, on 16 bytes", shared);
    if (valid && ((uintptr_t)global % 16 || !in_device(global) || !global))
        fail("cp.async from %p: an address in device memory expected, on 16 bytes", global);
    Fiber *f = static_cast<Fiber *>(thread);
    Copy copy = {shared, {}, f->group};
    if (valid) memcpy(copy.bytes, global, 16);
    f->copies.push_back(copy);
    memset(shared, 0xff, 16); /* from now on the old content may be gone */
}

void copy_commit() { static_cast<Fiber *>(thread)->group++; }

void copy_wait(int newest) {
    Fiber *f = static_cast<Fiber *>(thread);
    size_t done = 0;
    for (; done < f->copies.size() && f->copies[done].group < f->group - newest; done++) memcpy(f->copies[done].to, f->copies[done].bytes, 16);
    f->copies.erase(f->copies.begin(), f->copies.begin() + (ptrdiff_t)done);
}

/* ---- launches -------------------------------------------------------------------------------------------------------- */

int orders = getenv("LADD_EMULATOR_ORDERS") ? std::max(1, atoi(getenv("LADD_EMULATOR_ORDERS"))) : 3;

cudaError_t allow_shared(const void *kernel, int bytes) {
    if (bytes > MOST_SHARED) return set_error(cudaErrorInvalidValue, "");
    allowed_shared[kernel] = bytes;
    return cudaSuccess;
}

cudaError_t bad_argument(const char *name, int index) {
    return set_error(cudaErrorIllegalAddress, "kernel " + std::string(name) + ": argument " + std::to_string(index) + " points to no device memory");
}

cudaError_t run(const char *name, const void *kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*call)(void *), void *argument) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    const uint64_t threads = (uint64_t)block.x * block.y * block.z;
    if (threads < 1 || threads > MAX_THREADS || block.z > 64 || grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffffu || grid.y > 65535 ||
        grid.z > 65535)
        return set_error(cudaErrorInvalidConfiguration, "kernel " + std::string(name) + ": no device takes a grid of " + std::to_string(grid.x) +
                                                            " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z) + " blocks of " +
                                                            std::to_string(threads) + " threads");
    const auto allowed = allowed_shared.find(kernel);
    const size_t most = allowed == allowed_shared.end() ? (size_t)DEFAULT_SHARED : (size_t)allowed->second;
    if (shared_bytes > most)
        return set_error(cudaErrorInvalidValue, "kernel " + std::string(name) + ": at most " + std::to_string(most) +
                                                    " bytes of dynamic shared memory allowed, got " + std::to_string(shared_bytes));
    if (!prepare_once()) return set_error(cudaErrorMemoryAllocation, "");
    HostAccess access;
    kernel_name = name;
    grid_size = grid;
    block_size = block;
    n_threads = (int)threads;
    shared_size = shared_bytes;
    body = call;
    body_argument = argument;
    thread = nullptr;
    Snapshot before, first;
    if (orders > 1) before.take();
    message[0] = 0;
    {
        Traps traps;
        for (volatile int order = 0; order < orders && !message[0]; order = order + 1) {
            if (order) before.restore();
            if (sigsetjmp(failed, 1) == 0) {
                run_grid(order);
                const std::string trespass = damaged();
                if (!trespass.empty()) fail("a write outside of %s", trespass.c_str());
            }
            if (message[0]) break;
            if (order == 0 && orders > 1) first.take();
            const std::string difference = order ? first.difference() : "";
            if (!difference.empty())
                snprintf(message, sizeof message,
                         "kernel %s: results depend on the order of threads or blocks (order %d): %s. A barrier is missing, or two threads write one "
                         "place",
                         kernel_name, order, difference.c_str());
        }
    }
    return message[0] ? set_error(cudaErrorLaunchFailure, message) : cudaSuccess;
}

}  // namespace ladd_emulator

/* How many orders each launch runs in: 1 saves time where the kernels themselves are not on trial. */
extern "C" void ladd_emulator_set_orders(int n) { ladd_emulator::orders = std::max(1, n); }
