/* Loops over the bits of one floating format's words. Included once for each word size, with WORD and NAME(x) defined.
 *
 * For IEEE floats with the sign bit cleared, order of magnitude is order of the bits as unsigned integers, so comparisons need
 * no floating point at all: they are exact, -0.0 equals 0.0, subnormals cannot be flushed, and NaN is above infinity. */

#define MAGNITUDE ((WORD)((WORD)-1 >> 1))

/* N:M where groups lie close together: compares all words at distance k * inner, then keeps the comparisons within groups.
 * place[i] is the position of word i in its group; won and first_wins are scratch of `count` bytes. */
CLONES static void NAME(n_of_m_near)(const WORD *restrict weight, uint8_t *restrict mask, const uint8_t *restrict place, int64_t count,
                                     int64_t inner, int n, int m, uint8_t *restrict won, uint8_t *restrict first_wins)
{
    memset(won, 0, (size_t)count);
    for (int k = 1; k < m; k++) {
        int64_t distance = k * inner, pairs = count - distance;
        uint8_t limit = (uint8_t)(m - k);
        for (int64_t i = 0; i < pairs; i++)
            first_wins[i] = (weight[i] & MAGNITUDE) >= (weight[i + distance] & MAGNITUDE);
        for (int64_t i = 0; i < pairs; i++)
            won[i] = (uint8_t)(won[i] + (first_wins[i] & (place[i] < limit)));
        uint8_t *restrict second = won + distance;
        for (int64_t i = 0; i < pairs; i++)
            second[i] = (uint8_t)(second[i] + ((first_wins[i] ^ 1) & (place[i] < limit)));
    }
    uint8_t needed = (uint8_t)(m - n);
    for (int64_t i = 0; i < count; i++)
        mask[i] = won[i] >= needed;
}

/* The same for 2:4 in one sweep: a member stays that wins two of its three comparisons. */
CLONES static void NAME(two_of_four_near)(const WORD *restrict weight, uint8_t *restrict mask, const uint8_t *restrict place,
                                          int64_t count, int64_t inner, uint8_t *restrict scratch)
{
    /* By distance 1, 2, 3: bit is 1 where the earlier member wins. Reads up to 3 * inner bytes in front of a row. */
    int64_t pad = 3 * inner, size = count + pad;
    uint8_t *restrict one = scratch + pad, *restrict two = one + size, *restrict three = two + size;
    for (int64_t i = 0; i < count - inner; i++)
        one[i] = (weight[i] & MAGNITUDE) >= (weight[i + inner] & MAGNITUDE);
    for (int64_t i = 0; i < count - 2 * inner; i++)
        two[i] = (weight[i] & MAGNITUDE) >= (weight[i + 2 * inner] & MAGNITUDE);
    for (int64_t i = 0; i < count - 3 * inner; i++)
        three[i] = (weight[i] & MAGNITUDE) >= (weight[i + 3 * inner] & MAGNITUDE);
    const uint8_t *back_one = one - inner, *back_two = two - 2 * inner, *back_three = three - 3 * inner;
    for (int64_t i = 0; i < count; i++) {
        uint8_t p = place[i];
        uint8_t a = p < 3 ? one[i] : (uint8_t)(back_one[i] ^ 1);
        uint8_t b = p < 2 ? two[i] : (uint8_t)(back_two[i] ^ 1);
        uint8_t ends = p == 0 ? three[i] : (uint8_t)(back_three[i] ^ 1);
        uint8_t c = (p == 0) | (p == 3) ? ends : (uint8_t)(back_one[i] ^ 1);
        mask[i] = (uint8_t)((a & (b | c)) | (b & c)) & 1;
    }
}

/* N:M where the members of a group lie far apart: one group of `m` rows of `inner` words. */
CLONES static void NAME(n_of_m_far)(const WORD *restrict weight, uint8_t *restrict mask, int64_t inner, int n, int m,
                                    uint8_t *restrict scratch)
{
    for (int64_t start = 0; start < inner; start += FAR_LANES) {
        int64_t lanes = inner - start < FAR_LANES ? inner - start : FAR_LANES;
        memset(scratch, 0, (size_t)m * FAR_LANES);
        for (int first = 0; first < m; first++) {
            for (int second = first + 1; second < m; second++) {
                const WORD *a = weight + first * inner + start, *b = weight + second * inner + start;
                uint8_t *restrict won_a = scratch + first * FAR_LANES, *restrict won_b = scratch + second * FAR_LANES;
                for (int64_t i = 0; i < lanes; i++) {
                    uint8_t first_wins = (a[i] & MAGNITUDE) >= (b[i] & MAGNITUDE);
                    won_a[i] = (uint8_t)(won_a[i] + first_wins);
                    won_b[i] = (uint8_t)(won_b[i] + (first_wins ^ 1));
                }
            }
        }
        for (int member = 0; member < m; member++)
            for (int64_t i = 0; i < lanes; i++)
                mask[member * inner + start + i] = scratch[member * FAR_LANES + i] >= m - n;
    }
}

static ALWAYS_INLINE int NAME(any_between)(const WORD *weight, int64_t count, WORD lo, WORD width)
{
    WORD any = 0;
    for (int64_t i = 0; i < count; i++)
        any |= (WORD)((WORD)((weight[i] & MAGNITUDE) - lo) < width);
    return any != 0;
}

static ALWAYS_INLINE void NAME(tally)(const WORD *weight, int64_t count, WORD lo, WORD width, int shift, uint32_t *histogram)
{
    for (int64_t i = 0; i < count; i++) {
        WORD offset = (WORD)((weight[i] & MAGNITUDE) - lo);
        if (offset < width)
            histogram[offset >> shift]++;
    }
}

/* Counts words at or above lo + width, and adds those in [lo, lo + width) to histogram[(word - lo) >> shift]. */
CLONES static int64_t NAME(scan)(const WORD *restrict weight, int64_t count, uint64_t window_start, uint64_t window_width, int shift,
                                 uint32_t *restrict histogram)
{
    if (window_start == 0 && window_width > MAGNITUDE) {
        for (int64_t i = 0; i < count; i++)
            histogram[(WORD)(weight[i] & MAGNITUDE) >> shift]++;
        return 0;
    }
    uint64_t end = window_start + window_width;
    WORD lo = (WORD)window_start, hi = end > MAGNITUDE ? (WORD)(MAGNITUDE + (WORD)1) : (WORD)end, width = (WORD)(hi - lo);
    int64_t above = 0;
    for (int64_t start = 0; start < count; start += COUNTED) {
        int64_t stop = start + COUNTED < count ? start + COUNTED : count;
        WORD higher = 0; /* at most COUNTED, which fits the smallest word */
        for (int64_t i = start; i < stop; i++)
            higher = (WORD)(higher + ((weight[i] & MAGNITUDE) >= hi));
        above += (int64_t)higher;
        /* Few words are in the window, so whole blocks are passed over, then smaller ones, then single words. */
        int64_t block = start;
        for (; block + 64 <= stop; block += 64) {
            if (!NAME(any_between)(weight + block, 64, lo, width))
                continue;
            for (int64_t part = block; part < block + 64; part += 16)
                if (NAME(any_between)(weight + part, 16, lo, width))
                    NAME(tally)(weight + part, 16, lo, width, shift, histogram);
        }
        NAME(tally)(weight + block, stop - block, lo, width, shift, histogram);
    }
    return above;
}

CLONES static int64_t NAME(count_equal)(const WORD *restrict weight, int64_t count, WORD threshold)
{
    int64_t equal = 0;
    for (int64_t start = 0; start < count; start += COUNTED) {
        int64_t stop = start + COUNTED < count ? start + COUNTED : count;
        WORD here = 0;
        for (int64_t i = start; i < stop; i++)
            here = (WORD)(here + ((weight[i] & MAGNITUDE) == threshold));
        equal += (int64_t)here;
    }
    return equal;
}

/* Words above the threshold, and equal ones in front of `cutoff`. */
CLONES static void NAME(over_threshold)(const WORD *restrict weight, uint8_t *restrict mask, int64_t start, int64_t stop, WORD threshold,
                                        int64_t cutoff)
{
    int64_t turn = cutoff < start ? start : cutoff > stop ? stop : cutoff;
    for (int64_t i = start; i < turn; i++)
        mask[i] = (weight[i] & MAGNITUDE) >= threshold;
    for (int64_t i = turn; i < stop; i++)
        mask[i] = (weight[i] & MAGNITUDE) > threshold;
}

CLONES static WORD NAME(largest)(const WORD *restrict weight, int64_t count)
{
    WORD worst = 0;
    for (int64_t i = 0; i < count; i++) {
        WORD magnitude = weight[i] & MAGNITUDE;
        worst = magnitude > worst ? magnitude : worst;
    }
    return worst;
}

CLONES static void NAME(clear_dormant)(WORD *restrict weight, const uint8_t *restrict mask, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        weight[i] &= (WORD)-(WORD)mask[i];
}

/* weight keeps the participating values and zeros; returns the largest magnitude seen. */
CLONES static WORD NAME(separate)(WORD *restrict weight, const uint8_t *restrict mask, int64_t count)
{
    WORD worst = 0;
    for (int64_t i = 0; i < count; i++) {
        WORD value = weight[i], magnitude = value & MAGNITUDE;
        worst = magnitude > worst ? magnitude : worst;
        weight[i] = value & (WORD)-(WORD)mask[i];
    }
    return worst;
}

/* The same. Where nothing has moved outside the mask, as after most steps of a method without dormant values, memory is read and
 * not written. */
CLONES static WORD NAME(separate_if_needed)(WORD *restrict weight, const uint8_t *restrict mask, int64_t count)
{
    WORD worst = 0;
    for (int64_t start = 0; start < count; start += LOOKED_AT) {
        int64_t stop = start + LOOKED_AT < count ? start + LOOKED_AT : count;
        WORD outside = 0;
        for (int64_t i = start; i < stop; i++) {
            WORD value = weight[i], magnitude = value & MAGNITUDE;
            worst = magnitude > worst ? magnitude : worst;
            outside |= value & (WORD)((WORD)mask[i] - (WORD)1);
        }
        if (outside)
            for (int64_t i = start; i < stop; i++)
                weight[i] &= (WORD)-(WORD)mask[i];
    }
    return worst;
}

/* The words that the mask leaves out, one after the other; returns how many. `to` has room for `count`. */
static int64_t NAME(gather)(const WORD *restrict weight, const uint8_t *restrict mask, WORD *restrict to, int64_t count)
{
    int64_t left = 0;
    for (int64_t i = 0; i < count; i++) {
        to[left] = weight[i];
        left += mask[i] ^ 1;
    }
    return left;
}

/* Puts them back. Reads one word more than the mask leaves out. */
static void NAME(merge)(WORD *restrict weight, const uint8_t *restrict mask, const WORD *restrict from, int64_t count)
{
    int64_t left = 0;
    for (int64_t i = 0; i < count; i++) {
        WORD keep = (WORD)-(WORD)mask[i];
        weight[i] = (WORD)((weight[i] & keep) | (from[left] & (WORD)~keep));
        left += mask[i] ^ 1;
    }
}

/* Puts back those that a step may not have changed: neither in the mask nor reached. Reads one word more than the mask leaves out. */
static void NAME(restore)(WORD *restrict weight, const uint8_t *restrict mask, const uint8_t *restrict reached,
                          const WORD *restrict from, int64_t count)
{
    int64_t left = 0;
    for (int64_t i = 0; i < count; i++) {
        WORD back = (WORD)((WORD)(mask[i] | reached[i]) - (WORD)1);
        weight[i] = (WORD)((weight[i] & (WORD)~back) | (from[left] & back));
        left += mask[i] ^ 1;
    }
}

/* The first `open` words equal to the threshold join the mask, in row-major order of a permuted weight. */
static void NAME(join_ties)(const WORD *weight, uint8_t *mask, const int64_t *sizes, const int64_t *strides, int axes, WORD threshold,
                            int64_t open)
{
    int64_t index[MAX_AXES] = {0};
    int64_t length = sizes[axes - 1], stride = strides[axes - 1], offset = 0;
    while (open > 0) {
        for (int64_t i = 0; i < length && open > 0; i++) {
            int64_t at = offset + i * stride;
            if ((weight[at] & MAGNITUDE) == threshold) {
                mask[at] = 1;
                open--;
            }
        }
        int axis = axes - 2;
        for (; axis >= 0; axis--) {
            offset += strides[axis];
            if (++index[axis] < sizes[axis])
                break;
            offset -= strides[axis] * sizes[axis];
            index[axis] = 0;
        }
        if (axis < 0)
            return;
    }
}

#undef MAGNITUDE
