/* train FILE [PASSES [BATCH [RATE [STATE]]]]: trains on a file of images and prints loss and accuracy. With
 * STATE, what was learned is written to a file. */
#include "train.h"

#include <stdlib.h>

static int store(const char *name)
{
    void *state;
    size_t bytes;
    FILE *file = fopen(name, "wb");
    lance_state(&state, &bytes);
    if (!file || fwrite(state, 1, bytes, file) != bytes || fclose(file)) {
        fprintf(stderr, "%s cannot be written\n", name);
        return 1;
    }
    return 0;
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        fprintf(stderr, "usage: %s FILE [PASSES [BATCH [RATE [STATE]]]]\n", argv[0]);
        return 2;
    }
    FILE *file = fopen(argv[1], "rb");
    if (!file) {
        fprintf(stderr, "%s cannot be read\n", argv[1]);
        return 2;
    }
    lance_reset();
    int passes = argc > 2 ? atoi(argv[2]) : LANCE_PASSES, batch = argc > 3 ? atoi(argv[3]) : LANCE_BATCH;
    float rate = argc > 4 ? strtof(argv[4], 0) : LANCE_RATE;
    printf("accuracy before: %.3f\n", (double)accuracy(file));
    int failed = train(file, passes, batch, rate);
    printf("accuracy after: %.3f\n", (double)accuracy(file));
    fclose(file);
    return failed ? failed : argc > 5 ? store(argv[5]) : 0;
}
