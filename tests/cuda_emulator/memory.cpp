/* The emulator's device memory and the run-time calls around it: copies, streams and events, which here do their work at once. */
#include "memory.h"

#include <sys/mman.h>

#include <algorithm>

namespace ladd_emulator {

std::recursive_mutex lock;

namespace {

enum : size_t { RANGE = (size_t)1 << 40, PAGE = 4096, ALIGNMENT = 16 };
constexpr unsigned char MARK = 0xa5;

/* [mapping: marked bytes, data, at most 15 marked bytes][page without access]. A real device aligns to 256 bytes; kernels may count on 16. */
struct Buffer {
    char *mapping, *data;
    size_t mapped, bytes;
};

char *range;
size_t range_used;
std::vector<Buffer> buffers;
size_t bytes_used, bytes_most = getenv("LADD_EMULATOR_MEMORY") ? strtoull(getenv("LADD_EMULATOR_MEMORY"), nullptr, 10) : (size_t)8 << 30;
int host_access;
cudaError_t last_error, text_error;
std::string last_text; /* more words about text_error */

bool guarded = true;

void protect(int rights) {
    if (!guarded) return;
    for (const Buffer &b : buffers) mprotect(b.mapping, b.mapped, rights);
}

Buffer *find(const void *pointer) {
    for (Buffer &b : buffers)
        if (pointer >= b.data && pointer < b.data + std::max<size_t>(b.bytes, 1)) return &b;
    return nullptr;
}

std::string name_of(const Buffer &b) { return "the buffer of " + std::to_string(b.bytes) + " bytes, number " + std::to_string(&b - buffers.data()); }

}  // namespace

cudaError_t set_error(cudaError_t error, const std::string &text) {
    last_error = text_error = error;
    last_text = text;
    return error;
}

HostAccess::HostAccess() {
    lock.lock();
    if (host_access++ == 0) protect(PROT_READ | PROT_WRITE);
}
HostAccess::~HostAccess() {
    if (--host_access == 0) protect(PROT_NONE);
    lock.unlock();
}

/* 0, before any memory was taken: buffers are neither locked between kernels nor watched around their ends. Whole models make thousands of launches
 * and copies, and a call to the system for each buffer at each of them is most of the time; the kernels' own tests keep the guard. */
extern "C" void ladd_emulator_set_guard(int on) { guarded = on != 0; }

/* One past the end counts: an empty slice is a legal argument. */
bool in_device(const void *pointer) {
    if (!pointer) return true;
    for (const Buffer &b : buffers)
        if (pointer >= b.data && pointer <= b.data + b.bytes) return true;
    return false;
}

void Snapshot::take() {
    size_t total = 0;
    for (const Buffer &b : buffers) total += b.bytes;
    bytes.resize(total);
    char *to = bytes.data();
    for (const Buffer &b : buffers) {
        memcpy(to, b.data, b.bytes);
        to += b.bytes;
    }
}

void Snapshot::restore() const {
    const char *from = bytes.data();
    for (const Buffer &b : buffers) {
        memcpy(b.data, from, b.bytes);
        from += b.bytes;
    }
}

std::string Snapshot::difference() const {
    const char *was = bytes.data();
    for (const Buffer &b : buffers) {
        if (memcmp(was, b.data, b.bytes) != 0)
            return "byte " + std::to_string(std::mismatch(was, was + b.bytes, b.data).first - was) + " of " + name_of(b);
        was += b.bytes;
    }
    return "";
}

std::string damaged() {
    if (!guarded) return "";
    std::string found;
    auto look = [&](const Buffer &b, char *p, ptrdiff_t distance, const char *where) {
        if (*p == (char)MARK) return;
        if (found.empty()) found = name_of(b) + ", " + std::to_string(distance) + where;
        *p = (char)MARK; /* told once, not again by the next launch */
    };
    for (const Buffer &b : buffers) {
        for (char *p = b.mapping; p < b.data; p++) look(b, p, b.data - p, " bytes before it");
        for (char *p = b.data + b.bytes; p < b.mapping + b.mapped; p++) look(b, p, p - b.data - (ptrdiff_t)b.bytes, " bytes after its end");
    }
    return found;
}

std::string describe(const char *at) {
    if (!range || at < range || at >= range + RANGE) return "";
    for (const Buffer &b : buffers)
        if (at >= b.mapping - PAGE && at < b.mapping + b.mapped + PAGE)
            return "device memory outside of " + name_of(b) + ", " + std::to_string(at - b.data) + " bytes from its start";
    return "device memory that belongs to no buffer";
}

}  // namespace ladd_emulator

using namespace ladd_emulator;

cudaError_t cudaMalloc(void **block, size_t bytes) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    *block = nullptr;
    if (!range) {
        void *reserved = mmap(nullptr, RANGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (reserved == MAP_FAILED) return set_error(cudaErrorMemoryAllocation, "");
        range = static_cast<char *>(reserved);
    }
    Buffer b;
    b.bytes = bytes;
    const size_t rounded = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    b.mapped = (rounded + 16 * ALIGNMENT + PAGE - 1) / PAGE * PAGE;
    if (bytes > bytes_most - bytes_used || range_used + b.mapped + 2 * PAGE > RANGE) return set_error(cudaErrorMemoryAllocation, "");
    /* Addresses are not used again: a pointer to a freed buffer stays wrong. */
    b.mapping = range + range_used + PAGE;
    range_used += b.mapped + PAGE;
    if (mprotect(b.mapping, b.mapped, PROT_READ | PROT_WRITE) != 0) return set_error(cudaErrorMemoryAllocation, "");
    b.data = b.mapping + b.mapped - rounded;
    memset(b.mapping, MARK, b.mapped);
    memset(b.data, 0xff, bytes);
    if (!host_access && guarded) mprotect(b.mapping, b.mapped, PROT_NONE);
    buffers.push_back(b);
    bytes_used += bytes;
    *block = b.data;
    return cudaSuccess;
}

cudaError_t cudaFree(void *block) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    if (!block) return cudaSuccess;
    for (size_t i = 0; i < buffers.size(); i++)
        if (buffers[i].data == block) {
            bytes_used -= buffers[i].bytes;
            mmap(buffers[i].mapping, buffers[i].mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
            buffers.erase(buffers.begin() + (ptrdiff_t)i);
            return cudaSuccess;
        }
    return set_error(cudaErrorInvalidValue, "");
}

struct ladd_emulator_graph {
    std::vector<std::function<cudaError_t()>> work;
};
static ladd_emulator_graph *capturing;
static cudaStream_t capturing_stream;
static bool capture_broken;

/* How often the host waited for the device since the last question: calls that wait, and copies of pageable memory, before which the driver may. */
static int waits;
static std::vector<std::pair<char *, size_t>> pinned;
extern "C" int ladd_emulator_waits() {
    const int count = waits;
    waits = 0;
    return count;
}
static bool is_pinned(const void *pointer) {
    return std::any_of(pinned.begin(), pinned.end(), [=](const auto &p) { return pointer >= p.first && pointer < p.first + p.second; });
}

cudaError_t cudaMallocAsync(void **block, size_t bytes, cudaStream_t) { return cudaMalloc(block, bytes); }
cudaError_t cudaFreeAsync(void *block, cudaStream_t) { return cudaFree(block); }
cudaError_t cudaMallocHost(void **block, size_t bytes) {
    *block = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (*block) pinned.emplace_back(static_cast<char *>(*block), bytes);
    return *block || !bytes ? cudaSuccess : set_error(cudaErrorMemoryAllocation, "");
}
cudaError_t cudaHostAlloc(void **block, size_t bytes, unsigned) { return cudaMallocHost(block, bytes); }
cudaError_t cudaFreeHost(void *block) {
    pinned.erase(std::remove_if(pinned.begin(), pinned.end(), [=](const auto &p) { return p.first == block; }), pinned.end());
    free(block);
    return cudaSuccess;
}

/* Both ends must lie in one buffer. */
static bool good_range(const void *pointer, size_t bytes) {
    const Buffer *b = find(pointer);
    return b && (const char *)pointer + bytes <= b->data + b->bytes;
}
static bool is_device(const void *pointer) { return range && pointer >= range && pointer < range + RANGE; }

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    HostAccess access;
    if (!bytes) return cudaSuccess;
    const bool to_device = is_device(to), from_device = is_device(from);
    const bool kind_fits = kind == cudaMemcpyDefault || (to_device == (kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice) &&
                                                         from_device == (kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice));
    if (!kind_fits || (to_device && !good_range(to, bytes)) || (from_device && !good_range(from, bytes)))
        return set_error(cudaErrorInvalidValue, "a copy of " + std::to_string(bytes) + " bytes beyond a buffer, or with the wrong direction");
    memmove(to, from, bytes);
    return cudaSuccess;
}
static cudaError_t pretended_copy_error();
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
    if (kind == cudaMemcpyHostToDevice && !is_pinned(from)) {
        if (capturing) return set_error(cudaErrorStreamCaptureUnsupported, "a copy of pageable memory in a graph");
        waits++;
    }
    if (kind == cudaMemcpyDeviceToHost && pretended_copy_error() != cudaSuccess) return set_error(pretended_copy_error(), "");
    return captured([=] { return cudaMemcpy(to, from, bytes, kind); }) ? cudaSuccess : cudaMemcpy(to, from, bytes, kind);
}
cudaError_t cudaMemset(void *to, int value, size_t bytes) {
    HostAccess access;
    if (!bytes) return cudaSuccess;
    if (!good_range(to, bytes)) return set_error(cudaErrorInvalidValue, "a fill of " + std::to_string(bytes) + " bytes beyond a buffer");
    memset(to, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t) {
    return captured([=] { return cudaMemset(to, value, bytes); }) ? cudaSuccess : cudaMemset(to, value, bytes);
}
cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    *free = bytes_most - bytes_used;
    *total = bytes_most;
    return cudaSuccess;
}

bool ladd_emulator::captured(std::function<cudaError_t()> work) {
    if (!capturing) return false;
    capturing->work.push_back(std::move(work));
    return true;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    if (capturing || (uintptr_t)stream < 2) return set_error(cudaErrorStreamCaptureUnsupported, "");
    capturing = new ladd_emulator_graph;
    capturing_stream = stream;
    capture_broken = false;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *graph) {
    if (!capturing) return set_error(cudaErrorStreamCaptureUnsupported, "");
    *graph = capturing;
    capturing = nullptr;
    if (!capture_broken) return cudaSuccess;
    cudaGraphDestroy(*graph);
    *graph = nullptr;
    return set_error(cudaErrorStreamCaptureInvalidated, "");
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *ready, cudaGraph_t graph, unsigned long long) {
    *ready = new ladd_emulator_graph(*graph);
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t ready, cudaStream_t) {
    for (const auto &work : ready->work)
        if (const cudaError_t error = work(); error != cudaSuccess) return error;
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t ready) { return cudaGraphDestroy(ready); }

struct ladd_emulator_stream {};
struct ladd_emulator_event {
    cudaStream_t stream;
    bool captured;
};
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) {
    *stream = new ladd_emulator_stream;
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    delete stream;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
    waits++;
    return capturing ? set_error(cudaErrorStreamCaptureUnsupported, "") : cudaSuccess;
}
/* Who was made to wait for whom since the last question: "a>b " for each, where b waits for a. 0 is the stream of the device. */
static std::string orderings;
extern "C" const char *ladd_emulator_orderings() {
    static std::string told;
    told.swap(orderings);
    orderings.clear();
    return told.c_str();
}
/* A captured stream waits for nothing that was not captured with it, and nobody may ask after captured work. */
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    const auto number = [](cudaStream_t s) { return std::to_string((uintptr_t)s < 4096 ? (uintptr_t)s : 0); };
    orderings += number(event->stream) + ">" + number(stream) + " ";
    if (!capturing || event->captured == (stream == capturing_stream)) return cudaSuccess;
    capture_broken = true;
    return set_error(cudaErrorStreamCaptureIsolation, "");
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) {
    *event = new ladd_emulator_event{};
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete event;
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    *event = {stream, capturing && stream == capturing_stream};
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return event->captured ? set_error(cudaErrorCapturedEvent, "") : cudaSuccess; }
static int busy; /* questions after events that are answered with "not ready", which CUDA remembers as its last error */
extern "C" void ladd_emulator_set_busy(int questions) { busy = questions; }
cudaError_t cudaEventQuery(cudaEvent_t event) { return busy > 0 && busy-- ? set_error(cudaErrorNotReady, "") : cudaEventSynchronize(event); }
cudaError_t cudaDeviceSynchronize() {
    waits++;
    return cudaSuccess;
}
static thread_local void *context; /* current in this thread; device 0 has &context_of_device */
static char context_of_device;
cudaError_t cudaSetDevice(int device) {
    if (device != 0) return set_error(cudaErrorInvalidDevice, "");
    context = &context_of_device;
    return cudaSuccess;
}
int cuCtxGetCurrent(void **current) {
    *current = context;
    return 0;
}
int cuCtxSetCurrent(void *current) {
    context = current;
    return 0;
}
/* For the tests: what is current in this thread, and another choice. */
extern "C" void *ladd_emulator_context() { return context; }
extern "C" void ladd_emulator_set_context(void *chosen) { context = chosen; }
cudaError_t cudaGetDevice(int *device) {
    *device = 0;
    return cudaSuccess;
}
/* What the machine pretends to be, for tests of errors: number of devices, the driver's version (0: none installed), what a kernel's lookup gives,
 * and an error that the next copy to the host meets. */
static int pretended_devices = 1, pretended_driver = 13000;
static cudaError_t pretended_lookup = cudaSuccess, pretended_copy = cudaSuccess;
extern "C" void ladd_emulator_pretend(int devices, int driver, int lookup, int copy) {
    pretended_devices = devices;
    pretended_driver = driver;
    pretended_lookup = (cudaError_t)lookup;
    pretended_copy = (cudaError_t)copy;
}
static cudaError_t pretended_copy_error() { return pretended_copy; }
cudaError_t cudaGetDeviceCount(int *count) {
    *count = pretended_devices;
    if (pretended_driver < 13000) return set_error(cudaErrorInsufficientDriver, "");
    return pretended_devices ? cudaSuccess : set_error(cudaErrorNoDevice, "");
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int) {
    strcpy(properties->name, "emulator");
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, const void *) {
    attributes->binaryVersion = 90;
    return pretended_lookup == cudaSuccess ? cudaSuccess : set_error(pretended_lookup, "");
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *pointer) {
    attributes->device = 0;
    attributes->type = is_device(pointer) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount:
            *value = 4;
            break;
        case cudaDevAttrComputeCapabilityMajor:
            *value = 9;
            break;
        case cudaDevAttrComputeCapabilityMinor:
            *value = 0;
            break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = 227 << 10;
            break;
    }
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) {
    *version = pretended_driver;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = 13000;
    return cudaSuccess;
}

const char *cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaSuccess:
            return "cudaSuccess";
#define LADD_EMULATOR_ERROR(name, number) \
    case cudaError##name:                 \
        return "cudaError" #name;
            LADD_EMULATOR_ERRORS(LADD_EMULATOR_ERROR)
    }
}
const char *cudaGetErrorString(cudaError_t error) { return error == text_error && !last_text.empty() ? last_text.c_str() : cudaGetErrorName(error); }
cudaError_t cudaGetLastError() {
    const cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }
