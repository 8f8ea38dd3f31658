/* Training on a file of images; the same on a computer and on a microcontroller.
 *
 * The file has for each image two bytes of label (the low byte first) and LANCE_IMAGE_NUMBERS numbers. */
#ifndef TRAIN_H
#define TRAIN_H

#include "lance_step.h"

#include <stdbool.h>
#include <stdio.h>

/* The next image goes into the arena; false at the end of the file. */
bool read_image(FILE *file, int *label);

/* Train on the images that follow, at most `images` of them, with one update; their mean loss in *loss.
 * Returns how many there were, or -1 if a number was not finite or a label is none. */
int train_batch(FILE *file, int images, float rate, float *loss);

/* The share of images whose class is predicted rightly. */
float accuracy(FILE *file);

/* Print the loss of each pass over the file; 0 if all went well. */
int train(FILE *file, int passes, int batch, float rate);

#endif
