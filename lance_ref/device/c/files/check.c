/* check FILE EXPECTED: compares logits, losses and what was learned with the numbers of the NumPy program. */
#include "train.h"

#include <math.h>
#include <stdlib.h>

static int failures = 0;

static float expected(FILE *file)
{
    float number = NAN;
    if (fscanf(file, "%f", &number) != 1) {
        fprintf(stderr, "the expected numbers end too early\n");
        exit(2);
    }
    return number;
}

/* The largest difference of some numbers, relative to the largest number that was expected. */
static void compare(const char *what, const float *got, int count, FILE *file, float tolerance)
{
    float most = 0, off = 0;
    for (int n = 0; n < count; n++) {
        float want = expected(file);
        float difference = fabsf(got[n] - want);
        most = fmaxf(most, fabsf(want));
        off = difference <= off ? off : difference; /* NaN goes through */
    }
    float relative = off / fmaxf(most, 1e-9f);
    bool is_good = relative <= tolerance;
    printf("%-34s off by %.1e, allowed %.0e  %s\n", what, (double)relative, (double)tolerance,
           is_good ? "ok" : "WRONG");
    failures += !is_good;
}

static void compare_state(FILE *file, float tolerance)
{
    int arrays, at, count;
    char name[128];
    void *start;
    size_t bytes;
    lance_state(&start, &bytes);
    if (fscanf(file, " arrays %d", &arrays) != 1)
        exit(2);
    for (int i = 0; i < arrays; i++) {
        if (fscanf(file, " at %d numbers %d of %127[^\n]", &at, &count, name) != 3)
            exit(2);
        compare(name, (const float *)(const void *)((const uint8_t *)start + at), count, file, tolerance);
    }
}

int main(int argc, char **argv)
{
    static float logits[LANCE_CLASSES];
    int steps, batch, label;
    float rate, tolerance, later, last;
    FILE *images = argc > 1 ? fopen(argv[1], "rb") : 0;
    FILE *numbers = argc > 2 ? fopen(argv[2], "r") : 0;
    if (!images || !numbers) {
        fprintf(stderr, "usage: check FILE EXPECTED\n");
        return 2;
    }
    if (fscanf(numbers, " steps %d batch %d rate %f tolerance %f later %f last %f", &steps, &batch, &rate,
               &tolerance, &later, &last) != 6)
        return 2;
    lance_reset();
    if (!read_image(images, &label))
        return 2;
    lance_predict(lance_image(), logits);
    compare("logits", logits, LANCE_CLASSES, numbers, tolerance);
    rewind(images);
    for (int step = 0; step < steps; step++) {
        float loss, allowed = step == 0 ? tolerance : later;
        if (train_batch(images, batch, rate, &loss) < batch) {
            rewind(images);
            if (train_batch(images, batch, rate, &loss) < batch) {
                printf("step %d failed\n", step + 1);
                return 1;
            }
        }
        compare("loss", &loss, 1, numbers, allowed);
        if (step == 0 || step == steps - 1)
            compare_state(numbers, step == 0 ? tolerance : last);
    }
    if (failures)
        printf("%d comparisons failed\n", failures);
    else
        printf("all numbers are those of the NumPy program\n");
    return failures != 0;
}
