/* The thread pool and each thread's scratch memory.
 *
 * One job at a time. The caller publishes it, works on it itself and leaves when every task is done; workers that have not joined by then are not
 * waited for, so a core that somebody else keeps busy costs its own share of the work and no more. Waiting is a short bounded spin (back-to-back
 * kernels find the workers awake), then a condition variable.
 *
 * A job's tasks are shared out in contiguous parts, one a thread, the same in every job; a thread that has finished its own part takes from the
 * others'. So from kernel to kernel a thread meets the rows that it wrote itself, which are still in its core's cache.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* sched_getaffinity */
#endif
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "cpu.h"

enum { MAX_THREADS = 256, SPIN_NANOSECONDS = 10000 };

static struct {
    pthread_mutex_t caller; /* held by the thread whose job is running; a second caller runs its tasks by itself instead of waiting */
    pthread_mutex_t lock;   /* guards everything below */
    pthread_cond_t wake, done;
    pthread_t workers[MAX_THREADS - 1];
    int n_workers; /* started */
    int stopping;
    void (*task)(void *argument, int64_t i);
    void *argument;
    int parts;
    int open;               /* the job accepts workers */
    atomic_int active;      /* workers inside the job */
    atomic_uint generation; /* changes when there is news for the workers */
    struct {
        _Alignas(64) atomic_int_fast64_t next; /* first task of this part that nobody took */
        int64_t end;
    } part[MAX_THREADS]; /* 0: the caller's, then the workers' */
} pool = {.caller = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER, .done = PTHREAD_COND_INITIALIZER};

static atomic_int n_threads; /* 0: not asked yet */
static pthread_once_t pool_once = PTHREAD_ONCE_INIT;
static _Thread_local int inside_task;

static void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
    __asm__ __volatile__("yield");
#endif
}

static int64_t nanoseconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Tasks of part `own`, then those that are left of the others. */
static void run_tasks(void (*task)(void *, int64_t), void *argument, int own, int parts) {
    int outer = inside_task;
    inside_task = 1;
    for (int k = 0; k < parts; k++) {
        int p = (own + k) % parts;
        for (;;) {
            int64_t i = atomic_fetch_add_explicit(&pool.part[p].next, 1, memory_order_relaxed);
            if (i >= pool.part[p].end) break;
            task(argument, i);
        }
    }
    inside_task = outer;
}

static void *work(void *number) {
    const int own = (int)(intptr_t)number;
    unsigned seen = 0; /* generation 0 is before the first job, so a worker started for a job finds it */
    for (;;) {
        int64_t until = nanoseconds() + SPIN_NANOSECONDS;
        while (atomic_load_explicit(&pool.generation, memory_order_relaxed) == seen && nanoseconds() < until)
            for (int i = 0; i < 16; i++) pause_briefly();
        pthread_mutex_lock(&pool.lock);
        while (!pool.stopping && atomic_load(&pool.generation) == seen) pthread_cond_wait(&pool.wake, &pool.lock);
        seen = atomic_load(&pool.generation);
        if (pool.stopping || !pool.open) { /* not open: the others were done before this thread came */
            int stopping = pool.stopping;
            pthread_mutex_unlock(&pool.lock);
            if (stopping) return NULL;
            continue;
        }
        void (*task)(void *, int64_t) = pool.task;
        void *argument = pool.argument;
        int parts = pool.parts;
        atomic_fetch_add(&pool.active, 1);
        pthread_mutex_unlock(&pool.lock);

        run_tasks(task, argument, own, parts);

        pthread_mutex_lock(&pool.lock);
        if (atomic_fetch_sub(&pool.active, 1) == 1 && !pool.open) pthread_cond_signal(&pool.done);
        pthread_mutex_unlock(&pool.lock);
    }
}

static void before_fork(void) {
    pthread_mutex_lock(&pool.caller);
    pthread_mutex_lock(&pool.lock);
}

static void after_fork_parent(void) {
    pthread_mutex_unlock(&pool.lock);
    pthread_mutex_unlock(&pool.caller);
}

/* Threads do not survive a fork: the child starts its own at its first job. */
static void after_fork_child(void) {
    pthread_mutex_init(&pool.caller, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pthread_cond_init(&pool.done, NULL);
    pool.n_workers = 0;
    pool.open = 0;
    atomic_store(&pool.active, 0);
}

static void pool_setup(void) {
    pthread_atfork(before_fork, after_fork_parent, after_fork_child);
    int cores = 0;
#ifdef __linux__
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) cores = CPU_COUNT(&allowed);
#endif
    if (cores < 1) cores = (int)sysconf(_SC_NPROCESSORS_ONLN);
    atomic_store(&n_threads, cores < 1 ? 1 : (cores > MAX_THREADS ? MAX_THREADS : cores));
}

/* Workers leave signals to the caller's threads, whose handlers they are. Fewer workers than wished is no error. */
static void start_workers(int wanted) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (pool.n_workers < wanted && pthread_create(&pool.workers[pool.n_workers], NULL, work, (void *)(intptr_t)(pool.n_workers + 1)) == 0)
        pool.n_workers++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void stop_workers(void) {
    pthread_mutex_lock(&pool.lock);
    pool.stopping = 1;
    atomic_fetch_add(&pool.generation, 1);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    for (int i = 0; i < pool.n_workers; i++) pthread_join(pool.workers[i], NULL);
    pool.n_workers = 0;
    pool.stopping = 0;
}

ladd_status ladd_set_num_threads(int n) {
    if (n < 1 || n > MAX_THREADS) return ladd_fail(LADD_ERR_VALUE, "number of threads between 1 and %d expected, got %d", MAX_THREADS, n);
    pthread_once(&pool_once, pool_setup);
    pthread_mutex_lock(&pool.caller);
    if (n - 1 < pool.n_workers) stop_workers();
    atomic_store(&n_threads, n);
    pthread_mutex_unlock(&pool.caller);
    return LADD_OK;
}

int ladd_get_num_threads(void) {
    pthread_once(&pool_once, pool_setup);
    return atomic_load(&n_threads);
}

void ladd_parallel(int64_t n, void (*task)(void *argument, int64_t i), void *argument) {
    int threads = n > 1 && !inside_task ? ladd_get_num_threads() : 1;
    if (threads == 1 || pthread_mutex_trylock(&pool.caller) != 0) {
        for (int64_t i = 0; i < n; i++) task(argument, i);
        return;
    }
    if (pool.n_workers < threads - 1) start_workers(threads - 1);

    pthread_mutex_lock(&pool.lock);
    pool.task = task;
    pool.argument = argument;
    pool.parts = threads;
    for (int p = 0; p < threads; p++) {
        atomic_store_explicit(&pool.part[p].next, n * p / threads, memory_order_relaxed);
        pool.part[p].end = n * (p + 1) / threads;
    }
    pool.open = 1;
    atomic_fetch_add(&pool.generation, 1);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);

    run_tasks(task, argument, 0, threads);

    pthread_mutex_lock(&pool.lock);
    pool.open = 0;
    pthread_mutex_unlock(&pool.lock);
    if (atomic_load(&pool.active) > 0) {
        int64_t until = nanoseconds() + SPIN_NANOSECONDS;
        while (atomic_load(&pool.active) > 0 && nanoseconds() < until)
            for (int i = 0; i < 16; i++) pause_briefly();
        pthread_mutex_lock(&pool.lock);
        while (atomic_load(&pool.active) > 0) pthread_cond_wait(&pool.done, &pool.lock);
        pthread_mutex_unlock(&pool.lock);
    }
    pthread_mutex_unlock(&pool.caller);
}

/* ---- scratch --------------------------------------------------------------------------------------------------------- */

enum { SLOTS = 4 };
typedef struct scratch_slots {
    void *block[SLOTS];
    size_t bytes[SLOTS];
} scratch_slots;

static _Thread_local scratch_slots *scratch;
static pthread_key_t scratch_key; /* only for its destructor, which frees a thread's scratch when the thread ends */
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;

static void free_scratch(void *p) {
    scratch_slots *slots = p;
    for (int i = 0; i < SLOTS; i++) free(slots->block[i]);
    free(slots);
}

static void scratch_setup(void) { pthread_key_create(&scratch_key, free_scratch); }

void *ladd_scratch(int slot, size_t bytes) {
    if (!scratch) {
        pthread_once(&scratch_once, scratch_setup);
        scratch = calloc(1, sizeof *scratch);
        if (!scratch) return NULL;
        pthread_setspecific(scratch_key, scratch);
    }
    if (scratch->bytes[slot] < bytes || !scratch->block[slot]) {
        size_t rounded = (bytes + 4095) & ~(size_t)4095;
        if (rounded < bytes) return NULL;
        free(scratch->block[slot]);
        scratch->bytes[slot] = 0;
        scratch->block[slot] = aligned_alloc(64, rounded ? rounded : 4096);
        if (!scratch->block[slot]) return NULL;
        scratch->bytes[slot] = rounded;
    }
    return scratch->block[slot];
}
