/* The samplers of stage one on a CPU: rows of logits to picked entries, a row at a time while it lies in the cache.
 *
 * The same in PyTorch is reference.py with weights.py and draw.py, which is the definition, and is what runs where this was
 * not compiled. Every float is computed by the same single-precision operations in the same order (no contraction, no library
 * exponential), and everything after that is whole numbers, so the entries are the same bits. Sums of doubles are vectorised:
 * they are whole and stay below 2^53 in a block, so every order of them is exact.
 *
 * V vocabulary, N rows, B blocks of a row, D draws, E entries. Buffers are contiguous; their lengths are compared before the
 * first row, and no label is used before it was compared with V (the ids come from here).
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 128 /* ids; results do not depend on it */
#define LANES 16  /* of a block */
#define EXACT 8192 /* ids whose weights, and moments, sum to less than 2^53 */
#define MAX_DRAWS 4096
#define MAX_VOCAB (1 << 22)
#define RATE 1.4426950408889634f
#define LOWEST 0xc2200000u /* bits of -40.0f */
#define ROUND (12582912.0f + 30.0f) /* weights.py: ROUND, with _EXPONENT */
#define INFINITE 0x7f800000         /* bits */

#define STREAM_DRAWS 0
enum { THRESHOLD, SYSTEMATIC, STRATIFIED, RANDOM, KINDS };

/* `run` is compiled for wider vectors too, with all that is INLINE, and the processor is asked which it has. */
#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#define FETCH(address) __builtin_prefetch(address, 0, 2) /* into the second level; no address is wrong */
#else
#define INLINE static inline
#define FETCH(address)
#endif
enum { PLAIN, SSE41, AVX2, AVX512 };

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Largest logit of a row, or NaN where there is a NaN. Signed integers are ordered as the floats they hold once the low
 * bits of negative ones are flipped. */
INLINE float peak(const float *logit_V, int vocab) {
    int32_t most = INT32_MIN, size = 0;
#pragma omp simd reduction(max : most, size)
    for (int i = 0; i < vocab; i++) {
        const int32_t bits = (int32_t)bits_of(logit_V[i]), low = bits & 0x7fffffff;
        const int32_t key = bits ^ (bits >> 31 & 0x7fffffff);
        most = key > most ? key : most;
        size = low > size ? low : size;
    }
    return size > INFINITE ? NAN : float_of((uint32_t)(most ^ (most >> 31 & 0x7fffffff)));
}

/* Weights of LANES ids (Weigher, in its order), added to the sums of their lanes; the moment's are of ceil(-t * weight), below 0.
 * Where to is from, too, a logit is read before its weight is written. */
INLINE void weigh_lanes(const float *logit_L, float top, float *weight_L, double *sum_L, double *moment_L) {
#pragma omp simd
    for (int lane = 0; lane < LANES; lane++) {
        const uint32_t size = bits_of((logit_L[lane] - top) * RATE); /* of a float <= 0: ordered by how far below it is */
        const float power = float_of(size < LOWEST ? size : LOWEST);
        const float scale = power + ROUND, fraction = power - (scale - ROUND);
        float weight = fraction + 7.28775691986084f;
        weight = weight * fraction + 41.8088264465332f;
        weight = weight * fraction + 180.93829345703125f;
        weight = weight * fraction + 522.0889282226562f;
        weight = weight * fraction + 753.2153930664062f;
        weight = floorf(float_of(bits_of(weight) + (bits_of(scale) << 23)));
        weight_L[lane] = weight;
        sum_L[lane] += (double)weight;
        moment_L[lane] += (double)floorf(power * weight);
    }
}

/* Of the lanes, which are set back to zero. */
INLINE int64_t taken_sum(double *sum_L) {
    double sum_H[LANES / 2];
#pragma omp simd
    for (int lane = 0; lane < LANES / 2; lane++) sum_H[lane] = sum_L[lane] + sum_L[lane + LANES / 2];
    memset(sum_L, 0, LANES * sizeof *sum_L);
    return (int64_t)(((sum_H[0] + sum_H[4]) + (sum_H[1] + sum_H[5])) + ((sum_H[2] + sum_H[6]) + (sum_H[3] + sum_H[7])));
}

/* Weights of a row, zeros up to the next LANES, and sums of its blocks; gives the sum of ceil(-t * weight). `logit_V` may be
 * `weight_V`. Meanwhile the next row is fetched, `ahead` bytes an id. */
INLINE int64_t weigh(const float *logit_V, int vocab, float top, float *weight_V, int64_t *block_B, const char *next,
                     int ahead) {
    double sum_L[LANES] = {0}, moment_L[LANES] = {0};
    int64_t moment = 0;
    for (int i = 0, block = 0; i < vocab; block++) {
        const int stop = vocab - i < BLOCK ? vocab : i + BLOCK;
        for (; i + LANES <= stop; i += LANES) {
            FETCH(next + (size_t)i * (size_t)ahead);
            weigh_lanes(logit_V + i, top, weight_V + i, sum_L, moment_L);
        }
        if (i < stop) {
            float rest_L[LANES];
            for (int lane = 0; lane < LANES; lane++) rest_L[lane] = i + lane < stop ? logit_V[i + lane] : -INFINITY;
            weigh_lanes(rest_L, top, weight_V + i, sum_L, moment_L);
            i = stop;
        }
        block_B[block] = taken_sum(sum_L);
        if (i % EXACT == 0 || i == vocab) moment -= taken_sum(moment_L);
    }
    return moment;
}

/* philox.py: two 64-bit draws of a counter. */
static void philox(uint64_t seed, uint32_t pair, uint64_t sequence, uint64_t row, uint64_t word[2]) {
    uint32_t c0 = pair, c1 = (uint32_t)((sequence & 0xff) << 24 | row), c2 = (uint32_t)(sequence >> 8), c3 = STREAM_DRAWS;
    uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        const uint64_t even = (uint64_t)c0 * 0xD2511F53u, odd = (uint64_t)c2 * 0xCD9E8D57u;
        c0 = (uint32_t)(odd >> 32) ^ c1 ^ key0;
        c1 = (uint32_t)odd;
        c2 = (uint32_t)(even >> 32) ^ c3 ^ key1;
        c3 = (uint32_t)even;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    word[0] = (uint64_t)c1 << 32 | c0;
    word[1] = (uint64_t)c3 << 32 | c2;
}

/* Uniform in [0, bound). */
static inline uint64_t scaled(uint64_t word, uint64_t bound) { return (uint64_t)((unsigned __int128)word * bound >> 64); }

static int ascending(const void *a, const void *b) {
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static void sort(uint64_t *value, int count) {
    if (count > 64) {
        qsort(value, (size_t)count, sizeof *value, ascending);
        return;
    }
    for (int k = 1; k < count; k++) {
        const uint64_t moved = value[k];
        int j = k;
        for (; j > 0 && value[j - 1] > moved; j--) value[j] = value[j - 1];
        value[j] = moved;
    }
}

/* Weight descending, then id: the ascending order of these. */
static inline uint64_t key_of(float weight, int id) { return (uint64_t)~bits_of(weight) << 32 | (uint32_t)id; }
static inline float weight_of(uint64_t key) { return float_of(~(uint32_t)(key >> 32)); }

typedef struct {
    int kind, draws, vocab, half, most; /* half: bfloat16; most: entries of a row */
    uint64_t seed;
    Py_ssize_t rows;
    const void *logits;
    const int64_t *label_N, *sequence_N, *row_N;
    /* out, of entries */
    int64_t *row_E;
    int32_t *id_E;
    float *weight_E, *logit_E;
    uint8_t *sampled_E;
    /* out, of rows */
    float *top_N, *label_logit_N;
    int64_t *total_N, *moment_N;
} Job;

/* A row in work. */
typedef struct {
    float *weight_V;
    int64_t *block_B;
    uint64_t *point_D, *key_D;
} Room;

static inline float logit_at(const Job *job, Py_ssize_t n, int id) {
    const size_t place = (size_t)n * (size_t)job->vocab + (size_t)id;
    return job->half ? float_of((uint32_t)((const uint16_t *)job->logits)[place] << 16) : ((const float *)job->logits)[place];
}

static void put(const Job *job, Py_ssize_t entry, Py_ssize_t n, int id, float weight, int sampled) {
    job->row_E[entry] = n;
    job->id_E[entry] = id;
    job->weight_E[entry] = weight;
    job->logit_E[entry] = logit_at(job, n, id);
    job->sampled_E[entry] = (uint8_t)sampled;
}

/* Ids of points that ascend and are below the sum of the blocks. */
typedef struct {
    const float *weight_V;
    const int64_t *block_B;
    int64_t end, lanes_end, block_end; /* of what lies before the next of each */
    int id, lanes, block;              /* the next id, the first id of the next LANES, the next block */
} Walk;

INLINE int next_id(Walk *walk, int64_t point) {
    if (point >= walk->block_end) {
        do {
            walk->lanes_end = walk->block_end;
            walk->block_end += walk->block_B[walk->block++];
        } while (point >= walk->block_end);
        walk->lanes = (walk->block - 1) * BLOCK;
    }
    if (point >= walk->lanes_end) {
        do {
            double sum = 0.0;
            const float *weight_L = walk->weight_V + walk->lanes; /* zeros behind the last id */
#pragma omp simd reduction(+ : sum)
            for (int lane = 0; lane < LANES; lane++) sum += (double)weight_L[lane];
            walk->end = walk->lanes_end;
            walk->lanes_end += (int64_t)sum;
            walk->lanes += LANES;
        } while (point >= walk->lanes_end);
        walk->id = walk->lanes - LANES;
    }
    while (walk->end <= point) walk->end += (int64_t)walk->weight_V[walk->id++];
    return walk->id - 1;
}

/* floor((step * total + offset) / many) for steps one after another. */
typedef struct {
    int64_t whole, over, many, point, rest;
} Steps;

static Steps steps_of(int64_t total, int64_t many, int64_t offset) {
    return (Steps){total / many, total % many, many, offset / many, offset % many};
}

static inline int64_t next_point(Steps *steps) {
    const int64_t point = steps->point;
    steps->point += steps->whole;
    steps->rest += steps->over;
    if (steps->rest >= steps->many) {
        steps->rest -= steps->many;
        steps->point++;
    }
    return point;
}

/* Ids of at least `least` to `key_D`, and out of the weights and the blocks; how many. No more than `draws` weigh so much. */
INLINE int take_heads(const Job *job, const Room *room, int64_t total, int64_t least, int64_t *tail) {
    const float nearest = (float)least;
    const float lightest = (double)nearest < (double)least ? nextafterf(nearest, INFINITY) : nearest;
    int heads = 0;
    *tail = total;
    for (int start = 0; start < job->vocab; start += LANES) {
        if (room->block_B[start / BLOCK] < least) { /* lighter than any head */
            start += BLOCK - LANES - start % BLOCK;
            continue;
        }
        float *weight_L = room->weight_V + start;
        int any = 0;
#pragma omp simd reduction(| : any)
        for (int lane = 0; lane < LANES; lane++) any |= weight_L[lane] >= lightest;
        for (int lane = 0; any && lane < LANES; lane++) {
            const float weight = weight_L[lane];
            if (weight < lightest) continue;
            room->key_D[heads++] = key_of((float)((double)weight / (double)total), start + lane);
            room->block_B[start / BLOCK] -= (int64_t)weight;
            *tail -= (int64_t)weight;
            weight_L[lane] = 0.0f;
        }
    }
    return heads;
}

/* draw.threshold; entries in all. */
INLINE Py_ssize_t threshold(const Job *job, const Room *room, Py_ssize_t n, int64_t total, Py_ssize_t entry) {
    int64_t tail;
    const int64_t draws = job->draws;
    const int heads = take_heads(job, room, total, (total + draws - 1) / draws, &tail);
    sort(room->key_D, heads);
    for (int k = 0; k < heads; k++)
        put(job, entry++, n, (int)(uint32_t)room->key_D[k], weight_of(room->key_D[k]), 0);
    if (!tail) return entry;

    int64_t many = (int64_t)((unsigned __int128)draws * (uint64_t)tail / (uint64_t)total);
    if (many < 1) many = 1;
    uint64_t word[2];
    philox(job->seed, 0, (uint64_t)job->sequence_N[n], (uint64_t)job->row_N[n], word);
    Steps steps = steps_of(tail, many, (int64_t)scaled(word[0], (uint64_t)tail));
    Walk walk = {.weight_V = room->weight_V, .block_B = room->block_B};
    const float weight = (float)((double)tail / (double)total / (double)many);
    for (int64_t j = 0; j < many; j++) put(job, entry++, n, next_id(&walk, next_point(&steps)), weight, 1);
    return entry;
}

/* The points of draw.counts, ascending. */
static void points_of(const Job *job, const Room *room, Py_ssize_t n, int64_t total) {
    const uint64_t sequence = (uint64_t)job->sequence_N[n], row = (uint64_t)job->row_N[n];
    const int draws = job->draws;
    uint64_t word[2];
    if (job->kind == SYSTEMATIC) {
        philox(job->seed, 0, sequence, row, word);
        Steps steps = steps_of(total, draws, (int64_t)scaled(word[0], (uint64_t)total));
        for (int j = 0; j < draws; j++) room->point_D[j] = (uint64_t)next_point(&steps);
        return;
    }
    Steps steps = steps_of(total, draws, 0);
    for (int j = 0; j < draws; j++) {
        if (j % 2 == 0) philox(job->seed, (uint32_t)(j / 2), sequence, row, word);
        const uint64_t offset = scaled(word[j % 2], (uint64_t)total);
        if (job->kind == RANDOM) {
            room->point_D[j] = offset;
            continue;
        }
        const uint64_t rest = (uint64_t)steps.rest; /* of j * total, before it is divided */
        room->point_D[j] = (uint64_t)next_point(&steps) + (rest + offset) / (uint64_t)draws;
    }
    if (job->kind == RANDOM) sort(room->point_D, draws);
}

/* draw.counts; entries in all. */
INLINE Py_ssize_t counts(const Job *job, const Room *room, Py_ssize_t n, int64_t total, Py_ssize_t entry) {
    points_of(job, room, n, total);
    Walk walk = {.weight_V = room->weight_V, .block_B = room->block_B};
    int ids = 0, last = -1, count = 0;
    for (int j = 0; j <= job->draws; j++) {
        const int id = j < job->draws ? next_id(&walk, (int64_t)room->point_D[j]) : -1;
        if (id != last && count) {
            room->key_D[ids++] = key_of((float)((double)count / job->draws), last);
            count = 0;
        }
        last = id;
        count++;
    }
    sort(room->key_D, ids);
    for (int k = 0; k < ids; k++) put(job, entry++, n, (int)(uint32_t)room->key_D[k], weight_of(room->key_D[k]), 0);
    return entry;
}

/* Entries in all; -2 - n for the first row n that can not be sampled; -1 where something does not fit. */
INLINE Py_ssize_t run(const Job *job, const Room *room) {
    const int bytes = job->half ? 2 : 4, blocks = (job->vocab + BLOCK - 1) / BLOCK;
    const char *row = job->logits;
    Py_ssize_t entry = 0;
    for (Py_ssize_t n = 0; n < job->rows; n++) {
        const char *next = n + 1 < job->rows ? row + (size_t)job->vocab * (size_t)bytes : row;
        const float *logit_V = job->half ? room->weight_V : (const float *)row;
        if (job->half)
            for (int i = 0; i < job->vocab; i++) room->weight_V[i] = float_of((uint32_t)((const uint16_t *)row)[i] << 16);
        const float top = peak(logit_V, job->vocab);
        if (!isfinite(top)) return -2 - n;
        const int64_t label = job->label_N[n] < 0 ? 0 : job->label_N[n];
        if (label >= job->vocab) return -1;
        job->label_logit_N[n] = logit_at(job, n, (int)label);
        job->top_N[n] = top;
        job->moment_N[n] = weigh(logit_V, job->vocab, top, room->weight_V, room->block_B, next, bytes);
        int64_t total = 0;
        for (int b = 0; b < blocks; b++) total += room->block_B[b];
        job->total_N[n] = total;
        entry = job->kind == THRESHOLD ? threshold(job, room, n, total, entry) : counts(job, room, n, total, entry);
        row = next;
    }
    return entry;
}

static Py_ssize_t run_plain(const Job *job, const Room *room) { return run(job, room); }

#if defined(__x86_64__) && defined(__GNUC__)
#define FOR(features) __attribute__((target(features))) static Py_ssize_t
FOR("sse4.1") run_sse41(const Job *job, const Room *room) { return run(job, room); }
FOR("avx2") run_avx2(const Job *job, const Room *room) { return run(job, room); }
FOR("avx512f,avx512dq,avx512vl") run_avx512(const Job *job, const Room *room) { return run(job, room); }

static Py_ssize_t run_as_wide(const Job *job, const Room *room, int widest) {
    if (widest >= AVX512 && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return run_avx512(job, room);
    if (widest >= AVX2 && __builtin_cpu_supports("avx2")) return run_avx2(job, room);
    if (widest >= SSE41 && __builtin_cpu_supports("sse4.1")) return run_sse41(job, room);
    return run_plain(job, room);
}
#else
static Py_ssize_t run_as_wide(const Job *job, const Room *room, int widest) { return run_plain(job, room); }
#endif

static int fits(const Job *job, const Py_buffer *in, const Py_buffer *entries, const Py_buffer *rows) {
    static const int entry_bytes[] = {8, 4, 4, 4, 1}, row_bytes[] = {4, 4, 8, 8};
    if (job->kind < 0 || job->kind >= KINDS || job->draws < 1 || job->draws > MAX_DRAWS || job->vocab < 1 ||
        job->vocab > MAX_VOCAB || job->rows > INT32_MAX)
        return 0;
    if (in[0].len != job->rows * job->vocab * (job->half ? 2 : 4)) return 0;
    for (int k = 1; k < 4; k++)
        if (in[k].len != job->rows * 8) return 0;
    for (int k = 0; k < 5; k++)
        if (entries[k].len / entry_bytes[k] < job->rows * job->most) return 0;
    for (int k = 0; k < 4; k++)
        if (rows[k].len / row_bytes[k] < job->rows) return 0;
    return 1;
}

/* sample(widest, kind, draws, vocab, half, seed, logits, labels, sequences, rows,
 *        row_E, id_E, weight_E, logit_E, sampled_E, top_N, label_logit_N, total_N, moment_N) -> see `run` */
static PyObject *py_sample(PyObject *self, PyObject *arguments) {
    Job job;
    unsigned long long seed;
    int widest;
    Py_buffer in[4], entries[5], rows[4];
    if (!PyArg_ParseTuple(arguments, "iiiipKy*y*y*y*w*w*w*w*w*w*w*w*w*", &widest, &job.kind, &job.draws, &job.vocab,
                          &job.half, &seed, &in[0], &in[1], &in[2], &in[3], &entries[0], &entries[1], &entries[2], &entries[3], &entries[4],
                          &rows[0], &rows[1], &rows[2], &rows[3]))
        return NULL;
    Py_ssize_t done = -1;
    int memory = 1;
    Py_BEGIN_ALLOW_THREADS
    job.seed = seed;
    job.rows = in[1].len / 8;
    job.most = job.draws < job.vocab ? job.draws + 1 : job.vocab;
    job.logits = in[0].buf;
    job.label_N = in[1].buf, job.sequence_N = in[2].buf, job.row_N = in[3].buf;
    job.row_E = entries[0].buf, job.id_E = entries[1].buf, job.weight_E = entries[2].buf;
    job.logit_E = entries[3].buf, job.sampled_E = entries[4].buf;
    job.top_N = rows[0].buf, job.label_logit_N = rows[1].buf, job.total_N = rows[2].buf, job.moment_N = rows[3].buf;
    if (fits(&job, in, entries, rows)) {
        const size_t blocks = ((size_t)job.vocab + BLOCK - 1) / BLOCK, draws = (size_t)job.draws + 1;
        Room room = {malloc(sizeof(float) * ((size_t)job.vocab + LANES)), malloc(sizeof(int64_t) * blocks),
                     malloc(sizeof(uint64_t) * draws), malloc(sizeof(uint64_t) * draws)};
        memory = room.weight_V && room.block_B && room.point_D && room.key_D;
        if (memory) done = run_as_wide(&job, &room, widest);
        free(room.weight_V), free(room.block_B), free(room.point_D), free(room.key_D);
    }
    Py_END_ALLOW_THREADS
    for (int k = 0; k < 4; k++) PyBuffer_Release(&in[k]);
    for (int k = 0; k < 5; k++) PyBuffer_Release(&entries[k]);
    for (int k = 0; k < 4; k++) PyBuffer_Release(&rows[k]);
    return memory ? PyLong_FromSsize_t(done) : PyErr_NoMemory();
}

static PyMethodDef methods[] = {
    {"sample", py_sample, METH_VARARGS, "Sample rows; how many entries, -2 - n for a bad row n, -1 where a buffer does not fit."},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_rows", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__rows(void) { return PyModule_Create(&module); }
