/* The numbers of AdamW that change from step to step, so that host, CPU and device have them from one place. */
#ifndef LADD_ADAMW_H
#define LADD_ADAMW_H
#include <math.h>

/* control[3] = 1 - lr weight_decay, lr / (1 - beta1^step), 1 / sqrt(1 - beta2^step), folded in double. */
static inline void ladd_adamw_control(float *control, double lr, double weight_decay, double beta1, double beta2, double step) {
    control[0] = (float)(1.0 - lr * weight_decay);
    control[1] = (float)(lr / (1.0 - pow(beta1, step)));
    control[2] = (float)(1.0 / sqrt(1.0 - pow(beta2, step)));
}

#endif
