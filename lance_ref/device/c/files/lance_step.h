/* One training step with LANCE on a small device: everything that changes lies in one arena of
 * LANCE_ARENA_BYTES.
 *
 * A step takes one image. Its frozen layers are only run; of each layer that trains it keeps a core of its
 * input, makes the weight's gradient from the core, and changes the weight in the subspace: W = W_0 + D x U.
 */
#ifndef LANCE_STEP_H
#define LANCE_STEP_H

#include "lance_net.h"

#include <stddef.h>
#include <stdint.h>

#ifdef LANCE_PIXELS
typedef uint8_t lance_number; /* an image is bytes (H, W, C) */
#else
typedef float lance_number; /* an image is preprocessed numbers (C, H, W) */
#endif

enum {
    LANCE_OK = 0,
    LANCE_BAD_LABEL = 1,  /* a label below 0, or not below LANCE_CLASSES; nothing ran */
    LANCE_NOT_FINITE = 2, /* the loss or a gradient is NaN or infinite; what was learned did not change */
};

/* Back to the state of the export. Call it once before anything else. */
void lance_reset(void);

/* Where LANCE_IMAGE_NUMBERS numbers of an image lie in the arena. An image that a camera or a file puts here
 * needs no room beside the arena; it is gone after a step or a prediction. */
lance_number *lance_image(void);

/* The LANCE_CLASSES logits of an image. */
void lance_predict(const lance_number *image, float *logits);

#ifdef LANCE_AT_ONCE
/* Train on one image: there is no room for gradients, so the weights change during the backward pass. */
int lance_step(const lance_number *image, int label, float rate, float *loss);
#else
/* Forward and backward pass of one image; its gradients are added to those of the images before it. */
int lance_step(const lance_number *image, int label, float *loss);

/* W -= rate * the sum of the gradients since the last update. For the mean over B images, give the rate
 * divided by B. With momentum m, a sum starts from m times the last one. */
int lance_update(float rate);
#endif

/* What was learned, as one block that an application can store and write back. */
void lance_state(void **start, size_t *bytes);

#endif
