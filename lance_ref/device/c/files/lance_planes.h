/* Planes (one channel each), the taps of a window on them, and the three sums that every layer is made of. */
#ifndef LANCE_PLANES_H
#define LANCE_PLANES_H

#include "lance_table.h"

extern uint8_t lance_arena[];

/* One channel, or a part of it. */
typedef struct {
    float *at;             /* its first number, or NULL: */
    const uint8_t *pixels; /* then number n is scale * byte + shift */
    float scale, shift;
    int row, column; /* numbers or bytes from one row, and from one column, to the next */
    int H, W;
} lance_plane;

/* Several channels, or a part of each. */
typedef struct {
    float *at;
    const uint8_t *pixels;
    int channel, row, column;
    int C, H, W;
} lance_stack;

/* A tile: for each map the rows and columns that it needs; NULL for whole maps. */
typedef struct {
    const lance_range *rows, *columns;
} lance_tile;

/* Where a window begins for the first place that is written, in the part that is read, and the sizes of both.
 */
typedef struct {
    const lance_window *window;
    lance_pair start, size, available;
} lance_reach;

/* Along an axis, what one place of a kernel reads: read, read + stride, ... for the places written, written +
 * 1, ... */
typedef struct {
    int written, read, count, stride;
} lance_line;

typedef struct {
    lance_line rows, columns;
} lance_tap;

static inline float *lance_floats(int at)
{
    return (float *)(void *)(lance_arena + at);
}

static inline int lance_min(int a, int b)
{
    return a < b ? a : b;
}

static inline int lance_max(int a, int b)
{
    return a > b ? a : b;
}

/* C channels of H x W numbers, one after the other. */
static inline lance_stack lance_block(int at, int C, int H, int W)
{
    lance_stack stack = {lance_floats(at), 0, H * W, W, 1, C, H, W};
    return stack;
}

static inline lance_plane lance_channel(const lance_stack *stack, int c)
{
    lance_plane plane = {0, 0, 1, 0, stack->row, stack->column, stack->H, stack->W};
#ifdef LANCE_PIXELS
    if (stack->pixels) {
        plane.pixels = stack->pixels + c * stack->channel;
        plane.scale = lance_pixel_scale[c];
        plane.shift = lance_pixel_shift[c];
        return plane;
    }
#endif
    plane.at = stack->at + c * stack->channel;
    return plane;
}

static inline lance_plane lance_room(int at, int H, int W)
{
    lance_plane plane = {lance_floats(at), 0, 1, 0, W, 1, H, W};
    return plane;
}

static inline float lance_get(const lance_plane *x, int row, int column)
{
    int n = row * x->row + column * x->column;
    return x->at ? x->at[n] : x->scale * (float)x->pixels[n] + x->shift;
}

lance_range lance_rows(int map, lance_tile tile);
lance_range lance_columns(int map, lance_tile tile);
/* The part of a map that a tile has. */
lance_stack lance_part(int map, lance_tile tile);
/* The gradient of a whole map. */
lance_stack lance_gradient(int map);

lance_reach lance_reach_between(const lance_window *window, int output, int source, lance_tile tile);
lance_reach lance_reach_whole(const lance_window *window, lance_pair output, lance_pair input);
/* False if place (p, q) of the kernel sees nothing but padding. */
bool lance_tap_at(const lance_reach *reach, int p, int q, lance_tap *tap);

void lance_fill(const lance_plane *out, float value);
void lance_copy(const lance_plane *out, const lance_plane *x);
/* out += x */
void lance_add(const lance_plane *out, const lance_plane *x);
float lance_sum(const lance_plane *x);

/* With (i, j) for what a tap reads at (y, x):
 *   gather:   out[y, x] += k * in[i, j]
 *   scatter:  in[i, j]  += k * g[y, x]
 *   match:    the sum of g[y, x] * in[i, j] */
void lance_gather(const lance_plane *out, const lance_plane *in, float k, const lance_tap *tap);
void lance_scatter(const lance_plane *in, const lance_plane *g, float k, const lance_tap *tap);
float lance_match(const lance_plane *g, const lance_plane *in, const lance_tap *tap);

#endif
