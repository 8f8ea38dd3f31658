#include "lance_layers.h"

/* ---- weights ---- */

static int inputs_per_group(const lance_layer *l)
{
    return l->C_in / l->groups;
}

static int outputs_per_group(const lance_layer *l)
{
    return l->C_out / l->groups;
}

/* The first input that output o looks at, and the first output that looks at input i. */
static int first_input(const lance_layer *l, int o)
{
    return o / outputs_per_group(l) * inputs_per_group(l);
}

static int first_output(const lance_layer *l, int i)
{
    return i / inputs_per_group(l) * outputs_per_group(l);
}

static float scale_of(const lance_layer *l, int o)
{
    return l->weight_scale ? l->weight_scale[o] : 1.0f;
}

static bool is_factored(const lance_layer *l)
{
    return l->D != LANCE_NONE && !l->is_merged;
}

/* The kernel of D: that of the layer, but 1 x 1 for a linear layer, whose U goes through all places. */
static const lance_window one_place = {{1, 1}, {1, 1}, {1, 1}, {0, 0}};

static const lance_window *core_window(const lance_layer *l)
{
    return l->is_linear && l->kept.U ? &one_place : &l->window;
}

static lance_reach core_reach(const lance_layer *l)
{
    const lance_pair one = {1, 1};
    return lance_reach_whole(core_window(l), l->output, l->is_linear && l->kept.U ? one : l->input);
}

/* D[o, r, p, q] times batch norm's factor. */
static float change_at(const lance_layer *l, int o, int r, int p, int q)
{
    const lance_pair k = core_window(l)->kernel;
    int n = ((o * l->kept.directions + r) * k.rows + p) * k.columns + q;
    return lance_floats(l->D)[n] * scale_of(l, o);
}

/* W[o, i, p, q] as the forward pass takes it, with i counted within the group of o:
 * W_0[o, i, p, q] (+ sum over r of U[i, r] D[o, r, p, q], if D is merged), times batch norm's factor. */
static float weight_at(const lance_layer *l, int o, int i, int p, int q)
{
    const lance_pair k = l->window.kernel;
    int n = ((o * inputs_per_group(l) + i) * k.rows + p) * k.columns + q;
    float w;
    if (l->W != LANCE_NONE)
        w = lance_floats(l->W)[n];
    else
#ifdef LANCE_INT8
        w = (float)l->W0[n] * l->unit[o];
#else
        w = l->W0[n];
#endif
    if (l->is_merged) {
        int R = l->kept.directions;
        const float *U = l->kept.U + i * R;
        const float *D = lance_floats(l->D) + (o * R * k.rows + p) * k.columns + q;
        for (int r = 0; r < R; r++)
            w += U[r] * D[r * k.rows * k.columns];
    }
    return w * scale_of(l, o);
}

/* ---- what is kept of the input ---- */

static void clear_floats(int at, int n)
{
    for (int i = 0; i < n; i++)
        lance_floats(at)[i] = 0;
}

static int core_numbers(const lance_kept *kept)
{
    return kept->directions * kept->h * kept->w;
}

void lance_clear(const lance_layer *l)
{
    const lance_kept *kept = &l->kept;
    if (kept->how == LANCE_KEEP_CORE && kept->U)
        clear_floats(kept->at, core_numbers(kept));
    if (l->projected != LANCE_NONE)
        clear_floats(l->projected, kept->directions * l->input.rows * l->input.columns);
}

/* S += U[c] (x) (U_h^T x U_w), equation (4) for channel c. */
static void add_to_core(const lance_layer *l, int c, const lance_plane *x)
{
    const lance_kept *kept = &l->kept;
    int R = kept->directions, places = kept->h * kept->w;
    float *S = lance_floats(kept->at);
    lance_plane half = *x;
    if (kept->Uh) { /* U_h^T x, (h, W) */
        half = lance_room(kept->half, kept->h, x->W);
        lance_fill(&half, 0);
        for (int i = 0; i < x->H; i++)
            for (int a = 0; a < kept->h; a++)
                for (int j = 0; j < x->W; j++)
                    half.at[a * x->W + j] += kept->Uh[i * kept->h + a] * lance_get(x, i, j);
    }
    for (int a = 0; a < kept->h; a++)
        for (int b = 0; b < kept->w; b++) {
            float number = 0;
            if (kept->Uw)
                for (int j = 0; j < half.W; j++)
                    number += lance_get(&half, a, j) * kept->Uw[j * kept->w + b];
            else
                number = lance_get(&half, a, b);
            if (!kept->U)
                S[c * places + a * kept->w + b] = number;
            else
                for (int r = 0; r < R; r++)
                    S[r * places + a * kept->w + b] += kept->U[c * R + r] * number;
        }
}

/* Of a linear layer every place of channel c has its own row of U. */
static void add_to_flat_core(const lance_layer *l, int c, const lance_plane *x)
{
    int R = l->kept.directions;
    float *S = lance_floats(l->kept.at);
    for (int i = 0; i < x->H; i++)
        for (int j = 0; j < x->W; j++) {
            const float *U = l->kept.U + ((c * x->H + i) * x->W + j) * R;
            float number = lance_get(x, i, j);
            for (int r = 0; r < R; r++)
                S[r] += U[r] * number;
        }
}

void lance_look(const lance_layer *l, int c, const lance_plane *x)
{
    const lance_kept *kept = &l->kept;
    if (kept->how == LANCE_KEEP_INPUT) {
        lance_plane to = lance_room(kept->at + c * x->H * x->W * (int)sizeof(float), x->H, x->W);
        lance_copy(&to, x);
    } else if (kept->how == LANCE_KEEP_CORE && l->is_linear) {
        add_to_flat_core(l, c, x);
    } else if (kept->how == LANCE_KEEP_CORE) {
        add_to_core(l, c, x);
    }
    if (l->projected != LANCE_NONE)
        for (int r = 0; r < kept->directions; r++)
            for (int i = 0; i < x->H; i++)
                for (int j = 0; j < x->W; j++)
                    lance_floats(l->projected)[(r * x->H + i) * x->W + j] +=
                        kept->U[c * kept->directions + r] * lance_get(x, i, j);
}

/* Put a part of the core back to height and width: out = U_h s U_w^T. With c >= 0, s is channel c of the
 * core, summed over its directions; otherwise s is direction r. */
static void expand(const lance_layer *l, int c, int r, const lance_plane *out)
{
    const lance_kept *kept = &l->kept;
    const float *S = lance_floats(kept->at);
    int places = kept->h * kept->w, W = out->W;
    lance_plane half = kept->Uh ? lance_room(kept->half, kept->h, W) : *out; /* s U_w^T, (h, W) */
    lance_fill(&half, 0);
    for (int a = 0; a < kept->h; a++)
        for (int b = 0; b < kept->w; b++) {
            float s = 0;
            if (c < 0 || !kept->U)
                s = S[(c < 0 ? r : c) * places + a * kept->w + b];
            else
                for (int n = 0; n < kept->directions; n++)
                    s += kept->U[c * kept->directions + n] * S[n * places + a * kept->w + b];
            if (!kept->Uw)
                half.at[a * half.row + b] = s;
            else
                for (int j = 0; j < W; j++)
                    half.at[a * half.row + j] += kept->Uw[j * kept->w + b] * s;
        }
    if (!kept->Uh)
        return;
    lance_fill(out, 0);
    for (int i = 0; i < out->H; i++)
        for (int a = 0; a < kept->h; a++)
            for (int j = 0; j < W; j++)
                out->at[i * out->row + j] += kept->Uh[i * kept->h + a] * half.at[a * W + j];
}

void lance_prepare(const lance_layer *l)
{
    if (!l->kept.at_once || l->kept.expanded == LANCE_NONE)
        return;
    lance_stack out = lance_block(l->kept.expanded, l->kept.directions, l->input.rows, l->input.columns);
    for (int r = 0; r < out.C; r++) {
        lance_plane plane = lance_channel(&out, r);
        expand(l, -1, r, &plane);
    }
}

/* What the weight gradient is made from: one map for each direction of the core, or for each channel. */
static lance_stack kept_maps(const lance_layer *l)
{
    const lance_tile whole = {0, 0};
    const lance_kept *kept = &l->kept;
    if (kept->how == LANCE_KEEP_SOURCE)
        return lance_part(kept->at, whole);
    if (kept->how == LANCE_KEEP_INPUT)
        return lance_block(kept->at, l->C_in, l->input.rows, l->input.columns);
    if (kept->at_once && kept->expanded != LANCE_NONE)
        return lance_block(kept->expanded, kept->directions, l->input.rows, l->input.columns);
    return lance_block(kept->at, kept->directions, kept->h, kept->w);
}

/* ---- forward ---- */

float lance_shift(const lance_layer *l, int o)
{
    float shift = l->shift ? l->shift[o] : 0;
    if (l->bias != LANCE_NONE)
        shift += lance_floats(l->bias)[o] * (l->bias_scale ? l->bias_scale[o] : 1.0f);
    return shift;
}

/* U^T x */
static lance_stack projections(const lance_layer *l)
{
    if (l->projected != LANCE_NONE)
        return lance_block(l->projected, l->kept.directions, l->input.rows, l->input.columns);
    return lance_block(l->kept.at, l->kept.directions, l->kept.h, l->kept.w);
}

/* out += sum over r, p, q of D[o, r, p, q] (U^T x)[r, ...] */
static void make_from_projections(const lance_layer *l, int o, const lance_plane *out)
{
    const lance_stack S = projections(l);
    const lance_reach reach = core_reach(l);
    lance_tap tap;
    for (int p = 0; p < reach.window->kernel.rows; p++)
        for (int q = 0; q < reach.window->kernel.columns; q++)
            if (lance_tap_at(&reach, p, q, &tap))
                for (int r = 0; r < S.C; r++) {
                    lance_plane s = lance_channel(&S, r);
                    lance_gather(out, &s, change_at(l, o, r, p, q), &tap);
                }
}

/* out = shift[o] + sum over i, p, q of W[o, i, p, q] x[i, s y + d p - top, s x + d q - left] */
void lance_make(const lance_layer *l, int o, const lance_stack *x, const lance_plane *out,
                const lance_reach *reach)
{
    lance_tap tap;
    lance_fill(out, lance_shift(l, o));
    for (int p = 0; p < l->window.kernel.rows; p++)
        for (int q = 0; q < l->window.kernel.columns; q++)
            if (lance_tap_at(reach, p, q, &tap))
                for (int i = 0; i < inputs_per_group(l); i++) {
                    lance_plane in = lance_channel(x, first_input(l, o) + i);
                    lance_gather(out, &in, weight_at(l, o, i, p, q), &tap);
                }
    if (is_factored(l))
        make_from_projections(l, o, out);
}

void lance_make_depthwise(const lance_layer *l, int c, const lance_plane *x, const lance_plane *out,
                          const lance_reach *reach)
{
    lance_tap tap;
    lance_fill(out, lance_shift(l, c));
    for (int p = 0; p < l->window.kernel.rows; p++)
        for (int q = 0; q < l->window.kernel.columns; q++)
            if (lance_tap_at(reach, p, q, &tap))
                lance_gather(out, x, weight_at(l, c, 0, p, q), &tap);
}

/* For every o that looks at input i:
 * out[o] += sum over p, q of W[o, i, p, q] x[s y + d p - top, s x + d q - left] */
void lance_use(const lance_layer *l, int i, const lance_plane *x, const lance_stack *out,
               const lance_reach *reach)
{
    int first = first_output(l, i), place = i % inputs_per_group(l);
    lance_tap tap;
    for (int p = 0; p < l->window.kernel.rows; p++)
        for (int q = 0; q < l->window.kernel.columns; q++)
            if (lance_tap_at(reach, p, q, &tap))
                for (int o = first; o < first + outputs_per_group(l); o++) {
                    lance_plane to = lance_channel(out, o);
                    lance_gather(&to, x, weight_at(l, o, place, p, q), &tap);
                }
}

/* What D adds after the last channel of the input. */
void lance_finish(const lance_layer *l, const lance_stack *out)
{
    for (int o = 0; is_factored(l) && o < l->C_out; o++) {
        lance_plane to = lance_channel(out, o);
        make_from_projections(l, o, &to);
    }
}

/* ---- backward ---- */

static lance_stack returned(const lance_layer *l)
{
    return l->is_linear ? lance_block(l->returned, l->kept.directions, 1, 1)
                        : lance_block(l->returned, l->kept.directions, l->input.rows, l->input.columns);
}

/* T[r, ...] += sum over p, q of D[o, r, p, q] g[y, x]: output channel o's share of D^T g */
static void add_to_returned(const lance_layer *l, int o, const lance_plane *g)
{
    const lance_stack T = returned(l);
    const lance_reach reach = core_reach(l);
    lance_tap tap;
    for (int p = 0; p < reach.window->kernel.rows; p++)
        for (int q = 0; q < reach.window->kernel.columns; q++)
            if (lance_tap_at(&reach, p, q, &tap))
                for (int r = 0; r < T.C; r++) {
                    lance_plane t = lance_channel(&T, r);
                    lance_scatter(&t, g, change_at(l, o, r, p, q), &tap);
                }
}

/* gradient += sum over r of U[i, r] T[r] */
static void add_turned(const lance_layer *l, int i, const lance_plane *gradient)
{
    const lance_stack T = returned(l);
    for (int a = 0; a < gradient->H; a++)
        for (int b = 0; b < gradient->W; b++) {
            int row = l->is_linear ? (i * gradient->H + a) * gradient->W + b : i;
            int place = l->is_linear ? 0 : a * T.row + b;
            float sum = 0;
            for (int r = 0; r < T.C; r++)
                sum += l->kept.U[row * T.C + r] * T.at[r * T.channel + place];
            gradient->at[a * gradient->row + b] += sum;
        }
}

/* Of a tail, before the first channel: D^T g. */
void lance_turn(const lance_layer *l, const lance_stack *g)
{
    if (!is_factored(l))
        return;
    const lance_stack T = returned(l);
    clear_floats(l->returned, T.C * T.channel);
    for (int o = 0; o < l->C_out; o++) {
        lance_plane from = lance_channel(g, o);
        add_to_returned(l, o, &from);
    }
}

/* Of a tail, for input channel i: gradient = sum over o, p, q of W[o, i, p, q] g[o, y, x] (+ U (D^T g)) */
void lance_use_back(const lance_layer *l, int i, const lance_stack *g, const lance_plane *gradient)
{
    const lance_reach reach = lance_reach_whole(&l->window, l->output, l->input);
    int first = first_output(l, i), place = i % inputs_per_group(l);
    lance_tap tap;
    lance_fill(gradient, 0);
    for (int p = 0; p < l->window.kernel.rows; p++)
        for (int q = 0; q < l->window.kernel.columns; q++)
            if (lance_tap_at(&reach, p, q, &tap))
                for (int o = first; o < first + outputs_per_group(l); o++) {
                    lance_plane from = lance_channel(g, o);
                    lance_scatter(gradient, &from, weight_at(l, o, place, p, q), &tap);
                }
    if (is_factored(l))
        add_turned(l, i, gradient);
}

/* Of a head, output channel o's share: gradient[i] += sum over p, q of W[o, i, p, q] g[y, x] */
void lance_make_back(const lance_layer *l, int o, const lance_plane *g, const lance_stack *gradient)
{
    const lance_reach reach = lance_reach_whole(&l->window, l->output, l->input);
    lance_tap tap;
    for (int p = 0; p < l->window.kernel.rows; p++)
        for (int q = 0; q < l->window.kernel.columns; q++)
            if (lance_tap_at(&reach, p, q, &tap))
                for (int i = 0; i < inputs_per_group(l); i++) {
                    lance_plane to = lance_channel(gradient, first_input(l, o) + i);
                    lance_scatter(&to, g, weight_at(l, o, i, p, q), &tap);
                }
    if (is_factored(l))
        add_to_returned(l, o, g);
}

void lance_make_back_depthwise(const lance_layer *l, int c, const lance_plane *g, const lance_plane *gradient)
{
    const lance_reach reach = lance_reach_whole(&l->window, l->output, l->input);
    lance_tap tap;
    lance_fill(gradient, 0);
    for (int p = 0; p < l->window.kernel.rows; p++)
        for (int q = 0; q < l->window.kernel.columns; q++)
            if (lance_tap_at(&reach, p, q, &tap))
                lance_scatter(gradient, g, weight_at(l, c, 0, p, q), &tap);
}

/* Of a head, after its last channel: U (D^T g). */
void lance_finish_back(const lance_layer *l, const lance_stack *gradient)
{
    for (int i = 0; is_factored(l) && i < l->C_in; i++) {
        lance_plane to = lance_channel(gradient, i);
        add_turned(l, i, &to);
    }
}

/* ---- what it learns ---- */

static void learn_number(int trained, int gradient, int n, float value, float rate)
{
    if (gradient != LANCE_NONE)
        lance_floats(gradient)[n] += value;
    else
        lance_floats(trained)[n] -= rate * value;
}

/* From one channel a of the input:
 * dW[o, i, p, q] = sum over y, x of g[y, x] a[s y + d p - top, s x + d q - left] */
static void learn_from_plane(const lance_layer *l, int o, int i, const lance_plane *g, const lance_plane *a,
                             float rate)
{
    const lance_reach reach = lance_reach_whole(&l->window, l->output, l->input);
    const lance_pair k = l->window.kernel;
    lance_tap tap;
    for (int p = 0; p < k.rows; p++)
        for (int q = 0; q < k.columns; q++)
            if (lance_tap_at(&reach, p, q, &tap)) {
                float value = lance_match(g, a, &tap) * scale_of(l, o);
                int n = ((o * inputs_per_group(l) + i) * k.rows + p) * k.columns + q;
                learn_number(l->W, l->gradient, n, value, rate);
            }
}

/* Along one axis, the output place whose window has this input place at place p of its kernel; -1 if there is
 * none. */
static int seen_from(int input, int p, int before, int dilation, int stride, int outputs)
{
    int n = input + before - p * dilation;
    return n >= 0 && n % stride == 0 && n / stride < outputs ? n / stride : -1;
}

/* The same, for channel c of a core without room for it: one place a[i, j] = sum over r of U[c, r] S[r, i, j]
 * at a time, and what it gives to all places of the kernel. */
static void learn_from_directions(const lance_layer *l, int o, int i, int c, const lance_plane *g, float rate)
{
    const lance_stack S = kept_maps(l);
    const lance_window *w = &l->window;
    for (int y = 0; y < S.H; y++)
        for (int x = 0; x < S.W; x++) {
            float a = 0;
            for (int r = 0; r < S.C; r++)
                a += l->kept.U[c * S.C + r] * S.at[r * S.channel + y * S.row + x];
            a *= scale_of(l, o);
            for (int p = 0; p < w->kernel.rows; p++) {
                int row = seen_from(y, p, w->before.rows, w->dilation.rows, w->stride.rows, g->H);
                for (int q = 0; row >= 0 && q < w->kernel.columns; q++) {
                    int column =
                        seen_from(x, q, w->before.columns, w->dilation.columns, w->stride.columns, g->W);
                    int n = ((o * inputs_per_group(l) + i) * w->kernel.rows + p) * w->kernel.columns + q;
                    if (column >= 0)
                        learn_number(l->W, l->gradient, n, a * g->at[row * g->row + column], rate);
                }
            }
        }
}

/* With groups, from each channel that output channel o looks at. */
static void learn_by_channel(const lance_layer *l, int o, const lance_plane *g, float rate)
{
    const lance_kept *kept = &l->kept;
    for (int i = 0; i < inputs_per_group(l); i++) {
        int c = first_input(l, o) + i;
        lance_plane a;
        if (kept->how == LANCE_KEEP_CORE && (kept->Uh || kept->Uw)) {
            a = lance_room(kept->expanded, l->input.rows, l->input.columns);
            expand(l, c, 0, &a);
        } else if (kept->how == LANCE_KEEP_CORE && kept->U) {
            learn_from_directions(l, o, i, c, g, rate);
            continue;
        } else {
            const lance_stack maps = kept_maps(l);
            a = lance_channel(&maps, c);
        }
        learn_from_plane(l, o, i, g, &a, rate);
    }
}

/* Z[o, r, p, q] = sum over y, x of g[y, x] S[r, s y + d p - top, s x + d q - left]. That is the gradient of
 * D; the weight itself, if it trains, gets dW[o, i, p, q] = sum over r of U[i, r] Z[o, r, p, q], equation
 * (8). */
static void learn_by_direction(const lance_layer *l, int o, const lance_plane *g, float rate)
{
    const lance_stack S = kept_maps(l);
    const lance_reach reach = core_reach(l);
    const lance_pair k = reach.window->kernel;
    int rows_of_U = l->is_linear ? l->C_in * l->input.rows * l->input.columns : l->C_in;
    lance_tap tap;
    for (int p = 0; p < k.rows; p++)
        for (int q = 0; q < k.columns; q++)
            if (lance_tap_at(&reach, p, q, &tap))
                for (int r = 0; r < S.C; r++) {
                    lance_plane s = lance_channel(&S, r);
                    float z = lance_match(g, &s, &tap) * scale_of(l, o);
                    int place = p * k.columns + q, places = k.rows * k.columns;
                    if (l->D != LANCE_NONE || !l->kept.U) {
                        int trained = l->D != LANCE_NONE ? l->D : l->W;
                        learn_number(trained, l->gradient, (o * S.C + r) * places + place, z, rate);
                        continue;
                    }
                    for (int i = 0; i < rows_of_U; i++)
                        learn_number(l->W, l->gradient, (o * rows_of_U + i) * places + place,
                                     l->kept.U[i * S.C + r] * z, rate);
                }
}

void lance_learn(const lance_layer *l, int o, const lance_plane *g, float rate)
{
    if (l->bias != LANCE_NONE) {
        float scale = l->bias_scale ? l->bias_scale[o] : 1.0f;
        learn_number(l->bias, l->bias_gradient, o, lance_sum(g) * scale, rate);
    }
    if (l->W == LANCE_NONE && l->D == LANCE_NONE)
        return;
    if (inputs_per_group(l) < l->C_in || (inputs_per_group(l) == 1 && l->groups == l->C_out && !l->is_linear))
        learn_by_channel(l, o, g, rate);
    else
        learn_by_direction(l, o, g, rate);
}
