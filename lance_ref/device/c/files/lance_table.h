/* What the tables in lance_net.c say of a network. Addresses are bytes from the start of the arena. */
#ifndef LANCE_TABLE_H
#define LANCE_TABLE_H

#include "lance_net.h"

#include <stdbool.h>
#include <stdint.h>

#define LANCE_NONE (-1) /* no array, no map, no layer */

#ifdef LANCE_INT8
typedef int8_t lance_weight;
#else
typedef float lance_weight;
#endif

typedef struct {
    int rows, columns;
} lance_pair;

/* How an operation slides over a map; `before` is the padding at the top and the left. */
typedef struct {
    lance_pair kernel, stride, dilation, before;
} lance_window;

typedef struct {
    int first, end;
} lance_range;

typedef enum {
    LANCE_WHOLE,      /* (C, H, W) */
    LANCE_ROWS_FIRST, /* (H, C, W) */
    LANCE_TILE,       /* (C, h, w) of the tile that runs */
    LANCE_BYTES,      /* the image: (H, W, C) bytes */
} lance_form;

typedef struct {
    int C, H, W;
    lance_form form;
    int at;       /* LANCE_NONE if only one channel of it exists at a time */
    int gradient; /* (C, H, W), or LANCE_NONE if nobody wants it */
} lance_map;

typedef enum {
    LANCE_KEEP_NOTHING,
    LANCE_KEEP_INPUT,  /* a copy (C, H, W) at `at` */
    LANCE_KEEP_SOURCE, /* the map number `at`, which stays alive */
    LANCE_KEEP_CORE,   /* S = A x2 U^T x3 U_h^T x4 U_w^T at `at` */
} lance_keeping;

/* What a layer keeps of its input A for the weight's gradient. A factor may be NULL: that mode is left alone.
 */
typedef struct {
    lance_keeping how;
    int at;
    int directions;  /* columns of U; without U the channels */
    int h, w;        /* height and width of the core */
    const float *U;  /* (C_in, directions), of a linear layer (C_in * H * W, directions) */
    const float *Uh; /* (H, h) */
    const float *Uw; /* (W, w) */
    int half;        /* room for a channel that is projected on one of Uh and Uw */
    int expanded;    /* room for cores that are put back to (H, W) */
    bool at_once;    /* whether all directions are expanded there, or one channel after the other */
} lance_kept;

/* A convolution, or a linear layer as a convolution whose kernel covers its input. */
typedef struct {
    int C_in, C_out, groups;
    bool is_linear;
    lance_window window;
    lance_pair input, output;  /* height and width of whole maps */
    const lance_weight *W0;    /* (C_out, C_in / groups, k_h, k_w); NULL if the weight itself trains */
    const float *unit;         /* of weights in int8: what 1 stands for, one number for each output channel */
    const float *shift;        /* added to each output channel; NULL for zero */
    const float *weight_scale; /* batch norm's factor of what trains; NULL for one */
    const float *bias_scale;
    int W, D, bias;              /* what trains */
    int gradient, bias_gradient; /* of W or D, and of the bias; LANCE_NONE: they change at once */
    const float *W_start, *D_start, *bias_start; /* what lance_reset writes; NULL for zero */
    bool is_merged;          /* the forward pass uses W_0 + D x U, rather than W_0 x + D (U^T x) */
    int projected, returned; /* U^T x and D^T g, where they are no core */
    lance_kept kept;
} lance_layer;

typedef enum {
    LANCE_RELU,
    LANCE_RELU6,
    LANCE_HARDSWISH,
    LANCE_DROPOUT,
    LANCE_DEPTHWISE,
    LANCE_MAX_POOL,
    LANCE_AVG_POOL,
    LANCE_ADAPTIVE_POOL,
} lance_kind;

/* Something that works on each channel alone. */
typedef struct {
    lance_kind kind;
    int input, output; /* maps */
    int layer;         /* of a depthwise convolution */
    int room;          /* where a channel of the output lies; activations change their input instead */
    int mask;          /* what the backward pass needs: bits, places of maxima, or slopes */
    int mask_bytes;    /* of one channel */
    bool reaches;      /* whether the gradient of the input is wanted */
    int step;          /* where the gradient of a channel of the input goes */
    lance_window window;
    bool counts_padding; /* of average pooling */
    uint32_t threshold;  /* dropout keeps numbers from here on */
    float raised;        /* and multiplies them with this */
} lance_operation;

/* A stretch of the network whose inner maps exist one channel at a time: the head makes a channel from all
 * channels of the source, the body works on that channel, the tail adds what it gives to all channels of the
 * output. */
typedef struct {
    int source, output; /* maps */
    int residual;       /* the map that is added to the output */
    bool is_in_place;   /* the output lies where the residual lies */
    int head, tail;     /* layers */
    int made;           /* the map whose channels the head makes */
    int inner;          /* the map whose channels the tail reads */
    int end;            /* the map that the last of head, body and tail gives */
    int body, body_end; /* operations */
    int post, post_end; /* operations on the whole output */
    int copy;           /* where a channel of the source is copied to before it is changed */
    int room;           /* where the head's channel lies */
    bool learns;        /* whether there is a backward pass */
    bool reaches;       /* whether that needs the gradients of the channels before the tail */
    bool clears_source; /* the first gradient of the source comes from here, */
    bool sets_residual; /* and that of the residual */
    int step;           /* where the gradient of the channel before the tail goes */
} lance_segment;

#ifdef LANCE_POISON
typedef struct {
    int time, at, bytes;
} lance_grave;
extern const lance_grave lance_graves[];
extern const int lance_grave_count;
#endif

extern const lance_map lance_maps[];
extern const lance_layer lance_layers[];
extern const lance_operation lance_operations[];
extern const lance_segment lance_segments[];
extern const lance_range lance_tile_rows[][LANCE_TILED_MAPS];
extern const lance_range lance_tile_columns[][LANCE_TILED_MAPS];
#ifdef LANCE_PIXELS
extern const float lance_pixel_scale[], lance_pixel_shift[];
#endif

#endif
