#include "lance_channels.h"

#include "lance_layers.h"

#include <math.h>

static uint8_t *mask_of(const lance_operation *op, int c)
{
    return op->mask == LANCE_NONE ? 0 : lance_arena + op->mask + c * op->mask_bytes;
}

/* ---- signs, as bits ---- */

static void set_bit(uint8_t *mask, int n, bool bit)
{
    uint8_t one = (uint8_t)(0x80u >> (n % 8));
    mask[n / 8] = (uint8_t)(bit ? mask[n / 8] | one : mask[n / 8] & ~one);
}

static bool bit_at(const uint8_t *mask, int n)
{
    return (mask[n / 8] >> (7 - n % 8)) & 1;
}

/* ---- activations: each remembers where its slope is one ---- */

static void relu(uint8_t *mask, const lance_plane *h, float most)
{
    for (int i = 0; i < h->H; i++)
        for (int j = 0; j < h->W; j++) {
            float *x = &h->at[i * h->row + j];
            if (mask)
                set_bit(mask, i * h->W + j, *x > 0 && *x < most);
            *x = *x > 0 ? (*x < most ? *x : most) : 0;
        }
}

/* y = x relu6(x + 3) / 6; its slope is kept as a number. */
static void hardswish(float *slope, const lance_plane *h)
{
    for (int i = 0; i < h->H; i++)
        for (int j = 0; j < h->W; j++) {
            float *x = &h->at[i * h->row + j];
            float gate = *x <= -3 ? 0 : *x >= 3 ? 1 : (*x + 3) / 6;
            if (slope)
                slope[i * h->W + j] = *x <= -3 ? 0 : *x >= 3 ? 1 : (2 * *x + 3) / 6;
            *x *= gate;
        }
}

#ifdef LANCE_DRAWS_AT
/* A pseudo-random number from a counter: the finalizer of MurmurHash3 (Appleby). */
static uint32_t draw(void)
{
    uint32_t *counter = (uint32_t *)(void *)(lance_arena + LANCE_DRAWS_AT);
    uint32_t x = (*counter)++;
    x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
    x = (x ^ (x >> 13)) * 0xC2B2AE35u;
    return x ^ (x >> 16);
}

static void dropout(const lance_operation *op, uint8_t *mask, const lance_plane *h)
{
    for (int i = 0; i < h->H; i++)
        for (int j = 0; j < h->W; j++) {
            bool is_kept = draw() >= op->threshold;
            h->at[i * h->row + j] *= is_kept ? op->raised : 0;
            if (mask)
                set_bit(mask, i * h->W + j, is_kept);
        }
}
#endif

/* ---- pooling ---- */

static void put_place(uint8_t *places, int n, int place, bool is_wide)
{
    if (is_wide) {
        places[2 * n] = (uint8_t)(place & 255);
        places[2 * n + 1] = (uint8_t)(place >> 8);
    } else {
        places[n] = (uint8_t)place;
    }
}

static int place_at(const uint8_t *places, int n, bool is_wide)
{
    return is_wide ? places[2 * n] + 256 * places[2 * n + 1] : places[n];
}

static bool is_wide(const lance_operation *op)
{
    return op->window.kernel.rows * op->window.kernel.columns > 256;
}

/* The largest number of each window, and its place in the window; padding never wins. */
static void max_pool(const lance_operation *op, uint8_t *places, const lance_plane *h, const lance_plane *out,
                     const lance_reach *reach)
{
    const lance_window *w = &op->window;
    for (int y = 0; y < out->H; y++)
        for (int x = 0; x < out->W; x++) {
            float most = -HUGE_VALF;
            int best = 0;
            for (int p = 0; p < w->kernel.rows; p++)
                for (int q = 0; q < w->kernel.columns; q++) {
                    int i = reach->start.rows + y * w->stride.rows + p;
                    int j = reach->start.columns + x * w->stride.columns + q;
                    if (i < 0 || i >= h->H || j < 0 || j >= h->W || !(lance_get(h, i, j) > most))
                        continue;
                    most = lance_get(h, i, j);
                    best = p * w->kernel.columns + q;
                }
            out->at[y * out->row + x] = most;
            if (places)
                put_place(places, y * out->W + x, best, is_wide(op));
        }
}

/* How many numbers along one axis the mean at a place of the output is over; n is the whole map's size. */
static int averaged(int place, int stride, int before, int kernel, int n, bool counts_padding)
{
    int first = place * stride - before, padding = counts_padding ? before : 0;
    return lance_min(first + kernel, n + padding) - lance_max(first, -padding);
}

static float divisor(const lance_operation *op, int y, int x)
{
    const lance_window *w = &op->window;
    const lance_map *m = &lance_maps[op->input];
    return (float)(averaged(y, w->stride.rows, w->before.rows, w->kernel.rows, m->H, op->counts_padding) *
                   averaged(x, w->stride.columns, w->before.columns, w->kernel.columns, m->W,
                            op->counts_padding));
}

static void avg_pool(const lance_operation *op, const lance_plane *h, const lance_plane *out,
                     const lance_reach *reach, lance_tile tile)
{
    int top = lance_rows(op->output, tile).first, left = lance_columns(op->output, tile).first;
    lance_tap tap;
    lance_fill(out, 0);
    for (int p = 0; p < op->window.kernel.rows; p++)
        for (int q = 0; q < op->window.kernel.columns; q++)
            if (lance_tap_at(reach, p, q, &tap))
                lance_gather(out, h, 1, &tap);
    for (int y = 0; y < out->H; y++)
        for (int x = 0; x < out->W; x++)
            out->at[y * out->row + x] /= divisor(op, top + y, left + x);
}

/* Adaptive pooling: place i of m is the mean of places floor(i n / m) up to ceil((i + 1) n / m) of n. */
static lance_range adaptive(int i, int n, int m)
{
    lance_range range = {i * n / m, ((i + 1) * n + m - 1) / m};
    return range;
}

static void adaptive_pool(const lance_plane *h, const lance_plane *out)
{
    for (int y = 0; y < out->H; y++)
        for (int x = 0; x < out->W; x++) {
            lance_range rows = adaptive(y, h->H, out->H), columns = adaptive(x, h->W, out->W);
            float sum = 0;
            for (int i = rows.first; i < rows.end; i++)
                for (int j = columns.first; j < columns.end; j++)
                    sum += lance_get(h, i, j);
            out->at[y * out->row + x] =
                sum / (float)((rows.end - rows.first) * (columns.end - columns.first));
        }
}

static void adaptive_pool_back(const lance_plane *g, const lance_plane *gradient)
{
    lance_fill(gradient, 0);
    for (int y = 0; y < g->H; y++)
        for (int x = 0; x < g->W; x++) {
            lance_range rows = adaptive(y, gradient->H, g->H), columns = adaptive(x, gradient->W, g->W);
            float share =
                g->at[y * g->row + x] / (float)((rows.end - rows.first) * (columns.end - columns.first));
            for (int i = rows.first; i < rows.end; i++)
                for (int j = columns.first; j < columns.end; j++)
                    gradient->at[i * gradient->row + j] += share;
        }
}

static void max_pool_back(const lance_operation *op, const uint8_t *places, const lance_plane *g,
                          const lance_plane *gradient)
{
    const lance_window *w = &op->window;
    lance_fill(gradient, 0);
    for (int y = 0; y < g->H; y++)
        for (int x = 0; x < g->W; x++) {
            int place = place_at(places, y * g->W + x, is_wide(op));
            int i = y * w->stride.rows - w->before.rows + place / w->kernel.columns;
            int j = x * w->stride.columns - w->before.columns + place % w->kernel.columns;
            if (i >= 0 && i < gradient->H && j >= 0 && j < gradient->W)
                gradient->at[i * gradient->row + j] += g->at[y * g->row + x];
        }
}

static void avg_pool_back(const lance_operation *op, const lance_plane *g, const lance_plane *gradient)
{
    const lance_window *w = &op->window;
    lance_fill(gradient, 0);
    for (int y = 0; y < g->H; y++)
        for (int x = 0; x < g->W; x++) {
            float share = g->at[y * g->row + x] / divisor(op, y, x);
            int top = y * w->stride.rows - w->before.rows, left = x * w->stride.columns - w->before.columns;
            for (int i = lance_max(top, 0); i < lance_min(top + w->kernel.rows, gradient->H); i++)
                for (int j = lance_max(left, 0); j < lance_min(left + w->kernel.columns, gradient->W); j++)
                    gradient->at[i * gradient->row + j] += share;
        }
}

/* ---- one operation, forward and backward ---- */

lance_plane lance_act(const lance_operation *op, int c, lance_plane h, lance_tile tile, bool is_training)
{
    uint8_t *mask = mask_of(op, c);
    if (op->kind == LANCE_RELU)
        relu(mask, &h, HUGE_VALF);
    else if (op->kind == LANCE_RELU6)
        relu(mask, &h, 6);
    else if (op->kind == LANCE_HARDSWISH)
        hardswish(mask ? (float *)(void *)mask : 0, &h);
#ifdef LANCE_DRAWS_AT
    else if (op->kind == LANCE_DROPOUT && is_training)
        dropout(op, mask, &h);
#else
    (void)is_training;
#endif
    if (op->kind <= LANCE_DROPOUT)
        return h;
    const lance_range rows = lance_rows(op->output, tile), columns = lance_columns(op->output, tile);
    const lance_reach reach = lance_reach_between(&op->window, op->output, op->input, tile);
    lance_plane out = lance_room(op->room, rows.end - rows.first, columns.end - columns.first);
    if (op->kind == LANCE_DEPTHWISE) {
        lance_look(&lance_layers[op->layer], c, &h);
        lance_make_depthwise(&lance_layers[op->layer], c, &h, &out, &reach);
    } else if (op->kind == LANCE_MAX_POOL) {
        max_pool(op, mask, &h, &out, &reach);
    } else if (op->kind == LANCE_AVG_POOL) {
        avg_pool(op, &h, &out, &reach, tile);
    } else {
        adaptive_pool(&h, &out);
    }
    return out;
}

static void apply_bits(const uint8_t *mask, const lance_plane *g, float scale)
{
    for (int n = 0; n < g->H * g->W; n++)
        g->at[n] *= bit_at(mask, n) ? scale : 0;
}

static void apply_slopes(const float *slopes, const lance_plane *g)
{
    for (int n = 0; n < g->H * g->W; n++)
        g->at[n] *= slopes[n];
}

lance_plane lance_act_back(const lance_operation *op, int c, lance_plane g, float rate)
{
    uint8_t *mask = mask_of(op, c);
    if (op->kind <= LANCE_DROPOUT) {
        if (mask && op->kind == LANCE_HARDSWISH)
            apply_slopes((const float *)(const void *)mask, &g);
        else if (mask)
            apply_bits(mask, &g, op->kind == LANCE_DROPOUT ? op->raised : 1);
        return g;
    }
    const lance_map *m = &lance_maps[op->input];
    lance_plane gradient = op->reaches ? lance_room(op->step, m->H, m->W) : g;
    if (op->kind == LANCE_DEPTHWISE) {
        const lance_layer *layer = &lance_layers[op->layer];
        if (op->reaches)
            lance_make_back_depthwise(layer, c, &g, &gradient);
        lance_learn(layer, c, &g, rate);
    } else if (op->reaches && op->kind == LANCE_MAX_POOL) {
        max_pool_back(op, mask, &g, &gradient);
    } else if (op->reaches && op->kind == LANCE_AVG_POOL) {
        avg_pool_back(op, &g, &gradient);
    } else if (op->reaches) {
        adaptive_pool_back(&g, &gradient);
    }
    return gradient;
}
