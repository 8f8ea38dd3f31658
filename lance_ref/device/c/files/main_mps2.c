/* The same training on QEMU's mps2-an500. Files and output go to the computer by semihosting. After the
 * training one image is run again: how deep the stack went is read from paint, and instructions are counted
 * by a timer, which stands for instructions when QEMU runs with -icount shift=0: one takes a nanosecond. */
#include "train.h"

#define PAINTED 4096 /* bytes of the stack */
#define PAINT 0xA5u
#define TIMER ((volatile uint32_t *)0x40000000u) /* CMSDK timer 0: control, value, reload; 25 MHz */
#define NANOSECONDS 40.0

static float logits[LANCE_CLASSES];

static void predict(void)
{
    lance_predict(lance_image(), logits);
}

static void step(void)
{
    float loss;
#ifdef LANCE_AT_ONCE
    lance_step(lance_image(), 0, 0, &loss);
#else
    lance_step(lance_image(), 0, &loss);
#endif
}

static void update(void)
{
#ifndef LANCE_AT_ONCE
    lance_update(0);
#endif
}

/* Runs something on a painted stack, and prints instructions and the bytes of stack that it used. */
static void measure(const char *what, void (*run)(void))
{
    uint8_t *top;
    __asm__ volatile("mov %0, sp" : "=r"(top));
    volatile uint8_t *bottom = top - PAINTED;
    for (int n = 0; n < PAINTED; n++)
        bottom[n] = PAINT;
    TIMER[0] = 0;
    TIMER[1] = TIMER[2] = UINT32_MAX;
    TIMER[0] = 1;
    run();
    uint32_t ticks = UINT32_MAX - TIMER[1];
    int untouched = 0;
    while (untouched < PAINTED && bottom[untouched] == PAINT)
        untouched++;
    printf("%-8s %12.0f instructions, %5d bytes of stack\n", what, (double)ticks * NANOSECONDS,
           PAINTED - untouched);
}

int main(void)
{
    int label;
    FILE *file = fopen("images.bin", "rb");
    if (!file) {
        printf("images.bin cannot be read\n");
        return 2;
    }
    lance_reset();
    int failed = train(file, LANCE_PASSES, LANCE_BATCH, LANCE_RATE);
    rewind(file);
    if (read_image(file, &label))
        measure("predict", predict);
    rewind(file);
    if (read_image(file, &label))
        measure("step", step);
    measure("update", update);
    return failed;
}
