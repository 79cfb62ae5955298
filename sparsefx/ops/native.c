/* Masks, split and merge of many weights in one call, on the CPU. sparsefx/ops/native.py states the contract.
 *
 * No Python and no torch headers: loaded with ctypes. Threads are made for each call and end with it, so that nothing
 * spins beside torch's own threads and a forked process owes nothing to threads that it does not have. */

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "compiler.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "masks are written as little-endian words; plain torch does the work on this platform"
#endif

enum { FLOAT16, BFLOAT16, FLOAT32, FLOAT64 };
enum { KEEP_MASK, N_OF_M, TWO_OF_FOUR_BLOCKS, THRESHOLD, MERGE, PENALIZE };
enum { MAX_AXES = 6, MAX_M = 16 };
enum {
    TILE = 8192,       /* words that one thread takes at a time: they stay in its inner caches through all loops */
    NEAR_GROUP = 4096, /* longest N:M group, in words of memory, that is treated as near */
    FAR_LANES = 256,
    COUNTED = 4096,
    LOOKED_AT = 1024, /* words that stay in the innermost cache for a second loop */
    BINS = 1 << 16,
    PARALLEL_SELECTION = 1 << 20, /* smaller groups are one thread's work */
};

#define WORD uint16_t
#define NAME(function) function##_16
#include "native_kernels.h"
#undef WORD
#undef NAME
#define WORD uint32_t
#define NAME(function) function##_32
#include "native_kernels.h"
#undef WORD
#undef NAME
#define WORD uint64_t
#define NAME(function) function##_64
#include "native_kernels.h"
#undef WORD
#undef NAME
#include "native_blocks.h"
#include "native_compact.h"

/* Both structures are written by native.py: 8-byte fields only. */
typedef struct {
    void *weight;
    uint8_t *mask;
    void *dormant;    /* the words that the mask leaves out, in the order of memory, or NULL; PENALIZE: all weights, read only, beside
                         gradients in `weight` */
    uint8_t *reached; /* PENALIZE, and KEEP_MASK: which weights a step may change; NULL for all */
    int64_t held;     /* how many words are dormant; -1 where none are kept. `dormant` may be NULL where there are 0 */
    int64_t count, format, kind;
    int64_t n, m, inner;                                   /* N_OF_M and blocks: words from one member to the next */
    int64_t slow_size, slow_stride, fast_size, transposed; /* blocks: the two axes by stride; transposed where axis 1 is slow */
    int64_t write;                                         /* 0: choose masks, leave weights alone */
    double scale;                                          /* of dormant values, 1 or 0 for 16-bit formats; PENALIZE: of all weights */
    double more;                                           /* PENALIZE: of dormant ones, on top */
    int64_t group;                                         /* THRESHOLD: which group */
    int64_t axes, sizes[MAX_AXES], strides[MAX_AXES];      /* axes: 0 where memory is in row-major order */
} job_t;

typedef struct {
    int64_t first, jobs; /* consecutive jobs of one format */
    int64_t keep;
    double hint;      /* NaN for none */
    double threshold; /* out: for FLOAT32 and FLOAT64, else NaN */
} group_t;

typedef struct {
    uint64_t lo, threshold;
    int64_t count, greater, equal;
    int shift, bits, word_bits, step_bits, from_hint, done;
} selection_t;

typedef struct {
    int64_t job, start, stop; /* in units of the job's kind; job -1 - g is the whole of group g */
    int64_t offset, left;     /* KEEP_MASK and MERGE: dormant words in front of it and in it */
} item_t;

typedef struct {
    job_t *jobs;
    group_t *groups;
    int64_t job_count, group_count, item_count;
    item_t *items;
    int64_t *cutoffs; /* THRESHOLD: equal words in front of it participate; -1 where the mask is complete already */
    uint64_t *thresholds;
    int64_t *large; /* groups that all threads select together */
    int64_t large_count;
    selection_t selection;
    int64_t above;
    atomic_llong next;
    atomic_int non_finite;
    int threads, waiting, generation, open;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct worker *workers;
} work_t;

typedef struct worker {
    work_t *work;
    uint32_t *histogram;
    uint8_t *scratch, *place;
    uint64_t *values; /* room for a tile and SPARE */
    int64_t place_inner, place_m, above;
} worker_t;

static const uint64_t INFINITY_BITS[] = {0x7c00, 0x7f80, 0x7f800000, 0x7ff0000000000000};
static const int WORD_SIZE[] = {2, 2, 4, 8};

static ALWAYS_INLINE char *at(void *base, int64_t index, int64_t format) { return (char *)base + index * WORD_SIZE[format]; }

#define BY_SIZE(format, result, function, type, ...)                                                                                       \
    switch (WORD_SIZE[format]) {                                                                                                           \
    case 2: {                                                                                                                              \
        typedef uint16_t type;                                                                                                             \
        result function##_16(__VA_ARGS__);                                                                                                 \
        break;                                                                                                                             \
    }                                                                                                                                      \
    case 4: {                                                                                                                              \
        typedef uint32_t type;                                                                                                             \
        result function##_32(__VA_ARGS__);                                                                                                 \
        break;                                                                                                                             \
    }                                                                                                                                      \
    default: {                                                                                                                             \
        typedef uint64_t type;                                                                                                             \
        result function##_64(__VA_ARGS__);                                                                                                 \
    }                                                                                                                                      \
    }

static void meet(work_t *work)
{
    pthread_mutex_lock(&work->lock);
    int generation = work->generation;
    if (++work->waiting == work->threads) {
        work->waiting = 0;
        work->generation++;
        pthread_cond_broadcast(&work->changed);
    } else {
        while (work->generation == generation)
            pthread_cond_wait(&work->changed, &work->lock);
    }
    pthread_mutex_unlock(&work->lock);
}

static void look(work_t *work, const job_t *job, uint64_t worst)
{
    if (worst >= INFINITY_BITS[job->format])
        atomic_store_explicit(&work->non_finite, 1, memory_order_relaxed);
}

/* ---- multiplying dormant values, and separating ---- */

CLONES static void decay_float(float *restrict weight, const uint8_t *restrict mask, int64_t count, float scale)
{
    for (int64_t i = 0; i < count; i++) {
        float scaled = weight[i] * scale;
        weight[i] = mask[i] ? weight[i] : scaled;
    }
}

CLONES static void decay_double(double *restrict weight, const uint8_t *restrict mask, int64_t count, double scale)
{
    for (int64_t i = 0; i < count; i++) {
        double scaled = weight[i] * scale;
        weight[i] = mask[i] ? weight[i] : scaled;
    }
}

/* (gradient + scale * weight) + more * dormant, each product fused with its sum, where reached; zero elsewhere. */
CLONES static void penalize(float *restrict gradient, const float *restrict weight, const uint8_t *restrict mask,
                            const uint8_t *restrict reached, int64_t count, float scale, float more)
{
    for (int64_t i = 0; i < count; i++) {
        float value = weight[i], dormant = mask[i] ? 0.0f : value;
        float sum = fmaf(more, dormant, fmaf(scale, value, gradient[i]));
        gradient[i] = reached[i] ? sum : 0.0f;
    }
}

static void scale_dormant(work_t *work, const job_t *job, int64_t start, int64_t count)
{
    if (job->scale == 1)
        return;
    void *weight = at(job->weight, start, job->format);
    const uint8_t *mask = job->mask + start;
    uint64_t worst;
    if (job->scale == 0) {
        /* A NaN that is cleared here was seen all the same. */
        BY_SIZE(job->format, worst =, largest, word, (const word *)weight, count)
        look(work, job, worst);
        BY_SIZE(job->format, , clear_dormant, word, (word *)weight, mask, count)
    } else if (job->format == FLOAT32) {
        decay_float(weight, mask, count, (float)job->scale);
    } else {
        decay_double(weight, mask, count, job->scale);
    }
}

/* `offset`: dormant words in front of `start`. */
static void separate(worker_t *worker, const job_t *job, int64_t start, int64_t count, int64_t offset)
{
    if (!job->write)
        return;
    for (int64_t stop = start + count; start < stop; start += TILE) {
        int64_t length = stop - start < TILE ? stop - start : TILE, left;
        void *weight = at(job->weight, start, job->format);
        const uint8_t *mask = job->mask + start;
        uint64_t worst;
        if (job->held > 0) {
            BY_SIZE(job->format, left =, gather_fast, word, (const word *)weight, mask, (word *)worker->values, length)
            memcpy(at(job->dormant, offset, job->format), worker->values, (size_t)(left * WORD_SIZE[job->format]));
            offset += left;
        }
        if (job->held > 0)
            BY_SIZE(job->format, worst =, separate, word, (word *)weight, mask, length)
        else
            BY_SIZE(job->format, worst =, separate_if_needed, word, (word *)weight, mask, length)
        look(worker->work, job, worst);
    }
}

/* Dormant words of a piece, with spare ones behind them; those of the next piece may be changing. */
static const uint64_t *words_of(worker_t *worker, const job_t *job, const item_t *item)
{
    if (item->left > 0)
        memcpy(worker->values, at(job->dormant, item->offset, job->format), (size_t)(item->left * WORD_SIZE[job->format]));
    return worker->values;
}

static void merge(worker_t *worker, const job_t *job, const item_t *item)
{
    void *weight = at(job->weight, item->start, job->format);
    const uint8_t *mask = job->mask + item->start;
    const uint64_t *words = words_of(worker, job, item);
    BY_SIZE(job->format, , merge_fast, word, (word *)weight, mask, (const word *)words, item->stop - item->start)
}

/* What a step may not have changed goes back to its dormant word. */
static void restore(worker_t *worker, const job_t *job, const item_t *item)
{
    void *weight = at(job->weight, item->start, job->format);
    const uint8_t *mask = job->mask + item->start, *reached = job->reached + item->start;
    const uint64_t *words = words_of(worker, job, item);
    BY_SIZE(job->format, , restore, word, (word *)weight, mask, reached, (const word *)words, item->stop - item->start)
}

/* ---- N:M ---- */

static const uint8_t *places(worker_t *worker, int64_t inner, int64_t m)
{
    if (worker->place_inner != inner || worker->place_m != m) {
        uint8_t *to = worker->place;
        for (int64_t filled = 0; filled + m * inner <= TILE + NEAR_GROUP; filled += m * inner)
            for (int64_t member = 0; member < m; member++, to += inner)
                memset(to, (int)member, (size_t)inner);
        worker->place_inner = inner;
        worker->place_m = m;
    }
    return worker->place;
}

static void n_of_m(worker_t *worker, const job_t *job, int64_t first, int64_t last)
{
    int64_t group = job->m * job->inner, start = first * group, count = (last - first) * group;
    int n = (int)job->n, m = (int)job->m;
    void *weight = at(job->weight, start, job->format);
    uint8_t *mask = job->mask + start, *scratch = worker->scratch;
    scale_dormant(worker->work, job, start, count);
    if (group > NEAR_GROUP) {
        for (int64_t g = first; g < last; g++) {
            weight = at(job->weight, g * group, job->format);
            mask = job->mask + g * group;
            BY_SIZE(job->format, , n_of_m_far, word, (const word *)weight, mask, job->inner, n, m, scratch)
        }
    } else if (n == 2 && m == 4) {
        const uint8_t *place = places(worker, job->inner, m);
        BY_SIZE(job->format, , two_of_four_near, word, (const word *)weight, mask, place, count, job->inner, scratch)
    } else {
        const uint8_t *place = places(worker, job->inner, m);
        BY_SIZE(job->format, , n_of_m_near, word, (const word *)weight, mask, place, count, job->inner, n, m, scratch,
                scratch + TILE + NEAR_GROUP)
    }
    separate(worker, job, start, count, first * job->inner * (m - n));
}

/* ---- 2:4 transposable ---- */

static void blocks(worker_t *worker, const job_t *job, int64_t first, int64_t last)
{
    int64_t length = job->fast_size * job->inner, middle = job->slow_stride / length, quads = job->slow_size / 4;
    for (int64_t unit = first; unit < last; unit++) {
        int64_t quad = unit / middle % quads, outer = unit / middle / quads, rows[4];
        for (int i = 0; i < 4; i++) {
            rows[i] = (outer * job->slow_size + 4 * quad + i) * job->slow_stride + unit % middle * length;
            scale_dormant(worker->work, job, rows[i], length);
        }
        int transposed = (int)job->transposed;
        switch (job->format) {
        case FLOAT16:
            four_rows_float16(job->weight, job->mask, rows, length, job->inner, transposed);
            break;
        case BFLOAT16:
            four_rows_bfloat16(job->weight, job->mask, rows, length, job->inner, transposed);
            break;
        case FLOAT32:
            four_rows_float32(job->weight, job->mask, rows, length, job->inner, transposed);
            break;
        default:
            four_rows_float64(job->weight, job->mask, rows, length, job->inner, transposed);
        }
        for (int i = 0; i < 4; i++)
            separate(worker, job, rows[i], length, rows[i] / 2);
    }
}

/* ---- the exact number of largest words: a radix selection, which may start from a window around the last threshold ---- */

static void select_from_all(selection_t *s)
{
    s->from_hint = 0;
    s->lo = 0;
    s->bits = s->step_bits < s->word_bits ? s->step_bits : s->word_bits;
    s->shift = s->word_bits - s->bits;
}

static void begin_selection(selection_t *s, const group_t *group, int64_t format, int64_t total)
{
    memset(s, 0, sizeof *s);
    s->count = group->keep;
    s->word_bits = 8 * WORD_SIZE[format] - 1;
    s->step_bits = 8;
    while (s->step_bits < 16 && (int64_t)1 << s->step_bits < total)
        s->step_bits++;
    select_from_all(s);
    if ((format == FLOAT32 || format == FLOAT64) && isfinite(group->hint) && group->hint >= 0) {
        uint64_t bits;
        int window;
        if (format == FLOAT32) {
            float value = (float)group->hint;
            uint32_t narrow;
            memcpy(&narrow, &value, sizeof narrow);
            bits = narrow & 0x7fffffffu; /* -0.0 */
            window = 16;
        } else {
            memcpy(&bits, &group->hint, sizeof bits);
            bits &= 0x7fffffffffffffffu;
            window = 45;
        }
        if (bits >= INFINITY_BITS[format])
            return;
        /* About half a percent around the hint: what a threshold moves in one optimizer step. */
        uint64_t half = (uint64_t)1 << (window - 1);
        s->from_hint = 1;
        s->lo = bits > half ? bits - half : 0;
        s->bits = s->step_bits;
        s->shift = window - s->bits;
    }
}

/* From counts of the window to a narrower window, or to the threshold. */
static void advance(selection_t *s, const uint32_t *histogram, int64_t above)
{
    enum { RUN = 256 };
    int64_t bins = (int64_t)1 << s->bits, high = bins, seen = above;
    if (above < s->count) {
        while (high > 0) {
            int64_t low = high - (high < RUN ? high : RUN), sum = 0;
            for (int64_t bin = low; bin < high; bin++)
                sum += histogram[bin];
            if (seen + sum >= s->count)
                break;
            seen += sum;
            high = low;
        }
    }
    if (above >= s->count || high == 0) {
        /* Only a hint can lead to a window that misses. */
        select_from_all(s);
        return;
    }
    int64_t bin = high - 1;
    while (seen + histogram[bin] < s->count)
        seen += histogram[bin--];
    s->lo += (uint64_t)bin << s->shift;
    if (s->shift == 0) {
        s->threshold = s->lo;
        s->greater = seen;
        s->equal = histogram[bin];
        s->done = 1;
        return;
    }
    s->bits = s->shift < s->step_bits ? s->shift : s->step_bits;
    s->shift -= s->bits;
    s->from_hint = 0;
}

static int64_t scan(const job_t *job, int64_t start, int64_t count, const selection_t *s, uint32_t *histogram)
{
    int64_t above;
    void *weight = at(job->weight, start, job->format);
    uint64_t width = (uint64_t)1 << (s->bits + s->shift);
    BY_SIZE(job->format, above =, scan, word, (const word *)weight, count, s->lo, width, s->shift, histogram)
    return above;
}

/* How many words from `start` hold exactly `open` equal to the threshold; there are more among `length`. */
static int64_t cut_within(const job_t *job, int64_t start, int64_t length, uint64_t threshold, int64_t open)
{
    int64_t position = start, here;
    if (open == 0)
        return 0;
    while (length > 1) {
        int64_t half = length / 2;
        void *weight = at(job->weight, position, job->format);
        BY_SIZE(job->format, here =, count_equal, word, (const word *)weight, half, (word)threshold)
        if (here >= open) {
            length = half;
        } else {
            open -= here;
            position += half;
            length -= half;
        }
    }
    return position + 1 - start;
}

/* For each job of a group, where in memory the words equal to the threshold stop to participate. */
static void resolve_ties(work_t *work, const group_t *group, const selection_t *s)
{
    int64_t open = s->count - s->greater;
    int all = open == s->equal;
    for (int64_t j = group->first; j < group->first + group->jobs; j++) {
        const job_t *job = &work->jobs[j];
        int64_t *cutoff = &work->cutoffs[j], found = 0, position = 0;
        work->thresholds[j] = s->threshold;
        *cutoff = all ? job->count : 0;
        if (all || open == 0)
            continue;
        while (position < job->count) {
            int64_t length = job->count - position < COUNTED ? job->count - position : COUNTED, here;
            void *weight = at(job->weight, position, job->format);
            BY_SIZE(job->format, here =, count_equal, word, (const word *)weight, length, (word)s->threshold)
            if (found + here > open && !job->axes) {
                position += cut_within(job, position, length, (uint64_t)s->threshold, open - found);
                found = open;
                break;
            }
            found += here;
            position += length;
        }
        if (job->axes && found > open) {
            /* Which ties come first is a matter of the weight's axes, not of memory. */
            BY_SIZE(job->format, , over_threshold, word, (const word *)job->weight, job->mask, 0, job->count, (word)s->threshold, 0)
            BY_SIZE(job->format, , join_ties, word, (const word *)job->weight, job->mask, job->sizes, job->strides, (int)job->axes,
                    (word)s->threshold, open)
            *cutoff = -1;
            found = open;
        } else {
            *cutoff = position;
        }
        open -= found;
    }
}

static void report_threshold(group_t *group, int64_t format, uint64_t bits)
{
    group->threshold = NAN;
    if (format == FLOAT32) {
        uint32_t narrow = (uint32_t)bits;
        float value;
        memcpy(&value, &narrow, sizeof value);
        group->threshold = value;
    } else if (format == FLOAT64) {
        memcpy(&group->threshold, &bits, sizeof bits);
    }
}

static void threshold_tile(worker_t *worker, int64_t j, int64_t start, int64_t stop)
{
    const job_t *job = &worker->work->jobs[j];
    int64_t cutoff = worker->work->cutoffs[j];
    uint64_t threshold = worker->work->thresholds[j];
    if (cutoff >= 0)
        BY_SIZE(job->format, , over_threshold, word, (const word *)job->weight, job->mask, start, stop, (word)threshold, cutoff)
    separate(worker, job, start, stop - start, 0);
}

static int64_t group_total(const work_t *work, const group_t *group)
{
    int64_t total = 0;
    for (int64_t j = group->first; j < group->first + group->jobs; j++)
        total += work->jobs[j].count;
    return total;
}

static void whole_group(worker_t *worker, group_t *group)
{
    work_t *work = worker->work;
    int64_t format = work->jobs[group->first].format, last = group->first + group->jobs;
    selection_t s;
    for (int64_t j = group->first; j < last; j++)
        scale_dormant(work, &work->jobs[j], 0, work->jobs[j].count);
    for (begin_selection(&s, group, format, group_total(work, group)); !s.done;) {
        int64_t above = 0;
        memset(worker->histogram, 0, sizeof(uint32_t) << s.bits);
        for (int64_t j = group->first; j < last; j++)
            above += scan(&work->jobs[j], 0, work->jobs[j].count, &s, worker->histogram);
        advance(&s, worker->histogram, above);
    }
    resolve_ties(work, group, &s);
    report_threshold(group, format, s.threshold);
    for (int64_t j = group->first; j < last; j++)
        for (int64_t start = 0, count = work->jobs[j].count; start < count; start += TILE)
            threshold_tile(worker, j, start, start + TILE < count ? start + TILE : count);
}

/* All threads take tiles of the group's jobs in turn; each tile is given to `scale` or `scan`. */
static void sweep(worker_t *worker, const group_t *group, int scaling)
{
    work_t *work = worker->work;
    enum { SHARE = 16 * TILE };
    for (;;) {
        int64_t ticket = atomic_fetch_add(&work->next, 1), j = group->first, last = group->first + group->jobs;
        for (; j < last; j++) {
            int64_t tiles = (work->jobs[j].count + SHARE - 1) / SHARE;
            if (ticket < tiles)
                break;
            ticket -= tiles;
        }
        if (j == last)
            return;
        const job_t *job = &work->jobs[j];
        int64_t start = ticket * SHARE, count = job->count - start < SHARE ? job->count - start : SHARE;
        if (scaling)
            scale_dormant(work, job, start, count);
        else
            worker->above += scan(job, start, count, &work->selection, worker->histogram);
    }
}

static void shared_group(worker_t *worker, group_t *group)
{
    work_t *work = worker->work;
    int64_t format = work->jobs[group->first].format;
    int leads = worker == work->workers;
    sweep(worker, group, 1);
    meet(work);
    if (leads) {
        atomic_store(&work->next, 0);
        begin_selection(&work->selection, group, format, group_total(work, group));
    }
    for (;;) {
        meet(work);
        if (work->selection.done)
            break;
        worker->above = 0;
        memset(worker->histogram, 0, sizeof(uint32_t) << work->selection.bits);
        sweep(worker, group, 0);
        meet(work);
        if (leads) {
            int64_t above = worker->above, bins = (int64_t)1 << work->selection.bits;
            for (int other = 1; other < work->threads; other++) {
                const uint32_t *histogram = work->workers[other].histogram;
                above += work->workers[other].above;
                for (int64_t bin = 0; bin < bins; bin++)
                    worker->histogram[bin] += histogram[bin];
            }
            advance(&work->selection, worker->histogram, above);
            atomic_store(&work->next, 0);
            if (work->selection.done) {
                resolve_ties(work, group, &work->selection);
                report_threshold(group, format, work->selection.threshold);
            }
        }
    }
}

/* ---- items and threads ---- */

/* How many weights a mask leaves out. */
int64_t sparsefx_zeros(const uint8_t *mask, int64_t count)
{
    int64_t ones = 0;
    for (int64_t start = 0; start < count; start += COUNTED) {
        int64_t stop = start + COUNTED < count ? start + COUNTED : count;
        uint16_t here = 0; /* at most COUNTED */
        for (int64_t i = start; i < stop; i++)
            here = (uint16_t)(here + mask[i]);
        ones += (int64_t)here;
    }
    return count - ones;
}

static void run_item(worker_t *worker, const item_t *item)
{
    work_t *work = worker->work;
    if (item->job < 0) {
        whole_group(worker, &work->groups[-1 - item->job]);
        return;
    }
    const job_t *job = &work->jobs[item->job];
    int64_t count = item->stop - item->start;
    switch (job->kind) {
    case KEEP_MASK:
        if (job->reached)
            restore(worker, job, item);
        if (job->held > 0) /* else what lies outside the mask is lost in any case */
            scale_dormant(work, job, item->start, count);
        separate(worker, job, item->start, count, item->offset);
        break;
    case PENALIZE:
        penalize((float *)job->weight + item->start, (const float *)job->dormant + item->start, job->mask + item->start,
                 job->reached + item->start, count, (float)job->scale, (float)job->more);
        break;
    case N_OF_M:
        n_of_m(worker, job, item->start, item->stop);
        break;
    case TWO_OF_FOUR_BLOCKS:
        blocks(worker, job, item->start, item->stop);
        break;
    case THRESHOLD:
        threshold_tile(worker, item->job, item->start, item->stop);
        break;
    default:
        merge(worker, job, item);
    }
}

static void *work_along(void *argument)
{
    worker_t *worker = argument;
    work_t *work = worker->work;
    pthread_mutex_lock(&work->lock);
    while (!work->open)
        pthread_cond_wait(&work->changed, &work->lock);
    pthread_mutex_unlock(&work->lock);
    for (int64_t i = 0; i < work->large_count; i++)
        shared_group(worker, &work->groups[work->large[i]]);
    for (;;) {
        int64_t i = atomic_fetch_add(&work->next, 1);
        if (i >= work->item_count)
            return NULL;
        run_item(worker, &work->items[i]);
    }
}

/* How many units a job has, and how many of them make an item. */
static void units_of(const job_t *job, int64_t *units, int64_t *step)
{
    int64_t words = 1;
    *units = job->count;
    if (job->kind == N_OF_M)
        words = job->m * job->inner;
    else if (job->kind == TWO_OF_FOUR_BLOCKS)
        words = 4 * job->fast_size * job->inner;
    *units = job->count / words;
    *step = words < TILE ? TILE / words : 1;
}

/* Whether a job splits its weight into participating and dormant words. */
static int splits(const job_t *job) { return job->held >= 0 && job->write && job->kind != PENALIZE; }

/* How many dormant words the masks of a job have by its kind alone; -1 where they have to be counted. */
static int64_t known_dormant(const job_t *job)
{
    if (job->kind == N_OF_M)
        return job->count / job->m * (job->m - job->n);
    return job->kind == TWO_OF_FOUR_BLOCKS ? job->count / 2 : -1;
}

static int plan(work_t *work)
{
    int64_t items = work->group_count, total = 0, units, step;
    for (int64_t j = 0; j < work->job_count; j++) {
        units_of(&work->jobs[j], &units, &step);
        items += (units + step - 1) / step;
        total += work->jobs[j].count;
    }
    work->items = malloc(sizeof *work->items * (size_t)(items + 1));
    work->cutoffs = calloc((size_t)work->job_count + 1, sizeof *work->cutoffs);
    work->thresholds = calloc((size_t)work->job_count + 1, sizeof *work->thresholds);
    work->large = malloc(sizeof *work->large * (size_t)(work->group_count + 1));
    if (!work->items || !work->cutoffs || !work->thresholds || !work->large)
        return -1;
    item_t *item = work->items;
    /* Whole groups first: they are the longest pieces of work. */
    for (int64_t g = 0; g < work->group_count; g++) {
        int64_t count = group_total(work, &work->groups[g]);
        if (work->threads > 1 && count >= PARALLEL_SELECTION && count * work->threads > total)
            work->large[work->large_count++] = g;
        else
            *item++ = (item_t){-1 - g, 0, 0, 0, 0};
    }
    for (int64_t j = 0; j < work->job_count; j++) {
        const job_t *job = &work->jobs[j];
        if (job->kind == THRESHOLD) {
            int shared = 0;
            for (int64_t i = 0; i < work->large_count; i++)
                shared |= work->large[i] == job->group;
            if (!shared)
                continue;
        }
        units_of(job, &units, &step);
        int64_t known = known_dormant(job), offset = 0;
        int counts = known < 0 && splits(job);
        for (int64_t start = 0; start < units; start += step) {
            int64_t stop = start + step < units ? start + step : units;
            int64_t left = counts ? sparsefx_zeros(job->mask + start, stop - start) : 0;
            *item++ = (item_t){j, start, stop, offset, left};
            offset += left;
        }
        if (splits(job) && job->held != (known < 0 ? offset : known))
            return -2;
    }
    work->item_count = item - work->items;
    return 0;
}

/* Returns 1 where NaN or infinity was seen, 0 where not; where nothing was changed: -1 where memory was short, -2 where a
 * weight has another number of dormant words than its mask leaves out. */
int sparsefx_run(job_t *jobs, int64_t job_count, group_t *groups, int64_t group_count, int64_t threads)
{
    enum { SCRATCH = 4 * (TILE + 2 * NEAR_GROUP) };
    work_t work = {.jobs = jobs, .groups = groups, .job_count = job_count, .group_count = group_count, .threads = (int)threads};
    pthread_t *handles = malloc(sizeof *handles * (size_t)threads);
    worker_t *workers = calloc((size_t)threads, sizeof *workers);
    uint8_t *memory = malloc((size_t)threads * (sizeof(uint32_t) * BINS + SCRATCH + TILE + 2 * NEAR_GROUP));
    uint64_t *values = malloc((size_t)threads * sizeof *values * (TILE + SPARE));
    int started = 1, result = -1;
    work.workers = workers;
    if (handles && workers && memory && values)
        result = plan(&work);
    if (result == 0) {
        pthread_mutex_init(&work.lock, NULL);
        pthread_cond_init(&work.changed, NULL);
        for (int64_t t = 0; t < threads; t++) {
            workers[t].work = &work;
            workers[t].histogram = (uint32_t *)memory + t * BINS;
            workers[t].scratch = memory + threads * (int64_t)sizeof(uint32_t) * BINS + t * (SCRATCH + TILE + 2 * NEAR_GROUP);
            workers[t].place = workers[t].scratch + SCRATCH;
            workers[t].values = values + t * (TILE + SPARE);
        }
        int64_t useful = work.large_count ? threads : work.item_count;
        while (started < threads && started < useful &&
               pthread_create(&handles[started], NULL, work_along, &workers[started]) == 0)
            started++;
        pthread_mutex_lock(&work.lock);
        work.threads = started;
        work.open = 1;
        pthread_cond_broadcast(&work.changed);
        pthread_mutex_unlock(&work.lock);
        work_along(&workers[0]);
        for (int t = 1; t < started; t++)
            pthread_join(handles[t], NULL);
        pthread_cond_destroy(&work.changed);
        pthread_mutex_destroy(&work.lock);
        result = atomic_load(&work.non_finite);
    }
    free(work.items);
    free(work.cutoffs);
    free(work.thresholds);
    free(work.large);
    free(memory);
    free(values);
    free(workers);
    free(handles);
    return result;
}

/* Lets native.py see that both sides mean the same structures. */
int64_t sparsefx_layout(void) { return (int64_t)(sizeof(job_t) * 1000 + sizeof(group_t)); }

/* setuptools links extensions with this symbol exported; the library is never imported as a module. */
#if defined(__GNUC__) || defined(__clang__)
__attribute__((visibility("default")))
#endif
void *PyInit__native(void);
void *PyInit__native(void) { return NULL; }
