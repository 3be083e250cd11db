/* The hot loops of writing: targets to the codes of docs/format.md, in one pass over the entries.
 *
 * The same encoder in numpy is encode.py (and codes.py for the rounding), which is the definition, and is what runs where
 * this was not compiled. A function here answers -1 when anything is not just as a sampler of ours gives it (order of the
 * entries, ids, weights, sums): the caller then asks the numpy encoder, which sorts it or says what is wrong. Floating point
 * is that of numpy, operation for operation, so that the codes are the same bits: no contraction, no reordering of sums but
 * where every order is exact. No index is used before it was compared with the length of the buffer it goes into.
 *
 * R rows, E entries, H head entries, T tail entries. Buffers are aligned and contiguous (pack.py sees to it).
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define UNIT 16777216.0   /* weights of a threshold row are multiples of 1 / UNIT */
#define ONE 4294967296.0  /* fixed point of the rounding chances */
#define PIVOT 64          /* the first head code */
#define CODES 256         /* of the log-p code */
#define MAX_DRAWS 4096
#define SUM_TOLERANCE 1e-3
#define COUNT_TOLERANCE 0.0099f /* a little stricter than the numpy encoder, which decides the rest */
#define SMALLEST_HEAD 0x1p-28f  /* sums of floats in [2^-28, 2) that stay below 2 are exact in double, in any order */

typedef struct {
    uint8_t *data;
    int width; /* bytes of an element, 1 or 2 */
} Codes;

static inline void put(Codes codes, Py_ssize_t i, uint32_t value) {
    uint16_t two = (uint16_t)value;
    if (codes.width == 1) codes.data[i] = (uint8_t)value;
    else memcpy(codes.data + 2 * i, &two, 2);
}

/* Elements of `size` bytes that a buffer holds. */
static inline Py_ssize_t room(const Py_buffer *buffer, Py_ssize_t size) { return buffer->len / size; }

typedef struct {
    const int64_t *offsets;
    const int32_t *id_E;
    const float *weight_E;
    Py_ssize_t rows, entries;
    uint32_t vocab, draws;
} Rows;

/* Whether row r is `start` to offsets[r + 1], of at most `most` entries. */
static inline int row_ends(const Rows *rows, Py_ssize_t r, Py_ssize_t start, int64_t most, Py_ssize_t *end) {
    const int64_t stop = rows->offsets[r + 1];
    if (rows->offsets[r] != start || stop < start || stop > rows->entries || stop - start > most) return 0;
    *end = (Py_ssize_t)stop;
    return 1;
}

/* Ids unique in a row: a table of who was last here tells most of them apart, the heads themselves the others. Tails ascend,
 * so an id can only come twice if one of the two is in the head. */
#define SLOTS 4096
typedef struct {
    uint32_t row_of[SLOTS];
} Seen;

static inline int is_new(const Seen *seen, uint32_t row, uint32_t id, const int32_t *head, Py_ssize_t heads) {
    if (seen->row_of[id % SLOTS] != row) return 1;
    for (Py_ssize_t k = 0; k < heads; k++)
        if ((uint32_t)head[k] == id) return 0;
    return 1;
}

/* Head entries in all, or -1. */
static Py_ssize_t pack_counts(const Rows *rows, Codes count_H, uint32_t *code_E, int64_t *head_R) {
    const float draws = (float)rows->draws, most = draws + 0.5f;
    Seen seen;
    memset(&seen, 0xff, sizeof seen);
    Py_ssize_t i = 0, end, h = 0;
    for (Py_ssize_t r = 0; r < rows->rows; r++) {
        const Py_ssize_t start = i;
        if (!row_ends(rows, r, start, rows->draws, &end)) return -1;
        int32_t last_count = INT32_MAX, count = 0, sum = 0;
        int64_t last_id = -1;
        float last_weight = NAN; /* whose count is `count` */
        Py_ssize_t heads = 0;
        for (; i < end; i++) {
            const float weight = rows->weight_E[i];
            const uint32_t id = (uint32_t)rows->id_E[i];
            if (id >= rows->vocab) return -1;
            if (weight != last_weight) {
                const float exact = weight * draws;
                if (!(exact > 0.5f && exact < most)) return -1;
                count = (int32_t)(exact + 0.5f);
                if (!(fabsf(exact - (float)count) <= COUNT_TOLERANCE)) return -1;
                last_weight = weight;
            }
            if (count > last_count || (count == last_count && id <= last_id)) return -1;
            if (!is_new(&seen, (uint32_t)r, id, rows->id_E + start, heads)) return -1;
            if (count > 1) {
                seen.row_of[id % SLOTS] = (uint32_t)r;
                put(count_H, h + heads++, (uint32_t)count);
                code_E[i] = id;
            } else {
                code_E[i] = last_count == 1 ? id - (uint32_t)last_id : id;
            }
            sum += count;
            last_count = count;
            last_id = id;
        }
        if (end > start && sum != (int32_t)rows->draws) return -1;
        head_R[r] = heads;
        h += heads;
    }
    return i == rows->entries ? h : -1;
}

/* Levels that values are rounded to, ascending, with a first guess for every 64th of a power of two. */
#define KEY_BITS 46
#define GUESSES 4096
typedef struct {
    const double *level_C;
    int codes;
    uint64_t base;
    double gap_C[CODES]; /* to the level above; infinite where they are one, for a chance of 0 */
    uint8_t guess[GUESSES];
} Levels;

static inline uint64_t key_of(double value) {
    uint64_t bits;
    memcpy(&bits, &value, 8);
    return bits >> KEY_BITS;
}

static int levels_of(const double *level_C, Py_ssize_t codes, Levels *levels) {
    if (codes < 2 || codes > CODES || !(level_C[0] > 0)) return 0;
    for (Py_ssize_t c = 1; c < codes; c++)
        if (!(level_C[c] >= level_C[c - 1])) return 0;
    for (Py_ssize_t c = 0; c < codes - 1; c++)
        levels->gap_C[c] = level_C[c + 1] > level_C[c] ? level_C[c + 1] - level_C[c] : INFINITY;
    levels->level_C = level_C;
    levels->codes = (int)codes;
    levels->base = key_of(level_C[0]);
    const uint64_t last = key_of(level_C[codes - 1]) - levels->base;
    if (last >= GUESSES) return 0;
    int low = 0;
    for (uint64_t k = 0; k <= last; k++) {
        const uint64_t bits = (k + levels->base) << KEY_BITS;
        double least;
        memcpy(&least, &bits, 8);
        while (low < codes - 2 && level_C[low + 1] <= least) low++;
        levels->guess[k] = (uint8_t)low;
    }
    return 1;
}

/* The level that `value` is rounded to, as codes.round_systematic does; `sum` are the chances of the row so far. */
static inline int rounded(const Levels *levels, double value, int64_t *sum) {
    const double *level_C = levels->level_C;
    const int top = levels->codes - 1;
    int low;
    if (value < level_C[0]) low = 0;
    else if (value >= level_C[top]) low = top - 1;
    else {
        low = levels->guess[key_of(value) - levels->base];
        low += level_C[low + 1] <= value; /* as often as not: no branch */
        while (low < top - 1 && level_C[low + 1] <= value) low++;
    }
    double chance = (value - level_C[low]) / levels->gap_C[low];
    chance = chance < 0.0 ? 0.0 : chance > 1.0 ? 1.0 : chance;
    const int64_t before = *sum;
    *sum = before + (int64_t)(chance * ONE);
    return low + (int)((*sum >> 32) - (before >> 32));
}

/* Runs of values back to back to codes from `base` on; 1, or -1. */
static Py_ssize_t round_runs(const int64_t *offsets, Py_ssize_t runs, const double *value_E, Py_ssize_t entries,
                             const Levels *levels, const double *uniform_R, Py_ssize_t columns, int base,
                             uint8_t *restrict code_E) {
    Py_ssize_t i = 0;
    for (Py_ssize_t r = 0; r < runs; r++) {
        const int64_t stop = offsets[r + 1];
        const double uniform = uniform_R[r * columns];
        if (offsets[r] != i || stop < i || stop > entries || !(uniform >= 0.0 && uniform < 1.0)) return -1;
        int64_t sum = (int64_t)(uniform * ONE);
        for (; i < stop; i++) {
            if (!isfinite(value_E[i])) return -1;
            code_E[i] = (uint8_t)(base + rounded(levels, value_E[i], &sum));
        }
    }
    return i == entries ? 1 : -1;
}

static int by_value(const void *a, const void *b) {
    const uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

/* Nearly sorted as it comes: codes fall with the probability, but for ups among neighbours and ids among equals. */
static void sort_keys(uint32_t *key, Py_ssize_t count) {
    if (count > 64) {
        qsort(key, (size_t)count, sizeof *key, by_value);
        return;
    }
    for (Py_ssize_t k = 1; k < count; k++) {
        const uint32_t moved = key[k];
        Py_ssize_t j = k;
        for (; j > 0 && key[j - 1] > moved; j--) key[j] = key[j - 1];
        key[j] = moved;
    }
}

typedef struct {
    const float *logp_E;
    const double *rounding_R3;
    float pivot_logp;
    Levels levels; /* of the head */
    const int64_t *tail_units;
    Py_ssize_t tail_codes;
    uint32_t *code_E;
    Codes head_R, tail_R;
    uint8_t *logp_H;
    double *logp_T;
} Threshold;

/* codes.encode_tail_mass */
static inline uint32_t tail_code(const Threshold *t, double tau, double uniform) {
    double mass = tau * UNIT;
    mass = mass < 0.0 ? 0.0 : mass > UNIT ? UNIT : mass;
    /* The last code at or below it, the very last one left out: its square root is there, or next to it. */
    const Py_ssize_t last = t->tail_codes - 2;
    Py_ssize_t low = (Py_ssize_t)((double)(last + 1) * sqrt(mass / UNIT));
    low = low > last ? last : low;
    while (low < last && (double)t->tail_units[low + 1] <= mass) low++;
    while (low > 0 && (double)t->tail_units[low] > mass) low--;
    const double chance = (mass - (double)t->tail_units[low]) / (double)(t->tail_units[low + 1] - t->tail_units[low]);
    return (uint32_t)low + (uniform < chance);
}

/* Head entries in all, or -1. */
static Py_ssize_t pack_threshold(const Rows *rows, Threshold *t) {
    uint32_t key[MAX_DRAWS + 1]; /* of a row's head: code descending, then id */
    Seen seen;
    memset(&seen, 0xff, sizeof seen);
    Py_ssize_t i = 0, end, h = 0, tails = 0;
    for (Py_ssize_t r = 0; r < rows->rows; r++) {
        const Py_ssize_t start = i;
        const double *uniform = t->rounding_R3 + 3 * r;
        if (!row_ends(rows, r, start, (int64_t)rows->draws + 1, &end)) return -1;
        if (!(uniform[0] >= 0.0 && uniform[0] < 1.0)) return -1;
        int64_t chances = (int64_t)(uniform[0] * ONE);
        double sum = 0.0;
        float last = 2.0f; /* more than any weight of a row that sums to 1 */
        for (; i < end && t->logp_E[i] >= t->pivot_logp; i++) {
            const float weight = rows->weight_E[i];
            const uint32_t id = (uint32_t)rows->id_E[i];
            if (!(weight >= SMALLEST_HEAD && weight <= last) || id >= rows->vocab) return -1;
            if (!is_new(&seen, (uint32_t)r, id, rows->id_E + start, i - start)) return -1;
            seen.row_of[id % SLOTS] = (uint32_t)r;
            last = weight;
            sum += weight;
            const uint32_t code = PIVOT + (uint32_t)rounded(&t->levels, weight, &chances);
            key[i - start] = (CODES - 1 - code) << 24 | id;
        }
        const Py_ssize_t heads = i - start;
        const double head_mass = sum;
        if (heads > 2) sort_keys(key + 1, heads - 1); /* the likeliest stays first */
        for (Py_ssize_t k = 0; k < heads; k++) {
            t->code_E[start + k] = key[k] & 0xffffff;
            t->logp_H[h + k] = (uint8_t)(CODES - 1 - (key[k] >> 24));
        }
        last = 2.0f;
        int64_t last_id = -1;
        for (; i < end; i++) {
            const float weight = rows->weight_E[i], logp = t->logp_E[i];
            const uint32_t id = (uint32_t)rows->id_E[i];
            if (!(logp < t->pivot_logp && weight >= 0.0f && weight <= last)) return -1;
            if (id >= rows->vocab || (int64_t)id <= last_id) return -1;
            if (!is_new(&seen, (uint32_t)r, id, rows->id_E + start, heads)) return -1;
            t->code_E[i] = last_id < 0 ? id : id - (uint32_t)last_id;
            t->logp_T[tails++] = logp;
            last = weight;
            last_id = id;
            sum += weight;
        }
        if (end > start && !(fabs(sum - 1.0) <= SUM_TOLERANCE)) return -1;
        put(t->head_R, r, (uint32_t)heads);
        const uint32_t code = tail_code(t, end - start > heads ? 1.0 - head_mass : 0.0, uniform[1]);
        put(t->tail_R, r, heads == 0 && end > start ? (uint32_t)(t->tail_codes - 1) : code);
        h += heads;
    }
    return i == rows->entries ? h : -1;
}

/* Bits 16 and up of the id codes to packed planes, lowest first, which are longer than the entries and zero before. */
static void pack_planes(const uint32_t *code_E, Py_ssize_t entries, uint8_t *high, int planes, Py_ssize_t plane_bytes) {
    for (int plane = 0; plane < planes; plane++) {
        uint8_t *bits = high + plane * plane_bytes;
        Py_ssize_t i = 0;
        for (; i + 8 <= entries; i += 8) {
            uint32_t byte = 0;
            for (int k = 0; k < 8; k++) byte |= (code_E[i + k] >> (16 + plane) & 1u) << k;
            bits[i >> 3] = (uint8_t)byte;
        }
        for (; i < entries; i++) bits[i >> 3] |= (uint8_t)((code_E[i] >> (16 + plane) & 1u) << (i & 7));
    }
}

static PyObject *answer(Py_ssize_t value, Py_buffer *const *held, int many) {
    for (int i = 0; i < many; i++) PyBuffer_Release(held[i]);
    return PyLong_FromSsize_t(value);
}

/* Whether the buffers of the rows agree with each other. */
static int rows_of(const Py_buffer *offsets, const Py_buffer *ids, const Py_buffer *weights, Rows *rows) {
    rows->offsets = offsets->buf;
    rows->id_E = ids->buf;
    rows->weight_E = weights->buf;
    rows->rows = room(offsets, 8) - 1;
    rows->entries = room(ids, 4);
    return rows->rows >= 0 && rows->rows < UINT32_MAX && room(weights, 4) == rows->entries && rows->draws >= 1 &&
           rows->draws <= MAX_DRAWS && rows->vocab <= 1u << 24;
}

/* counts(draws, vocab, offsets, ids, weights, count, id_codes, heads) -> head entries or -1 */
static PyObject *py_counts(PyObject *self, PyObject *arguments) {
    Rows rows;
    Py_buffer offsets, ids, weights, count, codes, heads;
    if (!PyArg_ParseTuple(arguments, "IIy*y*y*w*w*w*", &rows.draws, &rows.vocab, &offsets, &ids, &weights, &count, &codes,
                          &heads))
        return NULL;
    Py_ssize_t head_entries = -1;
    Py_BEGIN_ALLOW_THREADS
    const Codes count_H = {count.buf, rows.draws <= 255 ? 1 : 2};
    if (rows_of(&offsets, &ids, &weights, &rows) && room(&count, count_H.width) >= rows.entries &&
        room(&codes, 4) >= rows.entries && room(&heads, 8) >= rows.rows)
        head_entries = pack_counts(&rows, count_H, codes.buf, heads.buf);
    Py_END_ALLOW_THREADS
    Py_buffer *held[] = {&offsets, &ids, &weights, &count, &codes, &heads};
    return answer(head_entries, held, 6);
}

/* threshold(draws, vocab, pivot_logp, offsets, ids, weights, logp, rounding, levels, tail_units,
 *           id_codes, n_head, tail, logp_head, logp of the tail) -> head entries or -1 */
static PyObject *py_threshold(PyObject *self, PyObject *arguments) {
    Rows rows;
    Threshold t;
    Py_buffer offsets, ids, weights, logp, rounding, levels, units, codes, n_head, tail, logp_head, logp_tail;
    if (!PyArg_ParseTuple(arguments, "IIfy*y*y*y*y*y*y*w*w*w*w*w*", &rows.draws, &rows.vocab, &t.pivot_logp, &offsets, &ids,
                          &weights, &logp, &rounding, &levels, &units, &codes, &n_head, &tail, &logp_head, &logp_tail))
        return NULL;
    Py_ssize_t head_entries = -1;
    Py_BEGIN_ALLOW_THREADS
    t.logp_E = logp.buf;
    t.rounding_R3 = rounding.buf;
    t.tail_units = units.buf;
    t.tail_codes = room(&units, 8);
    t.code_E = codes.buf;
    t.head_R = (Codes){n_head.buf, rows.draws + 1 <= 255 ? 1 : 2};
    t.tail_R = (Codes){tail.buf, t.tail_codes <= 256 ? 1 : 2};
    t.logp_H = logp_head.buf;
    t.logp_T = logp_tail.buf;
    if (rows_of(&offsets, &ids, &weights, &rows) && room(&logp, 4) == rows.entries && room(&rounding, 24) == rows.rows &&
        t.tail_codes >= 2 && t.tail_codes <= 65536 && room(&codes, 4) >= rows.entries &&
        room(&n_head, t.head_R.width) >= rows.rows && room(&tail, t.tail_R.width) >= rows.rows &&
        logp_head.len >= rows.entries && room(&logp_tail, 8) >= rows.entries && room(&levels, 8) == CODES - PIVOT &&
        levels_of(levels.buf, CODES - PIVOT, &t.levels))
        head_entries = pack_threshold(&rows, &t);
    Py_END_ALLOW_THREADS
    Py_buffer *held[] = {&offsets, &ids,   &weights, &logp, &rounding,  &levels,
                         &units,   &codes, &n_head,  &tail, &logp_head, &logp_tail};
    return answer(head_entries, held, 12);
}

/* round(offsets, values, levels, rounding, column, columns, base, codes) -> 1 or -1 */
static PyObject *py_round(PyObject *self, PyObject *arguments) {
    Py_buffer offsets, values, levels, rounding, codes;
    int column, columns, base;
    if (!PyArg_ParseTuple(arguments, "y*y*y*y*iiiw*", &offsets, &values, &levels, &rounding, &column, &columns, &base, &codes))
        return NULL;
    Py_ssize_t done = -1;
    Py_BEGIN_ALLOW_THREADS
    Levels table;
    const Py_ssize_t runs = room(&offsets, 8) - 1, entries = room(&values, 8);
    if (runs >= 0 && column >= 0 && column < columns && room(&rounding, 8) / columns == runs && codes.len >= entries &&
        base >= 0 && base + room(&levels, 8) <= CODES && levels_of(levels.buf, room(&levels, 8), &table))
        done = round_runs(offsets.buf, runs, values.buf, entries, &table, (const double *)rounding.buf + column, columns,
                          base, codes.buf);
    Py_END_ALLOW_THREADS
    Py_buffer *held[] = {&offsets, &values, &levels, &rounding, &codes};
    return answer(done, held, 5);
}

/* planes(id_codes, planes, high) -> 1 or -1 */
static PyObject *py_planes(PyObject *self, PyObject *arguments) {
    Py_buffer codes, high;
    int planes;
    if (!PyArg_ParseTuple(arguments, "y*iw*", &codes, &planes, &high)) return NULL;
    Py_ssize_t done = -1;
    Py_BEGIN_ALLOW_THREADS
    const Py_ssize_t entries = room(&codes, 4);
    if (planes >= 1 && planes <= 8 && high.len / planes >= (entries + 7) / 8) {
        pack_planes(codes.buf, entries, high.buf, planes, high.len / planes);
        done = 1;
    }
    Py_END_ALLOW_THREADS
    Py_buffer *held[] = {&codes, &high};
    return answer(done, held, 2);
}

static PyMethodDef methods[] = {
    {"counts", py_counts, METH_VARARGS, "Pack rows of counts; how many head entries, or -1."},
    {"threshold", py_threshold, METH_VARARGS, "Pack threshold rows; how many head entries, or -1."},
    {"round", py_round, METH_VARARGS, "Round runs of values systematically to codes; 1, or -1."},
    {"planes", py_planes, METH_VARARGS, "Pack the high bits of id codes into bit planes; 1, or -1."},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_pack", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__pack(void) { return PyModule_Create(&module); }
