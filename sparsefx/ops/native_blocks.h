/* The best of the 90 masks of 4 x 4 blocks: see sparsefx/patterns/two_of_four_blocks.py for the 19 classes and the order of ties. */

enum { LANES = 64 };

/* Columns of a row as bits 0 to 3, by number of the pair. */
enum { PAIR_0 = 3, PAIR_1 = 5, PAIR_2 = 9, PAIR_3 = 6, PAIR_4 = 10, PAIR_5 = 12 };
#define UPPER(first, second) ((int64_t)(PAIR_##first | PAIR_##second << 4))
#define LOWER(first, second) ((int64_t)(PAIR_##first | PAIR_##second << 4) << 8)

#define CANDIDATE(value, bits)                                                                                                             \
    {                                                                                                                                      \
        double total = (value);                                                                                                            \
        int64_t pattern = (bits);                                                                                                          \
        code = total > best ? pattern : code;                                                                                              \
        best = total > best ? total : best;                                                                                                \
    }
#define EQUAL_ROWS(p, q) CANDIDATE((a##p + b##p) + (c##q + d##q), UPPER(p, p) | LOWER(q, q))
#define OPTION(sum, bits, x, y, p, q, HALF)                                                                                                \
    {                                                                                                                                      \
        double option = x##p + y##q;                                                                                                       \
        bits = option > sum ? HALF(p, q) : bits;                                                                                           \
        sum = option > sum ? option : sum;                                                                                                 \
    }
#define SHARED_COLUMN(p, q, r, s)                                                                                                          \
    {                                                                                                                                      \
        double upper = a##p + b##q, lower = c##r + d##s;                                                                                   \
        int64_t upper_bits = UPPER(p, q), lower_bits = LOWER(r, s);                                                                        \
        OPTION(upper, upper_bits, a, b, q, p, UPPER)                                                                                       \
        OPTION(lower, lower_bits, c, d, s, r, LOWER)                                                                                       \
        CANDIDATE(upper + lower, upper_bits | lower_bits)                                                                                  \
    }
#define ROW_PAIRS(x, row)                                                                                                                  \
    double x##0 = v[row][i] + v[row + 1][i], x##1 = v[row][i] + v[row + 2][i], x##2 = v[row][i] + v[row + 3][i],                           \
           x##3 = v[row + 1][i] + v[row + 2][i], x##4 = v[row + 1][i] + v[row + 3][i], x##5 = v[row + 2][i] + v[row + 3][i];

/* v[4 * row + column][block] are magnitudes; bit 4 * row + column of codes[block] says that the weight participates. */
CLONES static void best_blocks(double (*restrict v)[LANES], int64_t *restrict codes, int64_t blocks)
{
    blocks = (blocks + 7) & ~(int64_t)7;
    for (int64_t i = 0; i < blocks; i++) {
        ROW_PAIRS(a, 0)
        ROW_PAIRS(b, 4)
        ROW_PAIRS(c, 8)
        ROW_PAIRS(d, 12)
        double best = (a0 + b0) + (c5 + d5);
        int64_t code = UPPER(0, 0) | LOWER(5, 5);
        EQUAL_ROWS(1, 4)
        EQUAL_ROWS(2, 3)
        EQUAL_ROWS(3, 2)
        EQUAL_ROWS(4, 1)
        EQUAL_ROWS(5, 0)
        {
            double upper = a0 + b5, lower = c0 + d5;
            int64_t upper_bits = UPPER(0, 5), lower_bits = LOWER(0, 5);
            OPTION(upper, upper_bits, a, b, 1, 4, UPPER)
            OPTION(upper, upper_bits, a, b, 2, 3, UPPER)
            OPTION(upper, upper_bits, a, b, 3, 2, UPPER)
            OPTION(upper, upper_bits, a, b, 4, 1, UPPER)
            OPTION(upper, upper_bits, a, b, 5, 0, UPPER)
            OPTION(lower, lower_bits, c, d, 1, 4, LOWER)
            OPTION(lower, lower_bits, c, d, 2, 3, LOWER)
            OPTION(lower, lower_bits, c, d, 3, 2, LOWER)
            OPTION(lower, lower_bits, c, d, 4, 1, LOWER)
            OPTION(lower, lower_bits, c, d, 5, 0, LOWER)
            CANDIDATE(upper + lower, upper_bits | lower_bits)
        }
        SHARED_COLUMN(1, 2, 3, 4)
        SHARED_COLUMN(0, 2, 3, 5)
        SHARED_COLUMN(0, 1, 4, 5)
        SHARED_COLUMN(3, 4, 1, 2)
        SHARED_COLUMN(0, 4, 1, 5)
        SHARED_COLUMN(0, 3, 2, 5)
        SHARED_COLUMN(3, 5, 0, 2)
        SHARED_COLUMN(1, 5, 0, 4)
        SHARED_COLUMN(1, 3, 2, 4)
        SHARED_COLUMN(4, 5, 0, 1)
        SHARED_COLUMN(2, 5, 0, 3)
        SHARED_COLUMN(2, 4, 1, 3)
        codes[i] = code;
    }
}

static ALWAYS_INLINE double magnitude_of(const void *weight, int64_t at, int format)
{
    uint32_t bits;
    float value;
    if (format == FLOAT64)
        return fabs(((const double *)weight)[at]);
    if (format == FLOAT32)
        return fabsf(((const float *)weight)[at]);
    bits = ((const uint16_t *)weight)[at] & 0x7fffu;
    if (format == BFLOAT16) {
        bits <<= 16;
        memcpy(&value, &bits, sizeof value);
        return value;
    }
    /* As an exponent of float32 a float16's is too small by 112; the product is exact, for subnormals too. */
    bits <<= 13;
    memcpy(&value, &bits, sizeof value);
    return value * 0x1p112f;
}

/* Bits of 4 x 4 blocks with rows and columns exchanged. */
static ALWAYS_INLINE int64_t exchanged(int64_t code)
{
    int64_t near_bits = (code ^ code >> 3) & 0x0a0a;
    code ^= near_bits | near_bits << 3;
    int64_t far_bits = (code ^ code >> 6) & 0x00cc;
    return code ^ (far_bits | far_bits << 6);
}

/* Blocks of four consecutive words in each of four rows of memory. */
static ALWAYS_INLINE void packed_blocks(const void *weight, uint8_t *mask, const int64_t rows[4], int64_t start, int64_t lanes,
                                        double (*restrict v)[LANES], int64_t *restrict codes, int transposed, int format)
{
    for (int i = 0; i < 4; i++) {
        int64_t first = rows[i] + 4 * start;
        double *restrict a = v[4 * i], *restrict b = v[4 * i + 1], *restrict c = v[4 * i + 2], *restrict d = v[4 * i + 3];
        if (transposed)
            a = v[i], b = v[4 + i], c = v[8 + i], d = v[12 + i];
        for (int64_t k = 0; k < lanes; k++) {
            a[k] = magnitude_of(weight, first + 4 * k, format);
            b[k] = magnitude_of(weight, first + 4 * k + 1, format);
            c[k] = magnitude_of(weight, first + 4 * k + 2, format);
            d[k] = magnitude_of(weight, first + 4 * k + 3, format);
        }
    }
    best_blocks(v, codes, lanes);
    if (transposed)
        for (int64_t k = 0; k < lanes; k++)
            codes[k] = exchanged(codes[k]);
    for (int i = 0; i < 4; i++) {
        uint32_t bytes[LANES];
        /* The product puts bit j of a row into byte j. */
        for (int64_t k = 0; k < lanes; k++)
            bytes[k] = ((uint32_t)(codes[k] >> 4 * i) & 15u) * 0x00204081u & 0x01010101u;
        memcpy(mask + rows[i] + 4 * start, bytes, (size_t)(4 * lanes));
    }
}

/* Blocks of four words that lie `inner` apart in each of four rows: block b is at step b / inner, and at place b % inner. */
static ALWAYS_INLINE void spread_blocks(const void *weight, uint8_t *mask, const int64_t rows[4], int64_t start, int64_t lanes,
                                        int64_t inner, double (*restrict v)[LANES], int64_t *restrict codes, int transposed, int format)
{
    for (int64_t lane = 0, run; lane < lanes; lane += run) {
        int64_t step = (start + lane) / inner, place = (start + lane) % inner;
        run = inner - place < lanes - lane ? inner - place : lanes - lane;
        for (int i = 0; i < 4; i++) {
            for (int j = 0; j < 4; j++) {
                int64_t from = rows[i] + (4 * step + j) * inner + place;
                double *restrict to = v[transposed ? 4 * j + i : 4 * i + j] + lane;
                for (int64_t k = 0; k < run; k++)
                    to[k] = magnitude_of(weight, from + k, format);
            }
        }
    }
    best_blocks(v, codes, lanes);
    for (int64_t lane = 0, run; lane < lanes; lane += run) {
        int64_t step = (start + lane) / inner, place = (start + lane) % inner;
        run = inner - place < lanes - lane ? inner - place : lanes - lane;
        for (int i = 0; i < 4; i++) {
            for (int j = 0; j < 4; j++) {
                int bit = transposed ? 4 * j + i : 4 * i + j;
                uint8_t *restrict to = mask + rows[i] + (4 * step + j) * inner + place;
                for (int64_t k = 0; k < run; k++)
                    to[k] = (uint8_t)(codes[lane + k] >> bit & 1);
            }
        }
    }
}

/* Masks of the blocks of four rows of memory, each of `length` words that step by `inner` along the other axis of a block. */
static ALWAYS_INLINE void four_rows(const void *weight, uint8_t *mask, const int64_t rows[4], int64_t length, int64_t inner,
                                    int transposed, int format)
{
    double v[16][LANES];
    int64_t codes[LANES], blocks = length / 4;
    memset(v, 0, sizeof v);
    for (int64_t start = 0; start < blocks; start += LANES) {
        int64_t lanes = blocks - start < LANES ? blocks - start : LANES;
        if (inner == 1)
            packed_blocks(weight, mask, rows, start, lanes, v, codes, transposed, format);
        else
            spread_blocks(weight, mask, rows, start, lanes, inner, v, codes, transposed, format);
    }
}

#define FOUR_ROWS(suffix, format)                                                                                                          \
    CLONES static void four_rows_##suffix(const void *weight, uint8_t *mask, const int64_t rows[4], int64_t length, int64_t inner,         \
                                          int transposed)                                                                                  \
    {                                                                                                                                      \
        four_rows(weight, mask, rows, length, inner, transposed, format);                                                                  \
    }
FOUR_ROWS(float16, FLOAT16)
FOUR_ROWS(bfloat16, BFLOAT16)
FOUR_ROWS(float32, FLOAT32)
FOUR_ROWS(float64, FLOAT64)
