/* Layers with weights: forward, backward, and what they learn.
 *
 * A head makes one output channel from all channels of its input; a tail adds what one input channel gives to
 * all channels of its output; a depthwise convolution makes channel c from channel c. */
#ifndef LANCE_LAYERS_H
#define LANCE_LAYERS_H

#include "lance_planes.h"

/* Before the first channel of an image: cores and projections are sums over the channels. */
void lance_clear(const lance_layer *layer);
/* Channel c of the input goes into the core, and into U^T x if that is wanted. */
void lance_look(const lance_layer *layer, int c, const lance_plane *x);

/* Forward. `x` has all channels of the input, or for a depthwise convolution channel c alone. */
float lance_shift(const lance_layer *layer, int o);
void lance_make(const lance_layer *layer, int o, const lance_stack *x, const lance_plane *out,
                const lance_reach *reach);
void lance_make_depthwise(const lance_layer *layer, int c, const lance_plane *x, const lance_plane *out,
                          const lance_reach *reach);
void lance_use(const lance_layer *layer, int i, const lance_plane *x, const lance_stack *out,
               const lance_reach *reach);
void lance_finish(const lance_layer *layer, const lance_stack *out);

/* Backward, in the same order: from the gradient g of the output to that of the input. */
void lance_prepare(const lance_layer *layer);
void lance_turn(const lance_layer *layer, const lance_stack *g);
void lance_use_back(const lance_layer *layer, int i, const lance_stack *g, const lance_plane *gradient);
void lance_make_back(const lance_layer *layer, int o, const lance_plane *g, const lance_stack *gradient);
void lance_make_back_depthwise(const lance_layer *layer, int c, const lance_plane *g,
                               const lance_plane *gradient);
void lance_finish_back(const lance_layer *layer, const lance_stack *gradient);

/* The gradient of the weights of output channel o. It is added up; where there is no room for that, the
 * weights change at once, by -rate times the gradient. */
void lance_learn(const lance_layer *layer, int o, const lance_plane *g, float rate);

#endif
