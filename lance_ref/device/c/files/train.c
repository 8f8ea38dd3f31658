#include "train.h"

bool read_image(FILE *file, int *label)
{
    uint8_t bytes[2];
    if (fread(bytes, 1, 2, file) != 2)
        return false;
    *label = bytes[0] + 256 * bytes[1];
    return fread(lance_image(), sizeof(lance_number), LANCE_IMAGE_NUMBERS, file) == LANCE_IMAGE_NUMBERS;
}

int train_batch(FILE *file, int images, float rate, float *loss)
{
    int count = 0, label, failed = LANCE_OK;
    float sum = 0, one;
    while (count < images && read_image(file, &label)) {
#ifdef LANCE_AT_ONCE
        failed |= lance_step(lance_image(), label, rate, &one);
#else
        failed |= lance_step(lance_image(), label, &one);
#ifdef LANCE_EACH_IMAGE
        failed |= lance_update(rate);
#endif
#endif
        if (failed)
            return -1;
        sum += one;
        count++;
    }
#ifndef LANCE_EACH_IMAGE
    if (count && lance_update(rate / (float)count))
        return -1;
#endif
    *loss = count ? sum / (float)count : 0;
    return count;
}

float accuracy(FILE *file)
{
    static float logits[LANCE_CLASSES];
    int right = 0, images = 0, label;
    rewind(file);
    while (read_image(file, &label)) {
        int best = 0;
        lance_predict(lance_image(), logits);
        for (int k = 1; k < LANCE_CLASSES; k++)
            best = logits[k] > logits[best] ? k : best;
        right += best == label;
        images++;
    }
    return images ? (float)right / (float)images : 0;
}

int train(FILE *file, int passes, int batch, float rate)
{
    for (int pass = 1; pass <= passes; pass++) {
        float sum = 0, loss;
        int images = 0, count;
        rewind(file);
        while ((count = train_batch(file, batch, rate, &loss)) > 0) {
            sum += loss * (float)count;
            images += count;
        }
        if (count < 0 || images == 0) {
            printf("pass %d: a loss or a gradient is not finite, or a label is none\n", pass);
            return 1;
        }
        printf("pass %d: loss %.4f\n", pass, (double)(sum / (float)images));
    }
    return 0;
}
