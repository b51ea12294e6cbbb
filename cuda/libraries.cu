/* cuBLASLt, cuDNN and NCCL are never linked: a build needs none of them, and a process opens one when a kernel first asks for it. Python's
 * cuda-pathfinder knows where wheels, conda and the system keep them; without it the system's loader is asked. */
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <mutex>

#include "device.h"

extern ladd_status (*ladd_cuda_locate)(const char *library, char *path, size_t room);

static struct {
    const char *name, *sonames[2], *wheel;
    void *handle;
} libraries[LADD_LIBRARIES] = {{"cublasLt", {"libcublasLt.so.13", "libcublasLt.so.12"}, "nvidia-cublas", nullptr},
                               {"cudnn", {"libcudnn.so.9", "libcudnn.so"}, "nvidia-cudnn-cu13", nullptr},
                               {"nccl", {"libnccl.so.2", "libnccl.so"}, "nvidia-nccl-cu13", nullptr}};
static std::mutex lock;

static void *open_library(ladd_cuda_library which) {
    auto &l = libraries[which];
    char path[1024], tried[400] = "";
    if (ladd_cuda_locate && ladd_cuda_locate(l.name, path, sizeof path) == LADD_OK) {
        if ((l.handle = dlopen(path, RTLD_NOW | RTLD_LOCAL)) != nullptr) return l.handle;
        snprintf(tried, sizeof tried, "cuda-pathfinder gave %.200s (%.120s)", path, dlerror());
    } else {
        snprintf(tried, sizeof tried, "cuda-pathfinder found none in wheels, conda or the system");
    }
    for (const char *soname : l.sonames)
        if ((l.handle = dlopen(soname, RTLD_NOW | RTLD_LOCAL)) != nullptr) return l.handle;
    ladd_fail(LADD_ERR_RUNTIME,
              "the library %s expected: %s; the loader knows neither %s nor %s. Install it with: pip install \"ladd[cuda]\" (or pip install %s)",
              l.name, tried, l.sonames[0], l.sonames[1], l.wheel);
    return nullptr;
}

extern "C" void *ladd_cuda_symbol(ladd_cuda_library which, const char *name) {
    std::lock_guard<std::mutex> guard(lock);
    void *handle = libraries[which].handle ? libraries[which].handle : open_library(which);
    if (!handle) return nullptr;
    void *symbol = dlsym(handle, name);
    if (!symbol)
        ladd_fail(LADD_ERR_RUNTIME, "the function %s expected in the library %s, which is too old; update %s", name, libraries[which].name,
                  libraries[which].wheel);
    return symbol;
}
