/* Simulated annealing over the order of a matrix's columns, so that 2:4 keeps more magnitude. permutation.py states the contract.
 *
 * A column is a contiguous run of magnitudes, padded with zeros to a multiple of LANES. A move swaps two columns of different
 * groups of four; its gain is found by summing the two groups anew. Sums run in LANES fixed lanes, so that every instruction set
 * gives the same bits. No Python headers: loaded with ctypes. */

#include <math.h>
#include <stdint.h>

#include "compiler.h"

enum { LANES = 16, COOL_EVERY = 1024 };

static float larger(float a, float b) { return a > b ? a : b; }
static float smaller(float a, float b) { return a < b ? a : b; }

/* The sum over all rows of the two largest of four. Of two pairs, either one pair stays whole, or the larger of each does. */
CLONES static double kept(const float *a, const float *b, const float *c, const float *d, int64_t rows)
{
    float lanes[LANES] = {0};
    for (int64_t r = 0; r < rows; r += LANES)
        for (int l = 0; l < LANES; l++) {
            float ab = larger(a[r + l], b[r + l]), cd = larger(c[r + l], d[r + l]);
            float ba = smaller(a[r + l], b[r + l]), dc = smaller(c[r + l], d[r + l]);
            lanes[l] += larger(ab, cd) + larger(smaller(ab, cd), larger(ba, dc));
        }
    double sum = 0;
    for (int l = 0; l < LANES; l++)
        sum += lanes[l];
    return sum;
}

static double kept_in(const float *columns, int64_t rows, const int64_t *four)
{
    return kept(columns + four[0] * rows, columns + four[1] * rows, columns + four[2] * rows, columns + four[3] * rows, rows);
}

/* splitmix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014. */
static uint64_t draw(uint64_t *state)
{
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* Makes `moves` moves from one temperature to another, geometrically. `order` holds the column at each place, `values` what each
 * group keeps, `best` the best order so far with `best_sum`; all are brought up to date, and so is the random `state`. */
void sparsefx_anneal(const float *columns, int64_t rows, int64_t count, int64_t *order, double *values, int64_t *best,
                     double *best_sum, uint64_t *state, int64_t moves, double hot, double cold)
{
    double sum = 0, temperature = hot, factor = moves > COOL_EVERY ? pow(cold / hot, (double)COOL_EVERY / (double)moves) : 1;
    for (int64_t g = 0; g < count / 4; g++)
        sum += values[g];
    for (int64_t move = 0; move < moves; move++) {
        if (move && move % COOL_EVERY == 0)
            temperature *= factor;
        uint64_t bits = draw(state);
        int64_t p = (int64_t)(((bits >> 32) * (uint64_t)count) >> 32), q = (int64_t)(((bits & 0xffffffffu) * (uint64_t)count) >> 32);
        int64_t g = p / 4, h = q / 4;
        double chance = (double)(draw(state) >> 11) * 0x1p-53;
        if (g == h)
            continue;
        int64_t column = order[p];
        order[p] = order[q];
        order[q] = column;
        double first = kept_in(columns, rows, order + 4 * g), second = kept_in(columns, rows, order + 4 * h);
        double gain = first + second - values[g] - values[h];
        if (gain < 0 && chance >= exp(gain / temperature)) {
            order[q] = order[p];
            order[p] = column;
            continue;
        }
        values[g] = first;
        values[h] = second;
        sum += gain;
        if (sum > *best_sum + 1e-9 * fabs(*best_sum)) {
            *best_sum = sum;
            for (int64_t c = 0; c < count; c++)
                best[c] = order[c];
        }
    }
}

int64_t sparsefx_lanes(void) { return LANES; }

/* setuptools links extensions with this symbol exported; the library is never imported as a module. */
#if defined(__GNUC__) || defined(__clang__)
__attribute__((visibility("default")))
#endif
void *PyInit__permutation(void);
void *PyInit__permutation(void) { return 0; }
