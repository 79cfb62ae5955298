/* Dormant words: taken out of a weight, one after the other, and put back into their places. Sixteen at a time where the processor has
 * AVX-512; the loops in native_kernels.h, one at a time, everywhere else, with the same result. */

enum { SPARE = 16 }; /* words that may be read or written behind the last one */

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>

#define WIDE __attribute__((target("avx512f,avx512bw,avx512vl,popcnt")))

static int has_wide(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

WIDE static ALWAYS_INLINE __mmask16 left_out(const uint8_t *mask)
{
    return _mm_cmpeq_epi8_mask(_mm_loadu_si128((const __m128i *)mask), _mm_setzero_si128());
}

WIDE static int64_t gather_wide(const uint32_t *weight, const uint8_t *mask, uint32_t *to, int64_t count)
{
    int64_t left = 0, i = 0;
    for (; i + 16 <= count; i += 16) {
        __mmask16 chosen = left_out(mask + i);
        _mm512_storeu_si512(to + left, _mm512_maskz_compress_epi32(chosen, _mm512_loadu_si512(weight + i)));
        left += _mm_popcnt_u32(chosen);
    }
    return left + gather_32(weight + i, mask + i, to + left, count - i);
}

WIDE static void merge_wide(uint32_t *weight, const uint8_t *mask, const uint32_t *from, int64_t count)
{
    int64_t left = 0, i = 0;
    for (; i + 16 <= count; i += 16) {
        __mmask16 chosen = left_out(mask + i);
        __m512i values = _mm512_mask_expand_epi32(_mm512_loadu_si512(weight + i), chosen, _mm512_loadu_si512(from + left));
        _mm512_storeu_si512(weight + i, values);
        left += _mm_popcnt_u32(chosen);
    }
    merge_32(weight + i, mask + i, from + left, count - i);
}

static int64_t gather_fast_32(const uint32_t *weight, const uint8_t *mask, uint32_t *to, int64_t count)
{
    return has_wide() ? gather_wide(weight, mask, to, count) : gather_32(weight, mask, to, count);
}

static void merge_fast_32(uint32_t *weight, const uint8_t *mask, const uint32_t *from, int64_t count)
{
    if (has_wide())
        merge_wide(weight, mask, from, count);
    else
        merge_32(weight, mask, from, count);
}
#else
#define gather_fast_32 gather_32
#define merge_fast_32 merge_32
#endif
#define gather_fast_16 gather_16
#define gather_fast_64 gather_64
#define merge_fast_16 merge_16
#define merge_fast_64 merge_64
