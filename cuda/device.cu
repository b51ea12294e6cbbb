/* Devices: opening and closing, streams, memory, errors; the functions of csrc/device.h and cuda/device.h. */
#include <dlfcn.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

#include "common.cuh"

#ifndef LADD_CUDA_ARCHITECTURES
#define LADD_CUDA_ARCHITECTURES "none" /* the build says what it compiled for */
#endif

/* ---- errors ---------------------------------------------------------------------------------------------------------- */

static ladd_status (*report)(ladd_status code, const char *sentence);
ladd_status (*ladd_cuda_locate)(const char *library, char *path, size_t room);

/* The core's function of this name lives in another library; the sentence is handed over. */
extern "C" ladd_status ladd_fail(ladd_status code, const char *format, ...) {
    char sentence[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(sentence, sizeof sentence, format, arguments);
    va_end(arguments);
    return report ? report(code, sentence) : code;
}

/* After these the process's work on the device is lost and every later call fails too. */
static bool is_sticky(cudaError_t error) {
    switch (error) {
        case cudaErrorIllegalAddress:
        case cudaErrorLaunchFailure:
        case cudaErrorLaunchTimeout:
        case cudaErrorAssert:
        case cudaErrorHardwareStackError:
        case cudaErrorIllegalInstruction:
        case cudaErrorMisalignedAddress:
        case cudaErrorInvalidAddressSpace:
        case cudaErrorInvalidPc:
        case cudaErrorECCUncorrectable:
        case cudaErrorNvlinkUncorrectable:
        case cudaErrorContextIsDestroyed:
#if CUDART_VERSION >= 13000
        case cudaErrorContained:
        case cudaErrorTensorMemoryLeak:
#endif
            return true;
        default:
            return false;
    }
}

static ladd_status check(ladd_cuda_state *state, cudaError_t error, const char *what) {
    if (error == cudaSuccess) return LADD_OK;
    cudaGetLastError(); /* a plain error is taken off, so that the next call does not meet it again */
    const char *name = cudaGetErrorName(error), *words = cudaGetErrorString(error);
    int index = state ? state->index : 0;
    if (error == cudaErrorMemoryAllocation) return ladd_fail(LADD_ERR_MEMORY, "cuda:%d is out of memory in %s; the device stays usable", index, what);
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction || error == cudaErrorUnsupportedPtxVersion)
        return ladd_fail(LADD_ERR_RUNTIME,
                         "cuda:%d has compute capability %d.%d, and this build has kernels for %s: build ladd with LADD_CUDA_ARCHS=sm_%d (%s: %s)",
                         index, state ? state->sm / 10 : 0, state ? state->sm % 10 : 0, LADD_CUDA_ARCHITECTURES, state ? state->sm : 0, name, words);
    if (is_sticky(error)) {
        if (state) state->broken = LADD_ERR_RUNTIME;
        return ladd_fail(LADD_ERR_RUNTIME, "cuda:%d failed in %s or in work queued before (%s: %s); the device is unusable until this process ends",
                         index, what, name, words);
    }
    return ladd_fail(LADD_ERR_RUNTIME, "cuda:%d: %s failed (%s: %s)", index, what, name, words);
}

extern "C" ladd_status ladd_cuda_check(const ladd_context *ctx, cudaError_t error, const char *what) { return check(ladd_cuda(ctx), error, what); }

/* ---- memory ---------------------------------------------------------------------------------------------------------- */

/* Blocks that were given back are kept for the next request of about their size: work on one stream runs in order, so a block may be handed out again
 * while kernels that read it are still queued. What is handed out while a graph is recorded belongs to the graph until it is freed, for every replay
 * writes there again. */
typedef struct pool_block {
    void *pointer;
    size_t bytes;
    void *graph; /* that owns it, or NULL */
    bool busy;
} pool_block;

struct ladd_cuda_pool {
    std::mutex lock; /* arrays end in any thread */
    pool_block *blocks = nullptr;
    int n = 0, room = 0;
};

#ifdef LADD_EMULATOR_H
/* For the tests: blocks end where their data does and are never used again, so that an access beyond or behind is found. */
constexpr bool KEEP_BLOCKS = false;
#else
constexpr bool KEEP_BLOCKS = true;
#endif

static void give_back_free_blocks(ladd_cuda_state *state) {
    ladd_cuda_pool *pool = state->pool;
    int left = 0;
    for (int i = 0; i < pool->n; i++)
        if (pool->blocks[i].busy || pool->blocks[i].graph)
            pool->blocks[left++] = pool->blocks[i];
        else
            cudaFree(pool->blocks[i].pointer); /* waits for the device */
    pool->n = left;
}

/* The smallest kept block that is not more than twice too large. */
static pool_block *find_free(ladd_cuda_state *state, size_t bytes) {
    pool_block *best = nullptr;
    for (int i = 0; i < state->pool->n; i++) {
        pool_block *b = &state->pool->blocks[i];
        if (!b->busy && b->graph == state->capturing && b->bytes >= bytes && b->bytes / 2 <= bytes && (!best || b->bytes < best->bytes)) best = b;
    }
    return best;
}

extern "C" ladd_status ladd_cuda_alloc(LADD_CTX, void **block, size_t bytes) {
    ladd_cuda_state *state = ladd_cuda(ctx);
    ladd_cuda_pool *pool = state->pool;
    const size_t unit = !KEEP_BLOCKS ? 1 : (bytes > (1u << 20) ? (size_t)2 << 20 : 512), size = bytes ? (bytes + unit - 1) / unit * unit : unit;
    *block = nullptr;
    std::lock_guard<std::mutex> guard(pool->lock);
    pool_block *kept = size >= bytes ? find_free(state, size) : nullptr;
    if (kept) {
        kept->busy = true;
        *block = kept->pointer;
        return LADD_OK;
    }
    if (pool->n == pool->room) {
        int room = pool->room ? 2 * pool->room : 256;
        pool_block *blocks = (pool_block *)realloc(pool->blocks, (size_t)room * sizeof *blocks);
        if (!blocks) return ladd_fail(LADD_ERR_MEMORY, "out of memory for a list of %d blocks", room);
        pool->blocks = blocks;
        pool->room = room;
    }
    cudaError_t error = size < bytes ? cudaErrorMemoryAllocation : cudaMalloc(block, size);
    if (error == cudaErrorMemoryAllocation && size >= bytes) {
        cudaGetLastError();
        give_back_free_blocks(state);
        error = cudaMalloc(block, size);
    }
    if (error == cudaErrorMemoryAllocation) {
        cudaGetLastError();
        *block = nullptr;
        size_t available = 0, total = 0;
        if (cudaMemGetInfo(&available, &total) != cudaSuccess) cudaGetLastError();
        return ladd_fail(LADD_ERR_MEMORY, "cuda:%d is out of memory: expected %.1f MiB, the device has %.1f of %.1f MiB left; it stays usable",
                         state->index, (double)bytes / 1048576.0, (double)available / 1048576.0, (double)total / 1048576.0);
    }
    LADD_CUDA_TRY(ctx, error);
    pool->blocks[pool->n++] = pool_block{*block, size, state->capturing, true};
    return LADD_OK;
}

extern "C" void ladd_cuda_release(LADD_CTX, void *block) {
    ladd_cuda_pool *pool = ladd_cuda(ctx)->pool;
    std::lock_guard<std::mutex> guard(pool->lock);
    for (int i = 0; i < pool->n; i++)
        if (pool->blocks[i].pointer == block) pool->blocks[i].busy = false;
    if (!KEEP_BLOCKS) give_back_free_blocks(ladd_cuda(ctx));
}

/* A recorded sequence of work: what it replays, and the host numbers that it copies. */
typedef struct graph_number {
    struct graph_number *next;
    void *bytes; /* pinned: copies of a graph may not read pageable memory */
} graph_number;
typedef struct ladd_cuda_graph {
    ladd_cuda_state *state;
    cudaGraphExec_t ready;
    cudaEvent_t replayed; /* behind the newest replay */
    graph_number *numbers;
} ladd_cuda_graph;

/* A copy of host memory that lives as long as the graph that is being recorded: every replay reads it again. NULL when out of memory. */
static const void *kept_by_graph(ladd_cuda_state *state, const void *host, size_t bytes) {
    ladd_cuda_graph *graph = (ladd_cuda_graph *)state->capturing;
    graph_number *number = (graph_number *)calloc(1, sizeof *number);
    if (!number || cudaMallocHost(&number->bytes, bytes) != cudaSuccess) {
        cudaGetLastError();
        free(number);
        ladd_fail(LADD_ERR_MEMORY, "out of memory for the host's part of a graph");
        return nullptr;
    }
    number->next = graph->numbers;
    graph->numbers = number;
    return memcpy(number->bytes, host, bytes);
}

typedef struct ladd_cuda_pinned {
    struct ladd_cuda_pinned *next;
    char *host;
    size_t bytes;
    cudaEvent_t done;
} ladd_cuda_pinned;

static void pinned_free(ladd_cuda_state *state, ladd_cuda_pinned *block) {
    state->pinned_bytes -= block->bytes;
    if (block->done) cudaEventDestroy(block->done);
    if (block->host) cudaFreeHost(block->host);
    free(block);
}

/* A pinned block of at least `bytes` that no copy reads, taken out of the list: a kept one whose copy is done, or a new one. The list is ordered by
 * use, the longest unused first. */
static ladd_status pinned_take(LADD_CTX, ladd_cuda_pinned **taken, size_t bytes) {
    ladd_cuda_state *state = ladd_cuda(ctx);
    for (ladd_cuda_pinned **at = &state->pinned; *at; at = &(*at)->next) {
        ladd_cuda_pinned *block = *at;
        if (block->bytes < bytes || block->bytes / 2 > bytes) continue;
        if (cudaEventQuery(block->done) != cudaSuccess) {
            cudaGetLastError(); /* "not ready" is no error here; left there, the next launch would be taken for a failed one */
            continue;
        }
        *at = block->next;
        *taken = block;
        return LADD_OK;
    }
    while (state->pinned && state->pinned_bytes + bytes > LADD_CUDA_PINNED_MOST) {
        ladd_cuda_pinned *oldest = state->pinned;
        LADD_CUDA_TRY(ctx, cudaEventSynchronize(oldest->done));
        state->pinned = oldest->next;
        pinned_free(state, oldest);
    }
    ladd_cuda_pinned *block = (ladd_cuda_pinned *)calloc(1, sizeof *block);
    if (!block) return ladd_fail(LADD_ERR_MEMORY, "out of memory for a staging block");
    block->bytes = bytes;
    state->pinned_bytes += bytes;
    cudaError_t error = cudaMallocHost((void **)&block->host, bytes);
    if (error == cudaSuccess) error = cudaEventCreateWithFlags(&block->done, cudaEventDisableTiming);
    if (error != cudaSuccess) pinned_free(state, block);
    LADD_CUDA_TRY(ctx, error);
    *taken = block;
    return LADD_OK;
}

/* Host arrays travel through pinned memory, since the driver may wait for the stream before it copies pageable memory: small ones through the ring,
 * larger ones through blocks of their own size. */
extern "C" ladd_status ladd_cuda_upload(LADD_CTX, void *device, const void *host, size_t bytes) {
    if (bytes <= LADD_CUDA_STAGE_BYTES) {
        const void *staged;
        LADD_TRY(ladd_cuda_stage(ctx, &staged, host, bytes));
        LADD_CUDA_TRY(ctx, cudaMemcpyAsync(device, staged, bytes, cudaMemcpyDeviceToDevice, ladd_cuda(ctx)->stream));
        return LADD_OK;
    }
    ladd_cuda_state *state = ladd_cuda(ctx);
    if (state->capturing) {
        const void *kept = kept_by_graph(state, host, bytes);
        if (!kept) return LADD_ERR_MEMORY;
        LADD_CUDA_TRY(ctx, cudaMemcpyAsync(device, kept, bytes, cudaMemcpyHostToDevice, state->stream));
        return LADD_OK;
    }
    for (size_t from = 0; from < bytes; from += LADD_CUDA_PINNED_MOST / 4) { /* weights: in pieces */
        const size_t part = bytes - from < LADD_CUDA_PINNED_MOST / 4 ? bytes - from : LADD_CUDA_PINNED_MOST / 4;
        ladd_cuda_pinned *block = nullptr;
        LADD_TRY(pinned_take(ctx, &block, part));
        memcpy(block->host, (const char *)host + from, part);
        cudaError_t error = cudaMemcpyAsync((char *)device + from, block->host, part, cudaMemcpyHostToDevice, state->stream);
        if (error == cudaSuccess) error = cudaEventRecord(block->done, state->stream);
        block->next = nullptr;
        ladd_cuda_pinned **last = &state->pinned;
        while (*last) last = &(*last)->next;
        *last = block;
        LADD_CUDA_TRY(ctx, error);
    }
    return LADD_OK;
}

extern "C" ladd_status ladd_cuda_download(LADD_CTX, void *host, const void *device, size_t bytes) {
    if (ladd_cuda(ctx)->capturing)
        return ladd_fail(LADD_ERR_RUNTIME, "no number for the host expected while a graph is recorded (a loss, a norm, .numpy()), got one");
    LADD_CUDA_TRY(ctx, cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, ladd_cuda(ctx)->stream));
    LADD_CUDA_TRY(ctx, cudaStreamSynchronize(ladd_cuda(ctx)->stream));
    return LADD_OK;
}

extern "C" ladd_status ladd_cuda_scratch(const ladd_context *ctx, void **block, int slot, size_t bytes) {
    ladd_cuda_state *state = ladd_cuda(ctx);
    if (slot < 0 || slot >= LADD_CUDA_SLOTS) return ladd_fail(LADD_ERR_RUNTIME, "a scratch slot in [0, %d) expected, got %d", LADD_CUDA_SLOTS, slot);
    if (state->scratch_bytes[slot] < bytes || (state->capturing && state->scratch_graph[slot] != state->capturing)) {
        size_t more = bytes > state->scratch_bytes[slot] ? bytes : state->scratch_bytes[slot];
        void *fresh;
        LADD_TRY(ladd_cuda_alloc(ctx, &fresh, more));
        if (state->scratch[slot]) ladd_cuda_release(ctx, state->scratch[slot]); /* in stream order: what was queued still has it */
        state->scratch_graph[slot] = state->capturing;
        state->scratch[slot] = fresh;
        state->scratch_bytes[slot] = more;
    }
    *block = state->scratch[slot];
    return LADD_OK;
}

extern "C" ladd_status ladd_cuda_stage(const ladd_context *ctx, const void **device, const void *host, size_t bytes) {
    ladd_cuda_state *state = ladd_cuda(ctx);
    if (bytes > LADD_CUDA_STAGE_BYTES)
        return ladd_fail(LADD_ERR_VALUE, "at most %d bytes of numbers one a sample expected, got %zu", (int)LADD_CUDA_STAGE_BYTES, bytes);
    int slot = state->stage_next;
    state->stage_next = (slot + 1) % LADD_CUDA_STAGES;
    char *from = state->stage_host + (size_t)slot * LADD_CUDA_STAGE_BYTES, *to = state->stage_device + (size_t)slot * LADD_CUDA_STAGE_BYTES;
    *device = to;
    if (state->capturing) { /* every replay copies again, so the source must stay as it is now */
        const void *kept = kept_by_graph(state, host, bytes);
        if (!kept) return LADD_ERR_MEMORY;
        LADD_CUDA_TRY(ctx, cudaMemcpyAsync(to, kept, bytes, cudaMemcpyHostToDevice, state->stream));
        return LADD_OK;
    }
    LADD_CUDA_TRY(ctx, cudaEventSynchronize(state->stage_done[slot])); /* of the copy that used the slot a round ago: long done as a rule */
    memcpy(from, host, bytes);
    LADD_CUDA_TRY(ctx, cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, state->stream));
    LADD_CUDA_TRY(ctx, cudaEventRecord(state->stage_done[slot], state->stream));
    return LADD_OK;
}

extern "C" ladd_status ladd_cuda_result(const ladd_context *ctx, double *host, const double *device, int count) {
    ladd_cuda_state *state = ladd_cuda(ctx);
    if (count < 1 || count > LADD_CUDA_RESULTS)
        return ladd_fail(LADD_ERR_RUNTIME, "1 to %d numbers for the host expected, got %d", LADD_CUDA_RESULTS, count);
    LADD_TRY(ladd_cuda_download(ctx, state->result, device, (size_t)count * sizeof(double)));
    memcpy(host, state->result, (size_t)count * sizeof(double));
    return LADD_OK;
}

/* ---- between float and the compute type ------------------------------------------------------------------------------ */

template <int V, typename Y, typename X>
__global__ void __launch_bounds__(LADD_BLOCK) ladd_convert_kernel(Y *y, const X *x, int64_t n) {
    const int64_t i = ((int64_t)blockIdx.x * LADD_BLOCK + threadIdx.x) * V;
    if (i + V <= n) {
        float v[V];
        ladd_load<X, V>(v, x + i);
        ladd_store<Y, V>(y + i, v);
    } else {
        for (int64_t j = i; j < n; j++) y[j] = ladd_from_float<Y>(ladd_to_float(x[j]));
    }
}

template <typename Y, typename X>
static ladd_status convert(const ladd_context *ctx, Y *y, const X *x, int64_t n) {
    if (n <= 0) return LADD_OK;
    if (ladd_aligned16(y) && ladd_aligned16(x))
        return LADD_LAUNCH(ctx, (ladd_convert_kernel<8, Y, X>), (unsigned)ladd_ceil_div(n, LADD_BLOCK * 8), LADD_BLOCK, 0, y, x, n);
    return LADD_LAUNCH(ctx, (ladd_convert_kernel<1, Y, X>), (unsigned)ladd_ceil_div(n, LADD_BLOCK), LADD_BLOCK, 0, y, x, n);
}

extern "C" ladd_status ladd_cuda_to_act(LADD_CTX, ladd_act *y, const float *x, int64_t n) {
    LADD_CUDA_DISPATCH(ctx, T, return convert(ctx, (T *)y, x, n));
}
extern "C" ladd_status ladd_cuda_to_float(LADD_CTX, float *y, const ladd_act *x, int64_t n) {
    LADD_CUDA_DISPATCH(ctx, T, return convert(ctx, y, (const T *)x, n));
}

/* ---- tables ---------------------------------------------------------------------------------------------------------- */

#define LADD_ROW(name, arguments) LADD_CUDA(name),
static const ladd_backend backend = {
    "cuda", LADD_KERNELS(LADD_ROW) ladd_cuda_alloc, ladd_cuda_release, ladd_cuda_upload, ladd_cuda_download, ladd_cuda_to_act, ladd_cuda_to_float};
#undef LADD_ROW

/* ---- opening --------------------------------------------------------------------------------------------------------- */

/* The context that is current in a thread is asked of the driver: cudaGetDevice says 0 where there is none, and going back to that would open device
 * 0. */
static struct {
    int (*get)(void **context);
    int (*set)(void *context);
} driver;

static void find_driver() {
#ifdef LADD_EMULATOR_H
    driver = {cuCtxGetCurrent, cuCtxSetCurrent};
#else
    void *library = driver.set ? nullptr : dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL); /* never closed: the run time has it open too */
    if (!library) return;
    driver.get = (int (*)(void **))dlsym(library, "cuCtxGetCurrent");
    driver.set = (int (*)(void *))dlsym(library, "cuCtxSetCurrent");
#endif
}

static void *current_context() {
    void *context = nullptr;
    return driver.get && driver.get(&context) == 0 ? context : nullptr;
}

static void leave(void *before) {
    if (driver.set && before != current_context()) driver.set(before);
}

static ladd_status count_devices(int *devices) {
    int driver = 0, runtime = 0;
    *devices = 0;
    cudaError_t error = cudaGetDeviceCount(devices);
    if (error == cudaSuccess && *devices > 0) return LADD_OK;
    cudaGetLastError();
    if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
    if (cudaRuntimeGetVersion(&runtime) != cudaSuccess) runtime = 0;
    if (driver == 0)
        return ladd_fail(
            LADD_ERR_RUNTIME,
            "device cuda: an NVIDIA driver expected, but libcuda.so.1 is not there or not loaded; install the driver, or use device='cpu'");
    if (error == cudaErrorInsufficientDriver || error == cudaErrorSystemDriverMismatch)
        return ladd_fail(LADD_ERR_RUNTIME,
                         "device cuda: a driver for CUDA %d.%d expected (this build's runtime), the installed one is for %d.%d; update it",
                         runtime / 1000, runtime % 1000 / 10, driver / 1000, driver % 1000 / 10);
    if (error == cudaSuccess || error == cudaErrorNoDevice)
        return ladd_fail(LADD_ERR_RUNTIME, "device cuda: an NVIDIA GPU expected, the driver shows none (CUDA_VISIBLE_DEVICES hides devices too)");
    return check(nullptr, error, "cudaGetDeviceCount");
}

#define OPEN_TRY(call) LADD_TRY(check(state, (call), #call))

static ladd_status fill_state(ladd_cuda_state *state) {
    int major, minor, shared_memory;
    OPEN_TRY(cudaSetDevice(state->index));
    OPEN_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, state->index));
    OPEN_TRY(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, state->index));
    OPEN_TRY(cudaDeviceGetAttribute(&state->processors, cudaDevAttrMultiProcessorCount, state->index));
    OPEN_TRY(cudaDeviceGetAttribute(&shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, state->index));
    state->sm = 10 * major + minor;
    state->shared_memory = (size_t)shared_memory;
    /* Asked of one kernel, for all were compiled alike: a missing architecture shows here and not in the middle of a pass. */
    cudaFuncAttributes attributes;
    OPEN_TRY(cudaFuncGetAttributes(&attributes, (const void *)ladd_convert_kernel<1, float, float>));
    OPEN_TRY(cudaStreamCreateWithFlags(&state->own, cudaStreamNonBlocking));
    state->stream = state->own;
    size_t ring = (size_t)LADD_CUDA_STAGES * LADD_CUDA_STAGE_BYTES;
    OPEN_TRY(cudaMallocHost((void **)&state->stage_host, ring));
    OPEN_TRY(cudaMalloc((void **)&state->stage_device, ring));
    OPEN_TRY(cudaMallocHost((void **)&state->result, LADD_CUDA_RESULTS * sizeof(double)));
    for (int i = 0; i < LADD_CUDA_STAGES; i++) OPEN_TRY(cudaEventCreateWithFlags(&state->stage_done[i], cudaEventDisableTiming));
    return LADD_OK;
}

static void close_state(void *opaque) {
    ladd_cuda_state *state = (ladd_cuda_state *)opaque;
    if (state->broken == LADD_OK && state->process == (int)getpid() && cudaSetDevice(state->index) == cudaSuccess) {
        if (state->own) cudaStreamSynchronize(state->own);
        for (int i = 0; i < LADD_CUDA_PLANS; i++)
            if (state->plans[i]) state->plans_free[i](state->plans[i]);
        for (int i = 0; state->pool && i < state->pool->n; i++) cudaFree(state->pool->blocks[i].pointer);
        for (int i = 0; i < LADD_CUDA_STAGES; i++)
            if (state->stage_done[i]) cudaEventDestroy(state->stage_done[i]);
        while (state->pinned) {
            ladd_cuda_pinned *next = state->pinned->next;
            pinned_free(state, state->pinned);
            state->pinned = next;
        }
        if (state->stage_host) cudaFreeHost(state->stage_host);
        if (state->stage_device) cudaFree(state->stage_device);
        if (state->result) cudaFreeHost(state->result);
        if (state->own) cudaStreamDestroy(state->own);
        cudaGetLastError();
    }
    if (state->pool) free(state->pool->blocks);
    delete state->pool;
    free(state);
}

static ladd_status open_state(void **opened, int index) {
    int devices;
    *opened = nullptr;
    LADD_TRY(count_devices(&devices));
    find_driver();
    if (index < 0 || index >= devices) return ladd_fail(LADD_ERR_VALUE, "device: cuda:0 to cuda:%d expected, got cuda:%d", devices - 1, index);
    ladd_cuda_state *state = (ladd_cuda_state *)calloc(1, sizeof *state);
    if (!state) return ladd_fail(LADD_ERR_MEMORY, "out of memory for the state of a device");
    state->index = index;
    state->process = (int)getpid();
    void *before = current_context();
    state->pool = new (std::nothrow) ladd_cuda_pool;
    ladd_status status = state->pool ? fill_state(state) : ladd_fail(LADD_ERR_MEMORY, "out of memory for the state of a device");
    if (status == LADD_OK)
        *opened = state;
    else
        close_state(state);
    leave(before);
    return status;
}

static ladd_status enter(void *opaque, void **before) {
    ladd_cuda_state *state = (ladd_cuda_state *)opaque;
    *before = current_context();
    if (state->process != (int)getpid())
        return ladd_fail(LADD_ERR_RUNTIME,
                         "cuda:%d was opened before this process was forked off, and CUDA works in no such process; start it by 'spawn'",
                         state->index);
    if (state->broken != LADD_OK)
        return ladd_fail(LADD_ERR_RUNTIME, "cuda:%d is unusable since an earlier error in this process; restart it", state->index);
    return check(state, cudaSetDevice(state->index), "cudaSetDevice");
}

static ladd_status info(void *opaque, ladd_device_info *out) {
    ladd_cuda_state *state = (ladd_cuda_state *)opaque;
    cudaDeviceProp properties;
    OPEN_TRY(cudaGetDeviceProperties(&properties, state->index));
    snprintf(out->name, sizeof out->name, "%s", properties.name);
    snprintf(out->architectures, sizeof out->architectures, "%s", LADD_CUDA_ARCHITECTURES);
    out->capability = state->sm;
    OPEN_TRY(cudaDriverGetVersion(&out->driver));
    OPEN_TRY(cudaRuntimeGetVersion(&out->runtime));
    OPEN_TRY(cudaMemGetInfo(&out->memory_free, &out->memory_total));
    return LADD_OK;
}

/* ---- streams, events, graphs ----------------------------------------------------------------------------------------- */

static ladd_status wait(void *opaque) {
    ladd_cuda_state *state = (ladd_cuda_state *)opaque;
    return check(state, cudaStreamSynchronize(state->stream), "cudaStreamSynchronize");
}

static void *stream(void *opaque) { return ((ladd_cuda_state *)opaque)->stream; }
static void use_stream(void *opaque, void *other, int own) {
    ladd_cuda_state *state = (ladd_cuda_state *)opaque;
    state->stream = own ? state->own : (cudaStream_t)other;
}

/* `second` waits for what `first` holds now. */
static ladd_status order(ladd_cuda_state *state, cudaStream_t first, cudaStream_t second) {
    cudaEvent_t event;
    if (first == second) return LADD_OK;
    OPEN_TRY(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    ladd_status status = check(state, cudaEventRecord(event, first), "cudaEventRecord");
    if (status == LADD_OK) status = check(state, cudaStreamWaitEvent(second, event, 0), "cudaStreamWaitEvent");
    cudaEventDestroy(event); /* released by CUDA once it has come */
    return status;
}

static ladd_status wait_for(void *opaque, void *other) {
    ladd_cuda_state *state = (ladd_cuda_state *)opaque;
    if (state->capturing) { /* a recording may not wait for what is not in it */
        state->owes_wait = 1;
        return LADD_OK;
    }
    return order(state, (cudaStream_t)other, state->stream);
}
static ladd_status let_wait(void *opaque, void *other) { return order((ladd_cuda_state *)opaque, (cudaStream_t)stream(opaque), (cudaStream_t)other); }

static ladd_status record(void *opaque, void **event) {
    ladd_cuda_state *state = (ladd_cuda_state *)opaque;
    cudaEvent_t made;
    OPEN_TRY(cudaEventCreateWithFlags(&made, cudaEventDisableTiming));
    ladd_status status = check(state, cudaEventRecord(made, state->stream), "cudaEventRecord");
    if (status == LADD_OK)
        *event = made;
    else
        cudaEventDestroy(made);
    return status;
}

static int passed(void *event) {
    cudaError_t error = cudaEventQuery((cudaEvent_t)event);
    if (error == cudaErrorNotReady) {
        cudaGetLastError();
        return 0;
    }
    cudaEventDestroy((cudaEvent_t)event);
    return 1;
}

static ladd_status owner_of(const void *pointer, int *index) {
    cudaPointerAttributes attributes;
    *index = -1;
    LADD_TRY(check(nullptr, cudaPointerGetAttributes(&attributes, pointer), "cudaPointerGetAttributes"));
    if (attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged) *index = attributes.device;
    return LADD_OK;
}

static void graph_free(void *opaque) {
    ladd_cuda_graph *graph = (ladd_cuda_graph *)opaque;
    ladd_cuda_pool *pool = graph->state->pool;
    if (graph->replayed) { /* a replay under way still reads the host's numbers */
        cudaEventSynchronize(graph->replayed);
        cudaEventDestroy(graph->replayed);
    }
    std::lock_guard<std::mutex> guard(pool->lock);
    for (int i = 0; i < pool->n; i++)
        if (pool->blocks[i].graph == graph) pool->blocks[i].graph = nullptr;
    for (int i = 0; i < LADD_CUDA_SLOTS; i++)
        if (graph->state->scratch_graph[i] == graph) graph->state->scratch_graph[i] = nullptr;
    while (graph->numbers) {
        graph_number *next = graph->numbers->next;
        cudaFreeHost(graph->numbers->bytes);
        free(graph->numbers);
        graph->numbers = next;
    }
    if (graph->ready) cudaGraphExecDestroy(graph->ready);
    free(graph);
}

static ladd_status capture_begin(void *opaque) {
    ladd_cuda_state *state = (ladd_cuda_state *)opaque;
    if (state->capturing) return ladd_fail(LADD_ERR_RUNTIME, "cuda:%d: one recording at a time expected, one is under way", state->index);
    ladd_cuda_graph *graph = (ladd_cuda_graph *)calloc(1, sizeof *graph);
    if (!graph) return ladd_fail(LADD_ERR_MEMORY, "out of memory for a graph");
    graph->state = state;
    /* Relaxed: memory may be taken from CUDA while recording. */
    ladd_status status = check(state, cudaStreamBeginCapture(state->stream, cudaStreamCaptureModeRelaxed), "cudaStreamBeginCapture");
    if (status == LADD_OK)
        state->capturing = graph;
    else
        free(graph);
    return status;
}

static ladd_status capture_end(void *opaque, void **finished) {
    ladd_cuda_state *state = (ladd_cuda_state *)opaque;
    ladd_cuda_graph *graph = (ladd_cuda_graph *)state->capturing;
    cudaGraph_t recorded = nullptr;
    *finished = nullptr;
    if (!graph) return ladd_fail(LADD_ERR_RUNTIME, "cuda:%d: a recording under way expected, there is none", state->index);
    state->capturing = nullptr;
    ladd_status status = check(state, cudaStreamEndCapture(state->stream, &recorded), "cudaStreamEndCapture");
    if (status == LADD_OK) status = check(state, cudaGraphInstantiate(&graph->ready, recorded, 0), "cudaGraphInstantiate");
    if (status == LADD_OK) status = check(state, cudaEventCreateWithFlags(&graph->replayed, cudaEventDisableTiming), "cudaEventCreate");
    if (recorded) cudaGraphDestroy(recorded);
    if (state->owes_wait) {
        const ladd_status waited = check(state, cudaDeviceSynchronize(), "cudaDeviceSynchronize");
        state->owes_wait = 0;
        if (status == LADD_OK) status = waited;
    }
    if (status == LADD_OK)
        *finished = graph;
    else
        graph_free(graph);
    return status;
}

static ladd_status replay(void *opaque, void *graph) {
    ladd_cuda_state *state = (ladd_cuda_state *)opaque;
    ladd_cuda_graph *recorded = (ladd_cuda_graph *)graph;
    if (recorded->state != state)
        return ladd_fail(LADD_ERR_VALUE, "a graph of cuda:%d expected, got one of cuda:%d", state->index, recorded->state->index);
    if (state->capturing) return ladd_fail(LADD_ERR_RUNTIME, "cuda:%d: no replay expected while a graph is recorded, got one", state->index);
    OPEN_TRY(cudaGraphLaunch(recorded->ready, state->stream));
    return check(state, cudaEventRecord(recorded->replayed, state->stream), "cudaEventRecord");
}

static ladd_status attention_rules(void *opaque, const ladd_attention_rule *rules, int n) {
    ladd_cuda_state *state = (ladd_cuda_state *)opaque;
    if (n < 0 || n > LADD_ATTENTION_RULES)
        return ladd_fail(LADD_ERR_VALUE, "attention rules: at most %d for one device expected, got %d", (int)LADD_ATTENTION_RULES, n);
    for (int i = 0; i < n; i++) state->attention[i] = rules[i];
    state->attention_rules = n;
    return LADD_OK;
}

static void connect(ladd_status (*to_core)(ladd_status, const char *), ladd_status (*locate)(const char *, char *, size_t)) {
    report = to_core;
    ladd_cuda_locate = locate;
}

static const ladd_backend *backend_for(ladd_dtype act) { return act == LADD_F32 || act == LADD_BF16 || act == LADD_F16 ? &backend : nullptr; }

extern "C" const ladd_device_api ladd_cuda_api = {
    LADD_DEVICE_API, sizeof(ladd_backend), connect,  count_devices, open_state, close_state, enter,    leave,         backend_for, info,   wait,
    stream,          use_stream,           wait_for, let_wait,      record,     passed,      owner_of, capture_begin, capture_end, replay, graph_free,
    attention_rules};
