/* What works on each channel alone: activations, dropout, pooling, depthwise convolutions. */
#ifndef LANCE_CHANNELS_H
#define LANCE_CHANNELS_H

#include "lance_planes.h"

/* Channel c: changes h, or makes a channel of the output from it; returns which. */
lance_plane lance_act(const lance_operation *op, int c, lance_plane h, lance_tile tile, bool is_training);
/* From the gradient g of channel c of the output to that of the input; learns what there is to learn. */
lance_plane lance_act_back(const lance_operation *op, int c, lance_plane g, float rate);

#endif
