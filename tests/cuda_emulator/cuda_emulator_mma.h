/* cuda/mma.cuh on the emulator: the same functions, the same layout of fragments; see there. Included by it. */
#ifndef LADD_EMULATED_MMA_H
#define LADD_EMULATED_MMA_H

/* d += a b: sums over k ascending, in float, one rounding a product-and-sum. The device's order within 16 products is its own. */
template <typename T>
inline void ladd_mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    const uint64_t (*all)[4] = ladd_emulator::exchange(0xffffffffu, mine, sizeof mine, __LINE__);
    const int g = ladd_emulator::thread->lane / 4, t = ladd_emulator::thread->lane % 4;
    /* Element `half` of register r of a lane. */
    auto element = [&](int lane, int r, int half) {
        T value;
        memcpy(&value, (const char *)all[lane] + 4 * r + 2 * half, 2);
        return ladd_to_float(value);
    };
    for (int k = 0; k < 16; k++) {
        const int upper = k / 8, lane_k = k % 8 / 2, half = k % 2;
        for (int i = 0; i < 4; i++) {
            const int down = i / 2, column = 2 * t + i % 2;
            d[i] = fmaf(element(4 * g + lane_k, 2 * upper + down, half), element(4 * column + lane_k, 4 + upper, half), d[i]);
        }
    }
    ladd_emulator::taken();
}

template <int N>
inline void ladd_emulator_ldmatrix(uint32_t (&r)[N], const void *row, bool transposed) {
    const int lane = ladd_emulator::thread->lane, g = lane / 4, t = lane % 4;
    if (lane < 8 * N && ((uintptr_t)row % 16 || !ladd_emulator::in_shared(row, 16)))
        ladd_emulator::fail("ldmatrix from %p: an address in shared memory expected, on 16 bytes", row);
    const uint64_t (*all)[4] = ladd_emulator::exchange(0xffffffffu, &row, sizeof row, __LINE__);
    for (int i = 0; i < N; i++) {
        uint16_t low, high;
        auto element = [&](int y, int x) { return ((const uint16_t *)all[8 * i + y][0])[x]; };
        low = transposed ? element(2 * t, g) : element(g, 2 * t);
        high = transposed ? element(2 * t + 1, g) : element(g, 2 * t + 1);
        r[i] = low | (uint32_t)high << 16;
    }
    ladd_emulator::taken();
    /* All lanes read at one time: nobody may write before the last has read. */
    ladd_emulator::exchange(0xffffffffu, &row, sizeof row, __LINE__);
    ladd_emulator::taken();
}
inline void ladd_ldmatrix(uint32_t (&r)[4], const void *row) { ladd_emulator_ldmatrix(r, row, false); }
inline void ladd_ldmatrix(uint32_t (&r)[2], const void *row) { ladd_emulator_ldmatrix(r, row, false); }
inline void ladd_ldmatrix_trans(uint32_t (&r)[4], const void *row) { ladd_emulator_ldmatrix(r, row, true); }
inline void ladd_ldmatrix_trans(uint32_t (&r)[2], const void *row) { ladd_emulator_ldmatrix(r, row, true); }

inline void ladd_cp_async(void *shared, const void *global, bool valid) { ladd_emulator::copy_async(shared, global, valid); }
inline void ladd_cp_async_commit() { ladd_emulator::copy_commit(); }
template <int N>
inline void ladd_cp_async_wait() {
    ladd_emulator::copy_wait(N);
}

#endif
