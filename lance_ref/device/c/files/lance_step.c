#include "lance_step.h"

#include "lance_channels.h"
#include "lance_layers.h"

#include <math.h>

/* Everything that changes. */
LANCE_RAM uint8_t lance_arena[LANCE_ARENA_BYTES] __attribute__((aligned(8)));

static const lance_tile whole = {0, 0};

static const lance_layer *layer_of(int number)
{
    return number == LANCE_NONE ? 0 : &lance_layers[number];
}

/* Tests overwrite what is dead with NaN, so that reading it would be a wrong number. */
static void bury(int time)
{
#ifdef LANCE_POISON
    for (int i = 0; i < lance_grave_count; i++)
        for (int n = 0; lance_graves[i].time == time && n < lance_graves[i].bytes; n++)
            lance_arena[lance_graves[i].at + n] = 0xFF;
#else
    (void)time;
#endif
}

/* ---- a segment forward ---- */

/* The output before the first channel: the map that is added, and the tail's shift. */
static void begin(const lance_segment *s, const lance_tile tile, const lance_stack *out,
                  const lance_layer *tail)
{
    lance_stack added = {0};
    int down = 0, right = 0;
    if (s->residual != LANCE_NONE && !s->is_in_place) {
        added = lance_part(s->residual, tile);
        down = lance_rows(s->output, tile).first - lance_rows(s->residual, tile).first;
        right = lance_columns(s->output, tile).first - lance_columns(s->residual, tile).first;
    }
    for (int o = 0; o < out->C; o++) {
        lance_plane to = lance_channel(out, o);
        float shift = tail ? lance_shift(tail, o) : 0;
        for (int i = 0; i < to.H; i++)
            for (int j = 0; j < to.W; j++) {
                float *y = &to.at[i * to.row + j];
                if (s->residual == LANCE_NONE)
                    *y = 0;
                else if (!s->is_in_place) {
                    lance_plane from = lance_channel(&added, o);
                    *y = lance_get(&from, down + i, right + j);
                }
                *y += shift;
            }
    }
}

/* Channel c of the head, or of the source; a copy if something is going to change it. */
static lance_plane first(const lance_segment *s, const lance_tile tile, int c, const lance_stack *x)
{
    const lance_layer *head = layer_of(s->head);
    if (!head) {
        lance_plane h = lance_channel(x, c);
        if (s->copy == LANCE_NONE)
            return h;
        lance_plane copy = lance_room(s->copy, h.H, h.W);
        lance_copy(&copy, &h);
        return copy;
    }
    lance_range rows = lance_rows(s->made, tile), columns = lance_columns(s->made, tile);
    lance_plane h = lance_room(s->room, rows.end - rows.first, columns.end - columns.first);
    const lance_reach reach = lance_reach_between(&head->window, s->made, s->source, tile);
    lance_make(head, c, x, &h, &reach);
    return h;
}

static void forward(const lance_segment *s, const lance_tile tile, bool is_training)
{
    const lance_layer *head = layer_of(s->head), *tail = layer_of(s->tail);
    const lance_stack x = lance_part(s->source, tile), out = lance_part(s->output, tile);
    if (head) {
        lance_clear(head);
        for (int c = 0; c < x.C; c++) {
            lance_plane channel = lance_channel(&x, c);
            lance_look(head, c, &channel);
        }
    }
    for (int n = s->body; n < s->body_end; n++)
        if (lance_operations[n].layer != LANCE_NONE)
            lance_clear(&lance_layers[lance_operations[n].layer]);
    if (tail)
        lance_clear(tail);
    begin(s, tile, &out, tail);
    lance_reach reach = {0};
    if (tail)
        reach = lance_reach_between(&tail->window, s->end, s->inner, tile);
    for (int c = 0; c < (head ? head->C_out : x.C); c++) {
        lance_plane h = first(s, tile, c, &x);
        for (int n = s->body; n < s->body_end; n++)
            h = lance_act(&lance_operations[n], c, h, tile, is_training);
        if (tail) {
            lance_look(tail, c, &h);
            lance_use(tail, c, &h, &out, &reach);
        } else {
            lance_plane to = lance_channel(&out, c);
            lance_add(&to, &h);
        }
    }
    if (tail)
        lance_finish(tail, &out);
    for (int n = s->post; n < s->post_end; n++)
        for (int c = 0; c < out.C; c++)
            lance_act(&lance_operations[n], c, lance_channel(&out, c), tile, is_training);
}

/* The frozen segments at the start run tile by tile, the others on whole maps. */
static void run_forward(const lance_number *image, bool is_training)
{
    lance_number *place = lance_image();
    for (int n = 0; image != place && n < LANCE_IMAGE_NUMBERS; n++)
        place[n] = image[n];
    for (int i = 0; i < LANCE_TILE_ROWS; i++)
        for (int j = 0; j < LANCE_TILE_COLUMNS; j++) {
            const lance_tile tile = {lance_tile_rows[i], lance_tile_columns[j]};
            for (int n = 0; n < LANCE_TILED; n++) {
                forward(&lance_segments[n], tile, is_training);
                if (n < LANCE_TILED - 1)
                    bury(n);
            }
        }
    bury(LANCE_TILED - 1);
    for (int n = LANCE_TILED; n < LANCE_SEGMENTS; n++) {
        forward(&lance_segments[n], whole, is_training);
        bury(n);
    }
}

/* ---- the loss ---- */

/* loss = log(sum of exp(z)) - z[label]; its gradient is softmax(z), minus one at the label. */
static float cross_entropy(int label)
{
    const float *z = lance_floats(lance_maps[LANCE_OUTPUT].at);
    float *g = lance_floats(lance_maps[LANCE_OUTPUT].gradient);
    float most = z[0], at_label = z[label], sum = 0;
    for (int k = 1; k < LANCE_CLASSES; k++)
        most = z[k] > most ? z[k] : most;
    for (int k = 0; k < LANCE_CLASSES; k++) {
        g[k] = expf(z[k] - most);
        sum += g[k];
    }
    for (int k = 0; k < LANCE_CLASSES; k++)
        g[k] /= sum;
    g[label] -= 1;
    return logf(sum) - (at_label - most);
}

/* ---- a segment backward ---- */

/* The gradient of the map that was added is that of the output. */
static void give_to_residual(const lance_segment *s, const lance_stack *g)
{
    if (s->residual == LANCE_NONE || lance_maps[s->residual].gradient == LANCE_NONE)
        return;
    const lance_stack target = lance_gradient(s->residual);
    for (int c = 0; c < g->C; c++) {
        lance_plane from = lance_channel(g, c), to = lance_channel(&target, c);
        if (s->sets_residual)
            lance_copy(&to, &from);
        else
            lance_add(&to, &from);
    }
}

/* The gradient of channel c, from the tail back through the body; false if nobody wants it further on. */
static bool back_to_head(const lance_segment *s, int c, const lance_stack *g, float rate, lance_plane *h)
{
    const lance_layer *tail = layer_of(s->tail);
    if (tail) {
        *h = lance_room(s->step, tail->input.rows, tail->input.columns);
        lance_use_back(tail, c, g, h);
    } else {
        *h = lance_channel(g, c);
    }
    for (int n = s->body_end - 1; n >= s->body; n--) {
        *h = lance_act_back(&lance_operations[n], c, *h, rate);
        if (!lance_operations[n].reaches)
            return false;
    }
    return true;
}

static void channels_back(const lance_segment *s, const lance_stack *g, float rate)
{
    const lance_layer *head = layer_of(s->head), *tail = layer_of(s->tail);
    bool has_gradient = lance_maps[s->source].gradient != LANCE_NONE;
    lance_stack source = {0};
    if (has_gradient)
        source = lance_gradient(s->source);
    for (int i = 0; s->clears_source && i < source.C * source.channel; i++)
        source.at[i] = 0;
    if (head && head->returned != LANCE_NONE)
        for (int i = 0;
             i < head->kept.directions * (head->is_linear ? 1 : head->input.rows * head->input.columns); i++)
            lance_floats(head->returned)[i] = 0;
    if (tail)
        lance_turn(tail, g);
    for (int c = 0; c < (head ? head->C_out : lance_maps[s->source].C); c++) {
        lance_plane h;
        if (!back_to_head(s, c, g, rate, &h))
            continue;
        if (!head) {
            lance_plane to = lance_channel(&source, c);
            lance_add(&to, &h);
            continue;
        }
        if (has_gradient)
            lance_make_back(head, c, &h, &source);
        lance_learn(head, c, &h, rate);
    }
    if (head && has_gradient)
        lance_finish_back(head, &source);
}

static void backward(const lance_segment *s, float rate)
{
    const lance_layer *head = layer_of(s->head), *tail = layer_of(s->tail);
    const lance_stack g = lance_gradient(s->output);
    for (int n = s->post_end - 1; n >= s->post; n--)
        for (int c = 0; c < g.C; c++)
            lance_act_back(&lance_operations[n], c, lance_channel(&g, c), rate);
    give_to_residual(s, &g);
    if (head)
        lance_prepare(head);
    if (tail)
        lance_prepare(tail);
    if (s->reaches)
        channels_back(s, &g, rate);
    for (int o = 0; tail && o < tail->C_out; o++) {
        lance_plane from = lance_channel(&g, o);
        lance_learn(tail, o, &from, rate);
    }
}

/* ---- what an application calls ---- */

static void start(int at, const float *values, int count)
{
    for (int n = 0; at != LANCE_NONE && n < count; n++)
        lance_floats(at)[n] = values ? values[n] : 0;
}

static int kernel_numbers(const lance_layer *l)
{
    return l->C_out * (l->C_in / l->groups) * l->window.kernel.rows * l->window.kernel.columns;
}

static int change_numbers(const lance_layer *l)
{
    return l->C_out * l->kept.directions *
           (l->is_linear ? 1 : l->window.kernel.rows * l->window.kernel.columns);
}

void lance_reset(void)
{
#ifdef LANCE_POISON
    for (int n = 0; n < LANCE_ARENA_BYTES; n++)
        lance_arena[n] = 0xFF;
#endif
    for (const lance_layer *l = lance_layers; l < lance_layers + LANCE_LAYERS; l++) {
        start(l->W, l->W_start, kernel_numbers(l));
        start(l->D, l->D_start, change_numbers(l));
        start(l->bias, l->bias_start, l->C_out);
        start(l->gradient, 0, l->D != LANCE_NONE ? change_numbers(l) : kernel_numbers(l));
        start(l->bias_gradient, 0, l->C_out);
    }
#ifdef LANCE_DRAWS_AT
    *(uint32_t *)(void *)(lance_arena + LANCE_DRAWS_AT) = LANCE_DRAWS_START;
#endif
}

lance_number *lance_image(void)
{
    return (lance_number *)(void *)(lance_arena + LANCE_IMAGE_AT);
}

void lance_predict(const lance_number *image, float *logits)
{
    run_forward(image, false);
    for (int k = 0; k < LANCE_CLASSES; k++)
        logits[k] = lance_floats(lance_maps[LANCE_OUTPUT].at)[k];
}

static int step(const lance_number *image, int label, float rate, float *loss)
{
    if (label < 0 || label >= LANCE_CLASSES)
        return LANCE_BAD_LABEL;
    run_forward(image, true);
    *loss = cross_entropy(label);
    bury(LANCE_SEGMENTS);
    if (!isfinite(*loss))
        return LANCE_NOT_FINITE;
    int time = LANCE_SEGMENTS + 1;
    for (int n = LANCE_SEGMENTS - 1; n >= LANCE_TILED; n--)
        if (lance_segments[n].learns) {
            backward(&lance_segments[n], rate);
            bury(time++);
        }
    return LANCE_OK;
}

#ifdef LANCE_AT_ONCE
int lance_step(const lance_number *image, int label, float rate, float *loss)
{
    return step(image, label, rate, loss);
}
#else
int lance_step(const lance_number *image, int label, float *loss)
{
    return step(image, label, 0, loss);
}

static bool is_finite(int at, int count)
{
    for (int n = 0; at != LANCE_NONE && n < count; n++)
        if (!isfinite(lance_floats(at)[n]))
            return false;
    return true;
}

/* W -= rate * g, and g becomes momentum * g, what the next sum starts from. */
static void descend(int trained, int gradient, int count, float rate)
{
    for (int n = 0; trained != LANCE_NONE && n < count; n++) {
        lance_floats(trained)[n] -= rate * lance_floats(gradient)[n];
        lance_floats(gradient)[n] *= LANCE_MOMENTUM;
    }
}

int lance_update(float rate)
{
    const lance_layer *end = lance_layers + LANCE_LAYERS;
    bool is_good = true;
    for (const lance_layer *l = lance_layers; l < end; l++)
        is_good = is_good && is_finite(l->bias_gradient, l->C_out) &&
                  is_finite(l->gradient, l->D != LANCE_NONE ? change_numbers(l) : kernel_numbers(l));
    for (const lance_layer *l = lance_layers; l < end; l++) {
        int trained = l->D != LANCE_NONE ? l->D : l->W;
        int count = l->D != LANCE_NONE ? change_numbers(l) : kernel_numbers(l);
        if (is_good) {
            descend(trained, l->gradient, count, rate);
            descend(l->bias, l->bias_gradient, l->C_out, rate);
        } else {
            start(l->gradient, 0, count);
            start(l->bias_gradient, 0, l->C_out);
        }
    }
    return is_good ? LANCE_OK : LANCE_NOT_FINITE;
}
#endif

void lance_state(void **at, size_t *bytes)
{
    *at = lance_arena;
    *bytes = LANCE_STATE_BYTES;
}
