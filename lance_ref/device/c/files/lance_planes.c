#include "lance_planes.h"

lance_range lance_rows(int map, lance_tile tile)
{
    lance_range whole = {0, lance_maps[map].H};
    return tile.rows ? tile.rows[map] : whole;
}

lance_range lance_columns(int map, lance_tile tile)
{
    lance_range whole = {0, lance_maps[map].W};
    return tile.columns ? tile.columns[map] : whole;
}

lance_stack lance_part(int map, lance_tile tile)
{
    const lance_map *m = &lance_maps[map];
    lance_range rows = lance_rows(map, tile), columns = lance_columns(map, tile);
    int h = rows.end - rows.first, w = columns.end - columns.first;
    lance_stack part = {0, 0, m->H * m->W, m->W, 1, m->C, h, w};
    if (m->form == LANCE_BYTES) {
        part.channel = 1;
        part.row = m->W * m->C;
        part.column = m->C;
        part.pixels = lance_arena + m->at + rows.first * part.row + columns.first * part.column;
        return part;
    }
    if (m->form == LANCE_TILE)
        return lance_block(m->at, m->C, h, w);
    if (m->form == LANCE_ROWS_FIRST) {
        part.channel = m->W;
        part.row = m->C * m->W;
    }
    part.at = lance_floats(m->at) + rows.first * part.row + columns.first;
    return part;
}

lance_stack lance_gradient(int map)
{
    const lance_map *m = &lance_maps[map];
    return lance_block(m->gradient, m->C, m->H, m->W);
}

/* ---- windows ---- */

lance_reach lance_reach_between(const lance_window *window, int output, int source, lance_tile tile)
{
    lance_range rows = lance_rows(output, tile), columns = lance_columns(output, tile);
    lance_range from_rows = lance_rows(source, tile), from_columns = lance_columns(source, tile);
    lance_reach reach = {
        window,
        {rows.first * window->stride.rows - window->before.rows - from_rows.first,
         columns.first * window->stride.columns - window->before.columns - from_columns.first},
        {rows.end - rows.first, columns.end - columns.first},
        {from_rows.end - from_rows.first, from_columns.end - from_columns.first},
    };
    return reach;
}

lance_reach lance_reach_whole(const lance_window *window, lance_pair output, lance_pair input)
{
    lance_reach reach = {window, {-window->before.rows, -window->before.columns}, output, input};
    return reach;
}

/* The places whose window has this place of the kernel inside of the map. */
static lance_line line_at(int start, int stride, int size, int available)
{
    lance_line line = {0, start, 0, stride};
    if (start < 0) {
        line.written = (-start + stride - 1) / stride;
        line.read = start + line.written * stride;
    }
    if (start < available)
        line.count = lance_min(size, (available - 1 - start) / stride + 1) - line.written;
    return line;
}

bool lance_tap_at(const lance_reach *reach, int p, int q, lance_tap *tap)
{
    const lance_window *window = reach->window;
    tap->rows = line_at(reach->start.rows + p * window->dilation.rows, window->stride.rows, reach->size.rows,
                        reach->available.rows);
    tap->columns = line_at(reach->start.columns + q * window->dilation.columns, window->stride.columns,
                           reach->size.columns, reach->available.columns);
    return tap->rows.count > 0 && tap->columns.count > 0;
}

/* ---- sums ---- */

void lance_fill(const lance_plane *out, float value)
{
    for (int y = 0; y < out->H; y++)
        for (int x = 0; x < out->W; x++)
            out->at[y * out->row + x] = value;
}

void lance_copy(const lance_plane *out, const lance_plane *x)
{
    for (int i = 0; i < out->H; i++)
        for (int j = 0; j < out->W; j++)
            out->at[i * out->row + j] = lance_get(x, i, j);
}

void lance_add(const lance_plane *out, const lance_plane *x)
{
    for (int i = 0; i < out->H; i++)
        for (int j = 0; j < out->W; j++)
            out->at[i * out->row + j] += lance_get(x, i, j);
}

float lance_sum(const lance_plane *x)
{
    float sum = 0;
    for (int i = 0; i < x->H; i++)
        for (int j = 0; j < x->W; j++)
            sum += x->at[i * x->row + j];
    return sum;
}

/* Rows and columns of a tap; where both planes are read without a gap, all rows are one long row. */
static void lines(const lance_plane *a, const lance_plane *b, const lance_tap *tap, int *rows, int *columns)
{
    *rows = tap->rows.count;
    *columns = tap->columns.count;
    if (tap->rows.stride == 1 && tap->columns.stride == 1 && a->row == *columns && b->row == *columns &&
        b->at) {
        *columns *= *rows;
        *rows = 1;
    }
}

void lance_gather(const lance_plane *out, const lance_plane *in, float k, const lance_tap *tap)
{
    int rows, columns, stride = tap->columns.stride * in->column;
    lines(out, in, tap, &rows, &columns);
    for (int i = 0; i < rows; i++) {
        float *to = out->at + (tap->rows.written + i) * out->row + tap->columns.written;
        int from = (tap->rows.read + i * tap->rows.stride) * in->row + tap->columns.read * in->column;
        if (!in->at) {
            const uint8_t *bytes = in->pixels + from;
            for (int j = 0; j < columns; j++)
                to[j] += k * (in->scale * (float)bytes[j * stride] + in->shift);
        } else if (stride == 1) {
            const float *numbers = in->at + from;
            for (int j = 0; j < columns; j++)
                to[j] += k * numbers[j];
        } else {
            const float *numbers = in->at + from;
            for (int j = 0; j < columns; j++)
                to[j] += k * numbers[j * stride];
        }
    }
}

void lance_scatter(const lance_plane *in, const lance_plane *g, float k, const lance_tap *tap)
{
    int rows, columns, stride = tap->columns.stride;
    lines(g, in, tap, &rows, &columns);
    for (int i = 0; i < rows; i++) {
        const float *from = g->at + (tap->rows.written + i) * g->row + tap->columns.written;
        float *to = in->at + (tap->rows.read + i * tap->rows.stride) * in->row + tap->columns.read;
        for (int j = 0; j < columns; j++)
            to[j * stride] += k * from[j];
    }
}

float lance_match(const lance_plane *g, const lance_plane *in, const lance_tap *tap)
{
    int rows, columns;
    float sum = 0;
    lines(g, in, tap, &rows, &columns);
    for (int i = 0; i < rows; i++) {
        const float *from = g->at + (tap->rows.written + i) * g->row + tap->columns.written;
        int row = tap->rows.read + i * tap->rows.stride;
        for (int j = 0; j < columns; j++)
            sum += from[j] * lance_get(in, row, tap->columns.read + j * tap->columns.stride);
    }
    return sum;
}
