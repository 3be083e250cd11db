/* The hot loops of reading: one sequence's stored codes to ids and weights, in one pass.
 *
 * What the codes mean is in docs/format.md; the same decoder in numpy is decode.py, which is the definition, and is what
 * runs where this was not compiled. A function here returns how many entries it wrote, or -1 when anything is not as it
 * must be: the caller then asks the numpy decoder, which says what is wrong. No index is used before it was compared with
 * the length of the buffer it goes into, whatever the bytes say: a cache may come from a stranger.
 *
 * L rows of a sequence, E entries, H head entries. Buffers may be unaligned: multi-byte elements are copied out.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include <stdint.h>
#include <string.h>

#define UNIT (1 << 24) /* weights of a threshold row are multiples of 1 / UNIT */
#define PIVOT 64       /* the first head code */

/* Where the compiler can, a second version for processors with AVX2: joining the codes and the checks are vector work. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define WITH_AVX2 __attribute__((target_clones("avx2", "default")))
#else
#define WITH_AVX2
#endif

typedef struct {
    const uint8_t *data;
    Py_ssize_t length; /* elements */
    int width;         /* bytes of an element, 1 or 2 */
} Codes;

static Codes codes_of(const Py_buffer *buffer, int width) {
    Codes codes = {buffer->buf, buffer->len / width, width};
    return codes;
}

static inline uint32_t code_at(Codes codes, Py_ssize_t i) {
    uint16_t two;
    if (codes.width == 1) return codes.data[i];
    memcpy(&two, codes.data + 2 * i, 2);
    return two;
}

/* Sum of the row lengths, or -1 where one is above `most`. */
static Py_ssize_t total_of(Codes n_L, uint32_t most) {
    Py_ssize_t total = 0;
    for (Py_ssize_t r = 0; r < n_L.length; r++) {
        uint32_t n = code_at(n_L, r);
        if (n > most) return -1;
        total += n;
    }
    return total;
}

WITH_AVX2 static void join_codes(const Py_buffer *low, const Py_buffer *high, int planes, Py_ssize_t entries, uint32_t *code_E) {
    const uint8_t *low_E = low->buf;
    for (Py_ssize_t i = 0; i < entries; i++) {
        uint16_t two;
        memcpy(&two, low_E + 2 * i, 2);
        code_E[i] = two;
    }
    for (int plane = 0; plane < planes; plane++) {
        const uint8_t *bits = (const uint8_t *)high->buf + plane * (high->len / planes);
        Py_ssize_t i = 0;
        for (; i + 8 <= entries; i += 8) {
            uint32_t byte = bits[i >> 3];
            for (int k = 0; k < 8; k++) code_E[i + k] |= ((byte >> k) & 1u) << (16 + plane);
        }
        for (; i < entries; i++) code_E[i] |= ((uint32_t)(bits[i >> 3] >> (i & 7)) & 1u) << (16 + plane);
    }
}

WITH_AVX2 static int all_below(const uint32_t *value_E, Py_ssize_t entries, uint32_t limit) {
    uint32_t most = 0;
    for (Py_ssize_t i = 0; i < entries; i++) most = value_E[i] > most ? value_E[i] : most;
    return entries == 0 || most < limit;
}

typedef struct {
    Py_buffer n, low, high, ids, weights, offsets;
    int planes;
    uint32_t vocab, draws;
} Entries;

/* Whether the buffers hold `entries` entries, and the ids' codes joined if so. */
static int joined(const Entries *e, Codes n_L, Py_ssize_t entries) {
    if (entries < 0 || entries * 2 > e->low.len || entries * 4 > e->ids.len || entries * 4 > e->weights.len) return 0;
    if (n_L.length * 8 != e->offsets.len) return 0;
    if (e->planes && (e->high.len % e->planes || entries > e->high.len / e->planes * 8)) return 0;
    join_codes(&e->low, &e->high, e->planes, entries, e->ids.buf);
    return 1;
}

static Py_ssize_t unpack_counts(const Entries *e, int64_t first, Codes count_H, const float *weight_of_count) {
    Codes n_L = codes_of(&e->n, e->draws + 1 <= 255 ? 1 : 2);
    Py_ssize_t entries = total_of(n_L, e->draws), i = 0, h = 0;
    if (!joined(e, n_L, entries)) return -1;
    uint32_t *id_E = e->ids.buf;
    float *weight_E = e->weights.buf;
    int64_t *end_L = e->offsets.buf;
    const float once = weight_of_count[1];
    for (i = 0; i < entries; i++) weight_E[i] = once; /* a vector's work; the heads' are written over */
    i = 0;
    for (Py_ssize_t r = 0; r < n_L.length; r++) {
        Py_ssize_t n = code_at(n_L, r), end = i + n;
        int64_t repeats = n ? (int64_t)e->draws - n : 0; /* what the counts above 1 add up to, less one each */
        for (; repeats > 0; i++, h++) {
            if (i == end || h == count_H.length) return -1;
            uint32_t count = code_at(count_H, h);
            if (count < 2 || count > e->draws) return -1;
            repeats -= count - 1;
            weight_E[i] = weight_of_count[count];
        }
        if (repeats < 0) return -1;
        uint32_t id = 0;
        for (; i < end; i++) {
            id += id_E[i];
            id_E[i] = id;
        }
        end_L[r] = first + end;
    }
    for (; h < count_H.length; h++)
        if (code_at(count_H, h)) return -1;
    return all_below(id_E, entries, e->vocab) ? entries : -1;
}

typedef struct {
    Codes head_L, tail_L, head_H, tail_T; /* n_head, tail, logp_head, logp_tail; the last may be empty */
    const int64_t *head_units, *tail_units;
    const float *logp_of_code; /* NULL: log-probabilities are not wanted */
    float *logp_E;
    Py_ssize_t tail_codes;
} Threshold;

static Py_ssize_t unpack_threshold(const Entries *e, int64_t first, const Threshold *t) {
    Codes n_L = codes_of(&e->n, e->draws + 1 <= 255 ? 1 : 2);
    Py_ssize_t entries = total_of(n_L, e->draws + 1), i = 0, h = 0, tails = 0;
    if (t->head_L.length != n_L.length || t->tail_L.length != n_L.length || !joined(e, n_L, entries)) return -1;
    uint32_t *id_E = e->ids.buf;
    float *weight_E = e->weights.buf;
    int64_t *end_L = e->offsets.buf;
    for (Py_ssize_t r = 0; r < n_L.length; r++) {
        int64_t n = code_at(n_L, r), head = code_at(t->head_L, r);
        Py_ssize_t start = i, end = i + n, head_end = i + head;
        uint32_t tail_code = code_at(t->tail_L, r);
        if (head > n || h + head > t->head_H.length || (Py_ssize_t)tail_code >= t->tail_codes) return -1;
        const int64_t many = n - head, tail = t->tail_units[tail_code];
        if ((many == 0 && tail > 0) || (head == 0 && n > 0 && tail != UNIT)) return -1;
        int64_t rest = UNIT - tail; /* what the row's first entry keeps in the end */
        for (; i < head_end; i++, h++) {
            uint32_t code = t->head_H.data[h];
            if (code < PIVOT) return -1;
            int64_t units = t->head_units[code - PIVOT];
            if (i > start) rest -= units;
            weight_E[i] = (float)units * (1.0f / UNIT);
            if (t->logp_of_code) t->logp_E[i] = t->logp_of_code[code];
        }
        if (head) {
            if (rest < 0) return -1;
            weight_E[start] = (float)rest * (1.0f / UNIT);
        }
        if (many) {
            const int64_t each = tail / many, extra_end = i + tail % many; /* the first few get one unit more */
            const float low = (float)each * (1.0f / UNIT), high = (float)(each + 1) * (1.0f / UNIT);
            uint32_t id = 0;
            for (; i < end; i++) {
                id += id_E[i];
                id_E[i] = id;
                weight_E[i] = i < extra_end ? high : low;
            }
            if (t->logp_of_code && t->tail_T.length) {
                if (tails + many > t->tail_T.length) return -1;
                for (int64_t k = 0; k < many; k++) t->logp_E[head_end + k] = t->logp_of_code[t->tail_T.data[tails + k]];
            } else if (t->logp_of_code) {
                for (int64_t k = 0; k < many; k++) t->logp_E[head_end + k] = Py_NAN;
            }
            tails += many;
        }
        end_L[r] = first + end;
    }
    return all_below(id_E, entries, e->vocab) ? entries : -1;
}

/* Profile `fast`: rows that are stored decoded are copied and checked. */
WITH_AVX2 static Py_ssize_t copy_plain(const Entries *e, int64_t first, const uint8_t *id, const uint8_t *weight,
                                       Py_ssize_t id_bytes, Py_ssize_t weight_bytes) {
    Codes n_L = codes_of(&e->n, e->draws + 1 <= 255 ? 1 : 2);
    Py_ssize_t entries = total_of(n_L, e->draws + 1), bytes = entries * 4;
    if (entries < 0 || bytes > id_bytes || bytes > weight_bytes || bytes > e->ids.len || bytes > e->weights.len) return -1;
    if (n_L.length * 8 != e->offsets.len) return -1;
    int64_t *end_L = e->offsets.buf, end = first;
    for (Py_ssize_t r = 0; r < n_L.length; r++) end_L[r] = end += code_at(n_L, r);
    uint32_t *id_E = e->ids.buf, *weight_E = e->weights.buf, top_id = 0, top_weight = 0;
    for (Py_ssize_t i = 0; i < entries; i++) {
        uint32_t word;
        memcpy(&word, id + 4 * i, 4);
        id_E[i] = word;
        top_id = word > top_id ? word : top_id;
    }
    for (Py_ssize_t i = 0; i < entries; i++) {
        uint32_t word; /* bits of a float: below those of infinity, it is neither negative, infinite nor NaN */
        memcpy(&word, weight + 4 * i, 4);
        weight_E[i] = word;
        top_weight = word > top_weight ? word : top_weight;
    }
    return entries == 0 || (top_id < e->vocab && top_weight < 0x7f800000u) ? entries : -1;
}

static PyObject *answer(Py_ssize_t entries, Py_buffer *const *held, int many) {
    for (int i = 0; i < many; i++) PyBuffer_Release(held[i]);
    return PyLong_FromSsize_t(entries);
}

/* counts(draws, vocab, planes, first, n, id_lo, id_hi, count, weight_of_count, offsets, ids, weights) -> entries or -1 */
static PyObject *py_counts(PyObject *self, PyObject *arguments) {
    Entries e;
    Py_buffer count, table;
    long long first;
    if (!PyArg_ParseTuple(arguments, "IIiLy*y*y*y*y*w*w*w*", &e.draws, &e.vocab, &e.planes, &first, &e.n, &e.low, &e.high,
                          &count, &table, &e.offsets, &e.ids, &e.weights))
        return NULL;
    Py_ssize_t entries = -1;
    Py_BEGIN_ALLOW_THREADS
    if ((uint64_t)table.len > (uint64_t)e.draws * 4) /* holds a weight for every count up to N */
        entries = unpack_counts(&e, first, codes_of(&count, e.draws <= 255 ? 1 : 2), table.buf);
    Py_END_ALLOW_THREADS
    Py_buffer *held[] = {&e.n, &e.low, &e.high, &count, &table, &e.offsets, &e.ids, &e.weights};
    return answer(entries, held, 8);
}

/* threshold(draws, vocab, planes, first, n, id_lo, id_hi, n_head, logp_head, logp_tail, tail, head_units, tail_units,
 *           logp_of_code, offsets, ids, weights, logp) -> entries or -1; empty logp_of_code and logp: not wanted */
static PyObject *py_threshold(PyObject *self, PyObject *arguments) {
    Entries e;
    Py_buffer head, logp_head, logp_tail, tail, head_units, tail_units, table, logp;
    long long first;
    if (!PyArg_ParseTuple(arguments, "IIiLy*y*y*y*y*y*y*y*y*y*w*w*w*w*", &e.draws, &e.vocab, &e.planes, &first, &e.n, &e.low,
                          &e.high, &head, &logp_head, &logp_tail, &tail, &head_units, &tail_units, &table, &e.offsets,
                          &e.ids, &e.weights, &logp))
        return NULL;
    Py_ssize_t entries = -1;
    Py_BEGIN_ALLOW_THREADS
    Threshold t;
    t.tail_codes = tail_units.len / 8;
    t.head_L = codes_of(&head, e.draws + 1 <= 255 ? 1 : 2);
    t.tail_L = codes_of(&tail, t.tail_codes <= 256 ? 1 : 2);
    t.head_H = codes_of(&logp_head, 1);
    t.tail_T = codes_of(&logp_tail, 1);
    t.head_units = head_units.buf;
    t.tail_units = tail_units.buf;
    t.logp_of_code = table.len ? table.buf : NULL;
    t.logp_E = logp.buf;
    if (head_units.len == (256 - PIVOT) * 8 && (!table.len || (table.len == 256 * 4 && logp.len >= e.ids.len)))
        entries = unpack_threshold(&e, first, &t);
    Py_END_ALLOW_THREADS
    Py_buffer *held[] = {&e.n,  &e.low,      &e.high,     &head,  &logp_head, &logp_tail, &tail,
                         &head_units, &tail_units, &table, &e.offsets, &e.ids, &e.weights, &logp};
    return answer(entries, held, 14);
}

/* plain(draws, vocab, first, n, id, weight, offsets, ids, weights) -> entries or -1 */
static PyObject *py_plain(PyObject *self, PyObject *arguments) {
    Entries e;
    Py_buffer id, weight;
    long long first;
    if (!PyArg_ParseTuple(arguments, "IILy*y*y*w*w*w*", &e.draws, &e.vocab, &first, &e.n, &id, &weight, &e.offsets, &e.ids,
                          &e.weights))
        return NULL;
    Py_ssize_t entries;
    Py_BEGIN_ALLOW_THREADS
    entries = copy_plain(&e, first, id.buf, weight.buf, id.len, weight.len);
    Py_END_ALLOW_THREADS
    Py_buffer *held[] = {&e.n, &id, &weight, &e.offsets, &e.ids, &e.weights};
    return answer(entries, held, 6);
}

static PyMethodDef methods[] = {
    {"counts", py_counts, METH_VARARGS, "Unpack a sequence of counts; how many entries, or -1."},
    {"threshold", py_threshold, METH_VARARGS, "Unpack a sequence of threshold targets; how many entries, or -1."},
    {"plain", py_plain, METH_VARARGS, "Copy and check a sequence stored decoded; how many entries, or -1."},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_unpack", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__unpack(void) { return PyModule_Create(&module); }
