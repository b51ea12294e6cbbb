/* Status sentences, arena, parameter tables, threads and fork. */
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../../csrc/cpu/cpu.h"
#include "check.h"

static void test_errors(void) {
    char sentence[2048];
    memset(sentence, 'x', sizeof sentence - 1);
    sentence[sizeof sentence - 1] = 0;
    CHECK(ladd_fail(LADD_ERR_TYPE, "%s", sentence) == LADD_ERR_TYPE);
    CHECK(strlen(ladd_last_error()) > 100 && strlen(ladd_last_error()) < sizeof sentence);
    CHECK(ladd_fail(LADD_ERR_VALUE, "%d expected, got %d", 2, 3) == LADD_ERR_VALUE && strcmp(ladd_last_error(), "2 expected, got 3") == 0);
}

static void test_arena(void) {
    ladd_context ctx = ladd_cpu_context(LADD_F32);
    CHECK(ctx.backend != NULL);
    size_t sizes[] = {1, 64, 65, 0, 4096, 7};
    for (int round = 0; round < 40; round++) { /* more blocks than are kept, of growing and shrinking sizes */
        ladd_arena arena[20];
        memset(arena, 0, sizeof arena);
        for (int a = 0; a < 20; a++) {
            for (int i = 0; i < 6; i++) CHECK(ladd_arena_take(&arena[a], sizes[i] * (size_t)(1 + (a * 7 + round) % 13)) == NULL);
            size_t planned = arena[a].used;
            CHECK_OK(ladd_arena_reserve(&ctx, &arena[a]));
            CHECK(arena[a].used == 0 && arena[a].capacity >= planned);
            for (int i = 0; i < 6; i++) {
                size_t bytes = sizes[i] * (size_t)(1 + (a * 7 + round) % 13);
                char *p = ladd_arena_take(&arena[a], bytes);
                CHECK(p != NULL && (uintptr_t)p % 64 == 0);
                memset(p, a, bytes);
            }
            CHECK(arena[a].used == planned);
        }
        CHECK(ladd_memory_in_use() > 0);
        for (int a = 0; a < 20; a++) ladd_arena_release(&ctx, &arena[a]);
        CHECK(ladd_memory_in_use() == 0);
    }
    ladd_arena empty = {0};
    ladd_arena_release(&ctx, &empty);
    ladd_empty_cache();
    ladd_arena huge = {0};
    ladd_arena_take(&huge, (size_t)1 << 62);
    CHECK(ladd_arena_reserve(&ctx, &huge) == LADD_ERR_MEMORY && ladd_memory_in_use() == 0);
}

static void test_params(void) {
    ladd_params p = {0};
    char name[2 * LADD_NAME_MAX];
    for (int i = 0; i < 200; i++) {
        snprintf(name, sizeof name, "layer.%d.weight", i);
        CHECK(ladd_params_add(&p, i < 150, name, 2, (int64_t[]){3, 1 + i % 4}) == p.size - 3 * (1 + i % 4));
    }
    memset(name, 'n', sizeof name - 1);
    name[sizeof name - 1] = 0;
    int n = p.n;
    int64_t size = p.size;
    CHECK(ladd_params_add(&p, 1, name, 1, (int64_t[]){3}) == -1);
    CHECK(ladd_params_add(&p, 1, "zero", 2, (int64_t[]){3, 0}) == -1);
    CHECK(ladd_params_add(&p, 1, "negative", 1, (int64_t[]){-3}) == -1);
    CHECK(ladd_params_add(&p, 1, "huge", 4, (int64_t[]){1 << 30, 1 << 30, 1 << 30, 2}) == -1);
    CHECK(p.n == n && p.size == size);
    CHECK_OK(ladd_params_allocate(&p));
    CHECK_OK(ladd_params_need_grad(&p));
    float *grad = p.grad;
    CHECK_OK(ladd_params_need_grad(&p));
    CHECK(grad == p.grad && p.trainable < p.size);
    for (int64_t i = 0; i < p.size; i++) CHECK(p.data[i] == 0.0f);
    for (int64_t i = 0; i < p.trainable; i++) CHECK(p.grad[i] == 0.0f);
    CHECK(ladd_params_find(&p, "layer.17.weight")->offset == p.table[17].offset && ladd_params_find(&p, "layer.17") == NULL);
    ladd_params_free(&p);
    ladd_params_free(&p);
}

enum { TASKS = 1000 };
static void count_task(void *argument, int64_t i) {
    int *counts = argument;
    counts[i]++;
}

static void run_tasks(void) {
    int counts[TASKS] = {0};
    ladd_parallel(TASKS, count_task, counts);
    for (int i = 0; i < TASKS; i++) CHECK(counts[i] == 1);
}

static void test_threads(void) {
    CHECK(ladd_set_num_threads(0) == LADD_ERR_VALUE && ladd_set_num_threads(-1) == LADD_ERR_VALUE && ladd_set_num_threads(1 << 20) == LADD_ERR_VALUE);
    for (int n = 1; n <= 5; n++) {
        CHECK_OK(ladd_set_num_threads(n));
        CHECK(ladd_get_num_threads() == n);
        for (int i = 0; i < 50; i++) run_tasks();
    }
    CHECK_OK(ladd_set_num_threads(2));
    ladd_parallel(0, count_task, NULL);
    for (int i = 0; i < 3; i++) { /* a child has no threads but the one that forked; it must not wait for the others */
        run_tasks();
        pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            run_tasks();
            _exit(0);
        }
        int status = 0;
        CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
        run_tasks();
    }
    for (int slot = 0; slot < 4; slot++)
        for (size_t bytes = 1; bytes < 100000; bytes *= 7) {
            char *p = ladd_scratch(slot, bytes);
            CHECK(p != NULL && (uintptr_t)p % 64 == 0);
            memset(p, slot, bytes);
        }
}

void test_core(void) {
    test_errors();
    test_arena();
    test_params();
    test_threads();
}
