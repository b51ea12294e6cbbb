/* Status sentences, contexts, the arena and parameter tables: the parts of ladd.h that belong to no model and no kernel. */
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend.h"

static _Thread_local char last_error[512];

ladd_status ladd_fail(ladd_status code, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    return code;
}

const char *ladd_last_error(void) { return last_error; }

ladd_context ladd_cpu_context(ladd_dtype products) {
    return (ladd_context){.backend = ladd_cpu_backend(products), .act = LADD_F32, .act_size = sizeof(float)};
}

ladd_status ladd_check_interrupt(const ladd_context *ctx) {
    if (ctx->interrupted && ctx->interrupted(ctx->interrupt_argument)) return ladd_fail(LADD_ERR_INTERRUPTED, "interrupted");
    return LADD_OK;
}

/* ---- arena ----------------------------------------------------------------------------------------------------------- */

/* Blocks given back are kept for the next forward of about the same size, which then does not pay the page faults of hundreds of fresh megabytes.
 * At most KEPT blocks and never one more than twice too large for the request. A device keeps its blocks itself: it knows which of them belong to a
 * recorded graph. */
enum { KEPT = 16 };
static pthread_mutex_t arena_lock = PTHREAD_MUTEX_INITIALIZER;
static struct {
    void *block;
    size_t capacity;
    ladd_context owner;
} kept[KEPT];
static size_t bytes_in_use;

/* A child of a fork finds the lock free, whatever the parent's other threads were doing. */
static pthread_once_t arena_once = PTHREAD_ONCE_INIT;
static void lock_arenas(void) { pthread_mutex_lock(&arena_lock); }
static void unlock_arenas(void) { pthread_mutex_unlock(&arena_lock); }
static void arena_setup(void) { pthread_atfork(lock_arenas, unlock_arenas, unlock_arenas); }

void *ladd_arena_take(ladd_arena *arena, size_t bytes) {
    size_t at = arena->used;
    arena->used += (bytes + 63) & ~(size_t)63;
    return arena->base ? arena->base + at : NULL;
}

ladd_status ladd_arena_reserve(const ladd_context *ctx, ladd_arena *arena) {
    size_t need = arena->used ? arena->used : 64;
    void *block = NULL;
    size_t capacity = need;
    pthread_once(&arena_once, arena_setup);
    pthread_mutex_lock(&arena_lock);
    int best = -1;
    for (int i = 0; i < KEPT && !ctx->state; i++)
        if (kept[i].block && kept[i].capacity >= need && kept[i].capacity / 2 <= need && (best < 0 || kept[i].capacity < kept[best].capacity))
            best = i;
    if (best >= 0) {
        block = kept[best].block;
        capacity = kept[best].capacity;
        kept[best].block = NULL;
    }
    pthread_mutex_unlock(&arena_lock);
    if (!block && ctx->backend->alloc(ctx, &block, need) != LADD_OK) {
        ladd_empty_cache();
        LADD_TRY(ctx->backend->alloc(ctx, &block, need));
    }
    pthread_mutex_lock(&arena_lock);
    bytes_in_use += capacity;
    pthread_mutex_unlock(&arena_lock);
    *arena = (ladd_arena){.base = block, .used = 0, .capacity = capacity};
    return LADD_OK;
}

void ladd_arena_release(const ladd_context *ctx, ladd_arena *arena) {
    if (!arena->base) return;
    void *drop = arena->base;
    ladd_context drop_owner = *ctx;
    pthread_mutex_lock(&arena_lock);
    bytes_in_use -= arena->capacity;
    int slot = 0;
    for (int i = 0; i < KEPT; i++) {
        if (!kept[i].block) {
            slot = i;
            break;
        }
        if (kept[i].capacity < kept[slot].capacity) slot = i;
    }
    if (!ctx->state && (!kept[slot].block || kept[slot].capacity < arena->capacity)) { /* keep it, in the place of a smaller one if all are taken */
        drop = kept[slot].block;
        if (drop) drop_owner = kept[slot].owner;
        kept[slot].block = arena->base;
        kept[slot].capacity = arena->capacity;
        kept[slot].owner = *ctx;
    }
    pthread_mutex_unlock(&arena_lock);
    if (drop) drop_owner.backend->release(&drop_owner, drop);
    *arena = (ladd_arena){0};
}

void ladd_empty_cache(void) {
    pthread_mutex_lock(&arena_lock);
    for (int i = 0; i < KEPT; i++)
        if (kept[i].block) {
            kept[i].owner.backend->release(&kept[i].owner, kept[i].block);
            kept[i].block = NULL;
        }
    pthread_mutex_unlock(&arena_lock);
}

size_t ladd_memory_in_use(void) {
    pthread_mutex_lock(&arena_lock);
    size_t bytes = bytes_in_use;
    pthread_mutex_unlock(&arena_lock);
    return bytes;
}

/* ---- parameters ------------------------------------------------------------------------------------------------------ */

int64_t ladd_params_add(ladd_params *p, int trainable, const char *name, int ndim, const int64_t *shape) {
    if (p->n == p->room) {
        int room = p->room ? 2 * p->room : 64;
        ladd_param *table = realloc(p->table, (size_t)room * sizeof *table);
        if (!table) {
            ladd_fail(LADD_ERR_MEMORY, "out of memory for a table of %d parameters", room);
            return -1;
        }
        p->table = table;
        p->room = room;
    }
    ladd_param *e = &p->table[p->n];
    memset(e, 0, sizeof *e);
    if (snprintf(e->name, sizeof e->name, "%s", name) >= (int)sizeof e->name) {
        ladd_fail(LADD_ERR_VALUE, "parameter name of at most %d characters expected, got %s", LADD_NAME_MAX - 1, name);
        return -1;
    }
    e->ndim = ndim;
    e->count = 1;
    for (int i = 0; i < ndim; i++) {
        e->shape[i] = shape[i];
        if (shape[i] <= 0 || e->count > INT64_MAX / 8 / shape[i]) {
            ladd_fail(LADD_ERR_VALUE, "parameter %s: positive sizes expected, got %lld in dimension %d", name, (long long)shape[i], i);
            return -1;
        }
        e->count *= shape[i];
    }
    e->offset = p->size;
    e->trainable = trainable;
    p->size += e->count;
    if (trainable) p->trainable = p->size;
    p->n++;
    return e->offset;
}

static float *zeroed_floats(int64_t count) {
    size_t bytes = ((size_t)count * sizeof(float) + 63) & ~(size_t)63;
    float *block = aligned_alloc(64, bytes ? bytes : 64);
    if (block) memset(block, 0, bytes);
    return block;
}

static ladd_status no_room(int64_t count, const char *what) {
    return ladd_fail(LADD_ERR_MEMORY, "out of memory for %s%lld parameters", what, (long long)count);
}

ladd_status ladd_params_allocate(ladd_params *p) {
    p->data = zeroed_floats(p->size);
    p->compute = (const ladd_act *)p->data;
    return p->data ? LADD_OK : no_room(p->size, "");
}

ladd_status ladd_params_need_grad(ladd_params *p) {
    if (p->grad) return LADD_OK;
    const ladd_context *ctx = &p->device;
    if (!ctx->backend) {
        p->grad = zeroed_floats(p->trainable);
        return p->grad ? LADD_OK : no_room(p->trainable, "the gradients of ");
    }
    void *grad;
    LADD_TRY(ctx->backend->alloc(ctx, &grad, (size_t)p->trainable * sizeof(float)));
    /* zero() counts in elements of the compute type. */
    ladd_status status = ctx->backend->zero(ctx, grad, p->trainable * (int64_t)(sizeof(float) / ctx->act_size));
    if (status == LADD_OK)
        p->grad = grad;
    else
        ctx->backend->release(ctx, grad);
    return status;
}

ladd_status ladd_params_place(const ladd_context *ctx, ladd_params *p) {
    if (!ctx->state) return LADD_OK;
    const ladd_context device = {.backend = ctx->backend, .state = ctx->state, .act = ctx->act, .act_size = ctx->act_size};
    size_t bytes = (size_t)p->size * sizeof(float);
    void *data, *compute = NULL;
    LADD_TRY(device.backend->alloc(&device, &data, bytes));
    ladd_status status = device.backend->upload(&device, data, p->data, bytes);
    if (status == LADD_OK && device.act != LADD_F32) status = device.backend->alloc(&device, &compute, (size_t)p->size * device.act_size);
    if (status != LADD_OK) {
        device.backend->release(&device, data);
        return status;
    }
    free(p->data);
    p->data = data;
    p->compute = compute ? compute : data;
    p->stale = compute != NULL;
    p->device = device;
    return LADD_OK;
}

ladd_status ladd_params_ready(const ladd_context *ctx, ladd_params *p) {
    if (p->device.state != ctx->state || p->device.act != ctx->act)
        return ladd_fail(LADD_ERR_VALUE, "a context of the device and compute type that the model lives in expected, got another");
    if (!p->stale) return LADD_OK;
    if (p->compute != (const ladd_act *)p->data) LADD_TRY(ctx->backend->to_act(ctx, (ladd_act *)(uintptr_t)p->compute, p->data, p->size));
    if (p->stale == 1) p->stale = 0;
    return LADD_OK;
}

ladd_status ladd_params_on_host(ladd_params *p, ladd_status (*task)(void *argument), void *argument) {
    const ladd_context *ctx = &p->device;
    if (!ctx->backend) return task(argument);
    size_t bytes = (size_t)p->size * sizeof(float);
    float *device = p->data, *host = zeroed_floats(p->size);
    if (!host) return no_room(p->size, "a host copy of ");
    ladd_status status = ctx->backend->download(ctx, host, device, bytes);
    p->data = host;
    if (status == LADD_OK) status = task(argument);
    p->data = device;
    if (status == LADD_OK) status = ctx->backend->upload(ctx, device, host, bytes);
    if (!p->stale) p->stale = 1;
    free(host);
    return status;
}

const ladd_param *ladd_params_find(const ladd_params *p, const char *name) {
    for (int i = 0; i < p->n; i++)
        if (strcmp(p->table[i].name, name) == 0) return &p->table[i];
    return NULL;
}

void ladd_params_free(ladd_params *p) {
    const ladd_context *ctx = &p->device;
    if (ctx->backend) {
        if (p->compute != (const ladd_act *)p->data) ctx->backend->release(ctx, (void *)(uintptr_t)p->compute);
        ctx->backend->release(ctx, p->data);
        if (p->grad) ctx->backend->release(ctx, p->grad);
    } else {
        free(p->data);
        free(p->grad);
    }
    free(p->table);
    *p = (ladd_params){0};
}
