/* Products of quantized weights and a batch of tokens, for x86-64 processors with AVX-512 VNNI.
 *
 * llama.cpp asks a function of its own, llamafile_sgemm, for every product of more than one column. A library that is
 * loaded before it with RTLD_GLOBAL and has a function of that name is asked instead: this one. It computes what
 * llama.cpp does, activations rounded to blocks of 32 int8 with a scale each, exact sums within a block, floats between
 * blocks in the same order. An adapter's 16-bit floats it multiplies by activations as they are, which llama.cpp rounds
 * to 16 bits first. What it has no product for, it hands on.
 *
 * A tile is 16 rows of weights by up to 12 columns: rows are laid out so that one register holds four values of each of
 * the 16, and one vpdpbusd multiplies them by four values of a column. That instruction takes unsigned by signed, so the
 * weights are stored as value + offset, and a column's sum starts at -offset times the sum of the column's values.
 */

#include <immintrin.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { F32 = 0, F16 = 1, Q4_0 = 2, Q8_0 = 8 }; /* ggml_type */
enum { BLOCK = 32, ROWS = 16, COLUMNS = 12, HALF_COLUMNS = 8 };
enum { LEAST = 8 };   /* columns: for fewer, laying out the rows costs more than it saves */
enum { RANKS = 256 }; /* of 16-bit floats only what an adapter has, one side of which is its rank, times the scale */

struct params { /* the beginning of ggml_compute_params */
    int thread, threads;
};
struct q8_0 {
    uint16_t scale;
    int8_t values[BLOCK];
};
struct q4_0 {
    uint16_t scale;
    uint8_t pairs[BLOCK / 2]; /* value i in the lower half of byte i, value i + 16 in the upper one, both + 8 */
};
struct rows { /* one block of 16 rows */
    float scales[ROWS];
    uint8_t values[BLOCK / 4][ROWS][4];
};
struct columns { /* one block of 12 columns */
    int32_t starts[COLUMNS];
    float scales[COLUMNS];
    int8_t values[COLUMNS][BLOCK];
};

typedef bool product(const struct params *, int64_t, int64_t, int64_t, const void *, int64_t, const void *, int64_t,
                     void *, int64_t, int, int, int);

static product *theirs;
static bool on;
static int64_t count; /* of products computed here, by the first thread */

void pitstop_matmul_hand_on_to(product *function) { theirs = function; }
void pitstop_matmul_use(bool value) { on = value; }
int64_t pitstop_matmul_count(void) { return count; }
bool pitstop_matmul_runs_here(void) {
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}

#define VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")))
#define INLINE static inline __attribute__((always_inline))
#define EACH(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)
#define EACH_HALF(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7)

/* Memory of this thread that grows with what it is asked for; ggml ends the process too when it gets none. */
static void *room(void **at, size_t *size, size_t wanted) {
    if (*size < wanted) {
        free(*at);
        *at = aligned_alloc(64, (wanted + 63) / 64 * 64);
        *size = wanted;
        if (!*at) abort();
    }
    return *at;
}

VNNI static void lay_out_columns(struct columns *to, const struct q8_0 *from, int64_t blocks, int64_t stride, int64_t n,
                                 int offset) {
    const __m256i ones = _mm256_set1_epi8(1);
    for (int64_t j = 0; j < n; j++)
        for (int64_t b = 0; b < blocks; b++) {
            const struct q8_0 *one = from + j * stride + b;
            struct columns *block = to + j / COLUMNS * blocks + b;
            const __m256i values = _mm256_loadu_si256((const __m256i *)one->values);
            _mm256_storeu_si256((__m256i *)block->values[j % COLUMNS], values);
            const __m256i fours = _mm256_dpbusd_epi32(_mm256_setzero_si256(), ones, values);
            __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
            sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
            sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1));
            block->starts[j % COLUMNS] = -offset * _mm_cvtsi128_si32(sum);
            block->scales[j % COLUMNS] = _cvtsh_ss(one->scale);
        }
}

/* Read 16 bytes of rows 0, 4, 8 and 12. */
VNNI INLINE __m512i every_fourth(const char *from, int64_t stride) {
    __m512i found = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)from));
    found = _mm512_inserti32x4(found, _mm_loadu_si128((const __m128i *)(from + 4 * stride)), 1);
    found = _mm512_inserti32x4(found, _mm_loadu_si128((const __m128i *)(from + 8 * stride)), 2);
    return _mm512_inserti32x4(found, _mm_loadu_si128((const __m128i *)(from + 12 * stride)), 3);
}

/* Read 16 bytes of 16 rows: four bytes of each row in a register. */
VNNI INLINE void read_rows(__m512i to[4], const char *from, int64_t stride) {
    const __m512i a = every_fourth(from, stride), b = every_fourth(from + stride, stride);
    const __m512i c = every_fourth(from + 2 * stride, stride), d = every_fourth(from + 3 * stride, stride);
    const __m512i ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
    const __m512i ab_above = _mm512_unpackhi_epi32(a, b), cd_above = _mm512_unpackhi_epi32(c, d);
    to[0] = _mm512_unpacklo_epi64(ab, cd);
    to[1] = _mm512_unpackhi_epi64(ab, cd);
    to[2] = _mm512_unpacklo_epi64(ab_above, cd_above);
    to[3] = _mm512_unpackhi_epi64(ab_above, cd_above);
}

VNNI static void lay_out_rows(struct rows *to, const char *from, int64_t blocks, int64_t stride, int type) {
    const int64_t size = type == Q8_0 ? sizeof(struct q8_0) : sizeof(struct q4_0);
    const __m512i sign = _mm512_set1_epi8((char)0x80), low = _mm512_set1_epi8(15);
    stride *= size;
    for (int64_t b = 0; b < blocks; b++, from += size, to++) {
        for (int i = 0; i < ROWS; i++) to->scales[i] = _cvtsh_ss(*(const uint16_t *)(from + i * stride));
        __m512i values[BLOCK / 4];
        read_rows(values, from + 2, stride);
        if (type == Q8_0) {
            read_rows(values + 4, from + 18, stride);
            for (int g = 0; g < BLOCK / 4; g++) values[g] = _mm512_xor_si512(values[g], sign); /* + 128 */
        } else
            for (int g = 0; g < BLOCK / 8; g++) {
                values[g + 4] = _mm512_and_si512(_mm512_srli_epi16(values[g], 4), low);
                values[g] = _mm512_and_si512(values[g], low);
            }
        for (int g = 0; g < BLOCK / 4; g++) _mm512_store_si512(to->values[g], values[g]);
    }
}

/* With `width` known where it is inlined, each J beyond it vanishes and the others are registers. GCC does not fold the
 * broadcast into vpdpbusd by itself. */
#define ZERO(J) __m512 sum##J = _mm512_setzero_ps();
#define START(J) __m512i dot##J = J < width ? _mm512_set1_epi32(block->starts[J]) : _mm512_setzero_si512();
#define DOT(J)                                                         \
    if (J < width)                                                     \
        __asm__("vpdpbusd %2%{1to16%}, %1, %0"                         \
                : "+v"(dot##J)                                         \
                : "v"(values), "m"(*(const int32_t *)(block->values[J] + 4 * g)));
#define ADD(J)                                                                              \
    if (J < width)                                                                          \
        sum##J = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot##J),                                \
                                 _mm512_mul_ps(scales, _mm512_set1_ps(block->scales[J])), sum##J);
#define MULTIPLY(J) \
    if (J < width) sum##J = _mm512_fmadd_ps(values, _mm512_set1_ps(columns[J * stride + i]), sum##J);
#define STORE(J) \
    if (J < width) _mm512_storeu_ps(to + J * to_stride, sum##J);

VNNI INLINE void tile(const struct rows *rows, const struct columns *block, int64_t blocks, float *to,
                      int64_t to_stride, const int width) {
    EACH(ZERO)
    for (int64_t b = 0; b < blocks; b++, rows++, block++) {
        EACH(START)
#pragma GCC unroll 8
        for (int g = 0; g < BLOCK / 4; g++) {
            const __m512i values = _mm512_load_si512(rows->values[g]);
            EACH(DOT)
        }
        const __m512 scales = _mm512_load_ps(rows->scales);
        EACH(ADD)
    }
    EACH(STORE)
}

VNNI static void tiles(const struct rows *rows, const struct columns *block, int64_t blocks, int64_t n, float *to,
                       int64_t stride) {
    for (; n >= COLUMNS; n -= COLUMNS, block += blocks, to += COLUMNS * stride)
        tile(rows, block, blocks, to, stride, COLUMNS);
#define REST(WIDTH) \
    if (n == WIDTH) tile(rows, block, blocks, to, stride, WIDTH);
    REST(1) REST(2) REST(3) REST(4) REST(5) REST(6) REST(7) REST(8) REST(9) REST(10) REST(11)
#undef REST
}

VNNI static void lay_out_halves(float *to, const uint16_t *from, int64_t k, int64_t stride) {
    for (int64_t i = 0; i < ROWS; i++)
        for (int64_t at = 0; at < k; at++) to[at * ROWS + i] = _cvtsh_ss(from[i * stride + at]);
}

VNNI INLINE void half_tile(const float *rows, const float *columns, int64_t k, int64_t stride, float *to,
                           int64_t to_stride, const int width) {
    EACH_HALF(ZERO)
    for (int64_t i = 0; i < k; i++, rows += ROWS) {
        const __m512 values = _mm512_load_ps(rows);
        EACH_HALF(MULTIPLY)
    }
    EACH_HALF(STORE)
}

VNNI static void half_tiles(const float *rows, const float *columns, int64_t k, int64_t stride, int64_t n, float *to,
                            int64_t to_stride) {
    for (; n >= HALF_COLUMNS; n -= HALF_COLUMNS, columns += HALF_COLUMNS * stride, to += HALF_COLUMNS * to_stride)
        half_tile(rows, columns, k, stride, to, to_stride, HALF_COLUMNS);
#define REST(WIDTH) \
    if (n == WIDTH) half_tile(rows, columns, k, stride, to, to_stride, WIDTH);
    REST(1) REST(2) REST(3) REST(4) REST(5) REST(6) REST(7)
#undef REST
}

/* Compute c[j][i] = sum over k of a[i][k] b[j][k], of m rows of a and n rows of b; this thread's share of it.
 *
 * Sizes and strides are in blocks of the types. False: it has not computed anything, and no other thread will. */
bool llamafile_sgemm(const struct params *params, int64_t m, int64_t n, int64_t k, const void *a, int64_t lda,
                     const void *b, int64_t ldb, void *c, int64_t ldc, int atype, int btype, int ctype) {
    static _Thread_local void *columns_at, *rows_at;
    static _Thread_local size_t columns_size, rows_size;
    const bool fits = on && n >= LEAST && m % ROWS == 0 && ctype == F32;
    const bool quantized = fits && btype == Q8_0 && (atype == Q8_0 || atype == Q4_0);
    const bool adapter = fits && btype == F32 && atype == F16 && (m <= RANKS || k <= RANKS);
    if (!quantized && !adapter)
        return theirs && theirs(params, m, n, k, a, lda, b, ldb, c, ldc, atype, btype, ctype);
    const int64_t strips = m / ROWS;
    const int64_t first = strips * params->thread / params->threads;
    const int64_t last = strips * (params->thread + 1) / params->threads;
    float *to = (float *)c + first * ROWS;
    count += params->thread == 0;
    if (adapter) {
        float *rows = room(&rows_at, &rows_size, sizeof(float) * ROWS * k);
        for (int64_t strip = first; strip < last; strip++, to += ROWS) {
            lay_out_halves(rows, (const uint16_t *)a + strip * ROWS * lda, k, lda);
            half_tiles(rows, b, k, ldb, n, to, ldc);
        }
        return true;
    }
    const int64_t size = atype == Q8_0 ? sizeof(struct q8_0) : sizeof(struct q4_0);
    struct rows *rows = room(&rows_at, &rows_size, sizeof(struct rows) * k);
    struct columns *columns =
        room(&columns_at, &columns_size, sizeof(struct columns) * ((n + COLUMNS - 1) / COLUMNS) * k);
    lay_out_columns(columns, b, k, ldb, n, atype == Q8_0 ? 128 : 8);
    for (int64_t strip = first; strip < last; strip++, to += ROWS) {
        lay_out_rows(rows, (const char *)a + strip * ROWS * lda * size, k, lda, atype);
        tiles(rows, columns, k, n, to, ldc);
    }
    return true;
}
