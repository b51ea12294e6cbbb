/* Attention by cuDNN's graphs, through NVIDIA's header-only cudnn-frontend. A graph is built once a shape and kept with the device's state. Where the
 * headers were not found when ladd was built, this engine says so instead.
 */
#include "attention.cuh"

#ifndef __CUDACC__
#include "cudnn_reference.h"
#elif defined(__CUDA_ARCH__)
/* There is no device code here: nvcc's passes for the devices need not read the frontend. */
#elif __has_include(<cudnn_frontend.h>) && __has_include(<cudnn.h>) && __has_include(<nvrtc.h>)
#include <dlfcn.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <unordered_map>

/* The frontend opens cuDNN and the CUDA run time by dlopen and dlsym. Here these names lead to where ladd has them: cuDNN's functions to
 * libraries.cu, the run time's to the copy that is linked into this extension (another one could be of another version, or absent). */
namespace {

char runtime_library, cudnn_library; /* their addresses are the handles */

void *frontend_open(const char *name, int flags) {
    if (strncmp(name, "libcudart.so.", 13) != 0) return dlopen(name, flags);
    return atoi(name + 13) == CUDART_VERSION / 1000 ? &runtime_library : nullptr;
}

void *frontend_symbol(void *handle, const char *name) {
    static const struct {
        const char *name;
        void *function;
    } runtime[] = {
#define F(function) {#function, (void *)function}
        F(cudaRuntimeGetVersion), F(cudaGetErrorString), F(cudaGetLastError),       F(cudaGetDevice),
        F(cudaMemcpyAsync),       F(cudaMemsetAsync),    F(cudaDeviceGetAttribute), F(cudaStreamIsCapturing),
#undef F
    };
    if (handle == &cudnn_library) return ladd_cuda_symbol(LADD_LIBRARY_CUDNN, name);
    if (handle != &runtime_library) return dlsym(handle, name);
    for (const auto &entry : runtime)
        if (strcmp(entry.name, name) == 0) return entry.function;
    return nullptr;
}

}  // namespace

#define NV_CUDNN_FRONTEND_USE_DYNAMIC_LOADING
#define CUDNN_FRONTEND_SKIP_JSON_LIB
#define dlopen frontend_open
#define dlsym frontend_symbol
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function" /* its headers define static functions */
#include <cudnn_frontend.h>
#pragma GCC diagnostic pop
#undef dlopen
#undef dlsym

namespace cudnn_frontend {
void *cudnn_dlhandle = &cudnn_library;
}

namespace {

namespace fe = cudnn_frontend;

enum : int64_t { Q = 1, K, V, O, STATISTICS, D_O, DQ, DK, DV };

/* {backward, type, B, heads, S, dh, row, batch, o_row, o_batch, bits of scale} */
typedef std::array<int64_t, 11> graph_key;

struct cudnn_plans {
    cudnnHandle_t handle = nullptr;
    std::map<graph_key, std::shared_ptr<fe::graph::Graph> > graphs; /* null: cuDNN has none for the shape */
    ~cudnn_plans() {
        graphs.clear();
        if (handle) fe::detail::destroy_handle(handle);
    }
};

void free_plans(void *plans) { delete (cudnn_plans *)plans; }

template <typename T>
ladd_status failed(const char *what, const attention_args<T> &a, const char *why) {
    return ladd_fail(LADD_ERR_RUNTIME, "cuDNN attention, %s (B %d, heads %d, S %d, head_dim %d): %.300s", what, a.B, a.heads, a.S, a.dh, why);
}

template <typename T>
std::shared_ptr<fe::graph::Graph> describe(const attention_args<T> &a, bool backward, ladd_dtype act) {
    const attention_part<T> &p = a.part[0];
    const auto type = act == LADD_BF16 ? fe::DataType_t::BFLOAT16 : fe::DataType_t::HALF;
    auto graph = std::make_shared<fe::graph::Graph>();
    graph->set_io_data_type(type).set_intermediate_data_type(fe::DataType_t::FLOAT).set_compute_data_type(fe::DataType_t::FLOAT);
    const std::vector<int64_t> dims = {a.B, a.heads, a.S, a.dh}, strides = {p.batch, a.dh, p.row, 1}, o_strides = {p.o_batch, a.dh, p.o_row, 1},
                               row_dims = {a.B, a.heads, a.S, 1}, row_strides = {(int64_t)a.heads * a.S, a.S, 1, 1};
    const auto input = [&](const char *name, int64_t uid, const std::vector<int64_t> &stride) {
        return graph->tensor(fe::graph::Tensor_attributes().set_name(name).set_uid(uid).set_dim(dims).set_stride(stride));
    };
    const auto output = [&](const std::shared_ptr<fe::graph::Tensor_attributes> &tensor, int64_t uid, const std::vector<int64_t> &stride) {
        tensor->set_output(true).set_uid(uid).set_dim(dims).set_stride(stride);
    };
    const auto q = input("q", Q, strides), k = input("k", K, strides), v = input("v", V, strides);
    if (!backward) {
        auto [o, statistics] = graph->sdpa(q, k, v, fe::graph::SDPA_attributes().set_name("sdpa").set_generate_stats(true).set_attn_scale(a.scale));
        output(o, O, o_strides);
        statistics->set_output(true).set_uid(STATISTICS).set_data_type(fe::DataType_t::FLOAT).set_dim(row_dims).set_stride(row_strides);
        return graph;
    }
    const auto o = input("o", O, o_strides), d_o = input("d_o", D_O, o_strides);
    const auto statistics = graph->tensor(fe::graph::Tensor_attributes()
                                              .set_name("statistics")
                                              .set_uid(STATISTICS)
                                              .set_data_type(fe::DataType_t::FLOAT)
                                              .set_dim(row_dims)
                                              .set_stride(row_strides));
    auto [dq, dk, dv] = graph->sdpa_backward(
        q, k, v, o, d_o, statistics,
        fe::graph::SDPA_backward_attributes().set_name("sdpa_backward").set_attn_scale(a.scale).set_deterministic_algorithm(true));
    output(dq, DQ, strides);
    output(dk, DK, strides);
    output(dv, DV, strides);
    return graph;
}

template <typename T>
graph_key key_of(const ladd_context *ctx, const attention_args<T> &a, bool backward) {
    const attention_part<T> &p = a.part[0];
    uint32_t scale_bits;
    memcpy(&scale_bits, &a.scale, sizeof scale_bits);
    return {backward, ctx->act, a.B, a.heads, a.S, a.dh, p.row, p.batch, p.o_row, p.o_batch, scale_bits};
}

template <typename T>
ladd_status plan(const ladd_context *ctx, const attention_args<T> &a, bool backward) {
    ladd_cuda_state *state = ladd_cuda(ctx);
    if (!attention_cudnn_there()) return LADD_ERR_RUNTIME; /* which left the sentence */
    cudnn_plans *plans = (cudnn_plans *)state->plans[LADD_CUDA_PLANS_ATTENTION];
    if (!plans) {
        auto made = std::make_unique<cudnn_plans>();
        const cudnnStatus_t status = fe::detail::create_handle(&made->handle);
        if (status != CUDNN_STATUS_SUCCESS) return failed("start of the library", a, fe::detail::get_error_string(status));
        state->plans[LADD_CUDA_PLANS_ATTENTION] = plans = made.release();
        state->plans_free[LADD_CUDA_PLANS_ATTENTION] = free_plans;
    }
    const graph_key key = key_of(ctx, a, backward);
    const auto known = plans->graphs.find(key);
    if (known != plans->graphs.end()) return known->second ? LADD_OK : failed("plan", a, "refused before in this process");
    auto made = describe(a, backward, ctx->act);
    auto built = made->build(plans->handle, {fe::HeurMode_t::A});
    plans->graphs[key] = built.is_bad() ? nullptr : made;
    return built.is_bad() ? failed("plan", a, built.get_message().c_str()) : LADD_OK;
}

template <typename T>
ladd_status run(const ladd_context *ctx, const attention_args<T> &a, bool backward) {
    ladd_cuda_state *state = ladd_cuda(ctx);
    cudnn_plans *plans = (cudnn_plans *)state->plans[LADD_CUDA_PLANS_ATTENTION];
    const attention_part<T> &p = a.part[0];
    const cudnnStatus_t status = fe::detail::set_stream(plans->handle, state->stream);
    if (status != CUDNN_STATUS_SUCCESS) return failed("choice of a stream", a, fe::detail::get_error_string(status));
    const std::shared_ptr<fe::graph::Graph> &graph = plans->graphs.at(key_of(ctx, a, backward));
    int64_t bytes = 0;
    auto sized = graph->get_workspace_size(bytes);
    if (sized.is_bad()) return failed("workspace", a, sized.get_message().c_str());
    void *workspace = nullptr;
    if (bytes > 0) LADD_TRY(ladd_cuda_scratch(ctx, &workspace, 1, (size_t)bytes));
    std::unordered_map<int64_t, void *> pointers = {{Q, (void *)p.q}, {K, (void *)p.k}, {V, (void *)p.v}, {O, p.o}, {STATISTICS, a.lse}};
    if (backward) {
        pointers[D_O] = (void *)p.d_o;
        pointers[DQ] = p.dq;
        pointers[DK] = p.dk;
        pointers[DV] = p.dv;
    }
    auto done = graph->execute(plans->handle, pointers, workspace);
    return done.is_bad() ? failed("call", a, done.get_message().c_str()) : LADD_OK;
}

/* The frontend's exceptions end here. */
template <typename T>
ladd_status guarded(ladd_status (*work)(const ladd_context *, const attention_args<T> &, bool), const ladd_context *ctx, const attention_args<T> &a,
                    bool backward) {
    try {
        return work(ctx, a, backward);
    } catch (const std::bad_alloc &) {
        return ladd_fail(LADD_ERR_MEMORY, "out of memory for a plan of cuDNN's attention");
    } catch (const std::exception &e) {
        return failed("cudnn-frontend", a, e.what());
    }
}

}  // namespace

bool attention_cudnn_there() { return ladd_cuda_symbol(LADD_LIBRARY_CUDNN, "cudnnCreate") != nullptr; }

template <typename T>
ladd_status attention_cudnn_plan(const ladd_context *ctx, const attention_args<T> &a, bool backward) {
    return guarded<T>(plan<T>, ctx, a, backward);
}
template <typename T>
ladd_status attention_cudnn_run(const ladd_context *ctx, const attention_args<T> &a, bool backward) {
    return guarded<T>(run<T>, ctx, a, backward);
}

#else

static ladd_status absent() {
    return ladd_fail(LADD_ERR_RUNTIME,
                     "cuDNN attention: this ladd was built without it; build it again where cudnn.h, cudnn_frontend.h and nvrtc.h are found "
                     "(pip install nvidia-cudnn-cu13 nvidia-cudnn-frontend nvidia-cuda-nvrtc)");
}
bool attention_cudnn_there() { return false; }
template <typename T>
ladd_status attention_cudnn_plan(const ladd_context *, const attention_args<T> &, bool) {
    return absent();
}
template <typename T>
ladd_status attention_cudnn_run(const ladd_context *, const attention_args<T> &, bool) {
    return absent();
}
#endif

#ifndef __CUDA_ARCH__
template ladd_status attention_cudnn_plan(const ladd_context *, const attention_args<__nv_bfloat16> &, bool);
template ladd_status attention_cudnn_plan(const ladd_context *, const attention_args<__half> &, bool);
template ladd_status attention_cudnn_run(const ladd_context *, const attention_args<__nv_bfloat16> &, bool);
template ladd_status attention_cudnn_run(const ladd_context *, const attention_args<__half> &, bool);
#endif
