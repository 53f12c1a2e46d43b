// Generation on a CPU with AVX512 or AVX2: linear layers with bfloat16 or int8 weights, and a transformer block with a
// bfloat16 cache. decode.py compiles and calls this.
//
// With few rows the work is bandwidth-bound: every weight is read once, and what matters is to prefetch cache lines
// long before they are needed. Outputs and sums are float32, and so are inputs unless ROUND_INPUTS. A row is summed in the
// same order whatever the other rows, so it gives the same bits alone and in a batch.

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

// What differs between registers of 512 and of 256 bits. V(add_ps) is _mm512_add_ps or _mm256_add_ps, and INTS(and)
// _mm512_and_si512 or _mm256_and_si256.
#ifdef __AVX512BW__
#define V(name) _mm512_##name
#define INTS(name) _mm512_##name##_si512
enum { LANES = 16, ROWS = 8 };  // floats in a register; rows whose sums fit the registers
typedef __m512 Floats;
typedef __m512i Ints;

static inline Ints gather(const uint16_t *from, Ints steps)
{
    return _mm512_i32gather_epi32(steps, from, sizeof *from);
}
static inline Floats of_bits(Ints x) { return _mm512_castsi512_ps(x); }
static inline Ints four_times(const void *from) { return _mm512_broadcast_i32x4(_mm_loadu_si128(from)); }
static inline Floats of_int8(const char *from)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
}
static inline Floats nearest(Floats x) { return _mm512_roundscale_ps(x, 0); }
static inline Floats times_power(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }  // x 2^n
static inline Floats where_negative(Floats test, Floats yes, Floats no)
{
    return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(test, _mm512_setzero_ps(), _CMP_LT_OQ), yes);
}
static inline float total(Floats x) { return _mm512_reduce_add_ps(x); }
static inline float maximum(Floats x) { return _mm512_reduce_max_ps(x); }

static inline Ints load_halves(const uint16_t *from)
{
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
}
static inline void store_halves(uint16_t *to, Ints x) { _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(x)); }

// Where `from` has the byte, `codes` with j; `known` gets those places as well.
static inline Ints mark(Ints from, uint8_t byte, char j, Ints codes, uint64_t *known)
{
    __mmask64 here = _mm512_cmpeq_epi8_mask(from, _mm512_set1_epi8(byte));
    *known |= here;
    return _mm512_mask_mov_epi8(codes, here, _mm512_set1_epi8(j));
}
static const uint64_t ALL_BYTES = -1;
#else
#define V(name) _mm256_##name
#define INTS(name) _mm256_##name##_si256
enum { LANES = 8, ROWS = 6 };
typedef __m256 Floats;
typedef __m256i Ints;

static inline Ints gather(const uint16_t *from, Ints steps)
{
    return _mm256_i32gather_epi32((const int *)from, steps, sizeof *from);
}
static inline Floats of_bits(Ints x) { return _mm256_castsi256_ps(x); }
static inline Ints four_times(const void *from) { return _mm256_broadcastsi128_si256(_mm_loadu_si128(from)); }
static inline Floats of_int8(const char *from)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
}
static inline Floats nearest(Floats x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline Floats times_power(Floats x, Floats n)  // x 2^n; 0 for n < -126
{
    Ints power = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(x, of_bits(_mm256_slli_epi32(_mm256_max_epi32(power, _mm256_setzero_si256()), 23)));
}
static inline Floats where_negative(Floats test, Floats yes, Floats no)
{
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(test, _mm256_setzero_ps(), _CMP_LT_OQ));
}
static inline float total(Floats x)
{
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
static inline float maximum(Floats x)
{
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

static inline Ints load_halves(const uint16_t *from)
{
    return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
}
static inline void store_halves(uint16_t *to, Ints x)  // each below 2^16
{
    _mm_storeu_si128((__m128i *)to, _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
}

static inline Ints mark(Ints from, uint8_t byte, char j, Ints codes, uint64_t *known)
{
    Ints here = _mm256_cmpeq_epi8(from, _mm256_set1_epi8(byte));
    *known |= (uint32_t)_mm256_movemask_epi8(here);
    return _mm256_blendv_epi8(codes, _mm256_set1_epi8(j), here);
}
static const uint64_t ALL_BYTES = (uint32_t)-1;
#endif

static inline Ints load(const void *from) { return INTS(loadu)((const Ints *)from); }

enum { OUTPUTS = 2 * LANES, AHEAD = 8192 };  // per tile row; bytes to prefetch
const int tile_outputs = OUTPUTS;

// Whether products round their inputs to bfloat16, as PyTorch's do. With AVX512-BF16 one instruction then multiplies two
// of them per lane, which counts where there are many rows.
#ifdef ROUND_INPUTS
enum { ROUNDED = 1 };
typedef uint16_t Input;
#else
enum { ROUNDED = 0 };
typedef float Input;
#endif

#define EACH_ROW _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++)
#define EACH_HALF _Pragma("GCC unroll 2") for (int h = 0; h < 2; h++)

static inline Floats exponential(Floats x)  // for x <= 0, to a relative error of 3e-7
{
    static const float series[] = {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f};
    x = V(max_ps)(V(set1_ps)(-104), x);  // exp is 0 there; this operand order keeps NaN
    Floats twos = nearest(V(mul_ps)(x, V(set1_ps)(1.44269504f)));
    x = V(fnmadd_ps)(twos, V(set1_ps)(0.693145752f), x);  // ln 2 in two parts, for precision
    x = V(fnmadd_ps)(twos, V(set1_ps)(1.42860677e-6f), x);
    Floats sum = V(setzero_ps)();
    for (int i = 0; i < 7; i++)
        sum = V(fmadd_ps)(sum, x, V(set1_ps)(series[i]));
    return times_power(sum, twos);
}

static inline Floats gelu(Floats x)  // tanh form: x / (1 + exp(-z)) with z = sqrt(8 / pi) (x + 0.044715 x^3)
{
    Floats one = V(set1_ps)(1), cubic = V(mul_ps)(V(set1_ps)(0.044715f), V(mul_ps)(x, x));
    Floats z = V(mul_ps)(V(mul_ps)(V(set1_ps)(1.5957691216f), x), V(add_ps)(one, cubic));
    Floats small = exponential(of_bits(INTS(or)(INTS(castps)(z), V(set1_epi32)(1 << 31))));  // of -|z|
    return V(div_ps)(where_negative(z, V(mul_ps)(x, small), x), V(add_ps)(one, small));
}

// y = x w' * scale + bias with x (M, K), scale and bias (N), y (M, N); K is a multiple of 4, N of 32. int8 weights have
// shape (N / OUTPUTS, K, OUTPUTS).
//
// bfloat16 weights are compressed without loss, mostly to 12 bits: of the 256 values of their upper byte (the sign and
// seven bits of the exponent) sixteen cover nearly all of a matrix. A matrix is stored as tiles of OUTPUTS outputs, a
// tile as blocks of 4 inputs. A tile starts with one byte per block: whether it is packed. A plain block has shape
// (2, 2, LANES, 2): pairs of inputs, halves of the outputs, outputs, inputs. A packed block holds the lower bytes of
// the first pair of inputs, those of the second, and then half a byte per weight: the index of its upper byte among
// the sixteen.
typedef struct {
    long bytes, K, N;  // bytes per weight: 2 or 1
    const char *w;
    const int64_t *starts;  // offsets of the tiles
    const uint8_t *upper;  // the sixteen upper bytes
    const float *scale, *bias;
} Linear;

enum { INPUTS = 4, REGISTER = 4 * LANES, PACKED = 3 * REGISTER, PLAIN = 4 * REGISTER };  // per block; sizes in bytes

static inline long flags_size(long K)
{
    return (K / INPUTS + 63) / 64 * 64;
}

typedef enum { STORE, ADD, GELU } Finish;  // what to do with a sum: store it, add it to y, or apply GELU

static inline Floats even(Ints pairs) { return of_bits(V(slli_epi32)(pairs, 16)); }  // bfloat16 is float32's upper half
static inline Floats odd(Ints pairs) { return of_bits(INTS(and)(pairs, V(set1_epi32)(0xffff0000))); }
static inline Ints pair(Floats even, Floats odd)  // of numbers that are bfloat16's
{
    return INTS(or)(V(srli_epi32)(INTS(castps)(even), 16), INTS(castps)(odd));
}

static inline uint16_t to_bfloat16(float x)  // rounds to nearest even
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Reads a block of bfloat16 weights: pairs of inputs, halves of the outputs. Returns a pointer to the next one.
static inline __attribute__((always_inline)) const char *read_bfloat16(
    const char *w, int packed, Ints upper, Ints pairs[2][2])
{
    Ints nibble = V(set1_epi8)(15);
    if (packed) {
        Ints codes = load(w + 2 * REGISTER);
        for (int i = 0; i < 2; i++, codes = V(srli_epi16)(codes, 4)) {
            Ints lowers = load(w + REGISTER * i);
            Ints uppers = V(shuffle_epi8)(upper, INTS(and)(codes, nibble));
            pairs[i][0] = V(unpacklo_epi8)(lowers, uppers);
            pairs[i][1] = V(unpackhi_epi8)(lowers, uppers);
        }
        w += PACKED;
    } else {
        for (int i = 0; i < 4; i++)
            pairs[i / 2][i % 2] = load(w + REGISTER * i);
        w += PLAIN;
    }
    return w;
}

// Reads a block of int8 weights; returns a pointer to the next one.
static inline __attribute__((always_inline)) const char *read_int8(const char *w, Floats weights[INPUTS][2])
{
    for (int i = 0; i < INPUTS; i++)
        EACH_HALF {
            weights[i][h] = of_int8(w);
            w += LANES;
        }
    return w;
}

static void finish_rows(const Linear *l, Finish finish, long n, int rows, const Floats sums[ROWS][2], float *y)
{
    for (int r = 0; r < rows; r++)
        for (int h = 0; h < 2; h++) {
            const long at = n + LANES * h;
            Floats out = V(fmadd_ps)(sums[r][h], V(loadu_ps)(l->scale + at), V(loadu_ps)(l->bias + at));
            if (finish == ADD)
                out = V(add_ps)(out, V(loadu_ps)(y + r * l->N + at));
            else if (finish == GELU)
                out = gelu(out);
            V(storeu_ps)(y + r * l->N + at, out);
        }
}

// To `sum` adds the products of two pairs of bfloat16 per lane.
static inline Floats add_products(Floats sum, Ints a, Ints b)
{
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
    return V(fmadd_ps)(odd(a), odd(b), V(fmadd_ps)(even(a), even(b), sum));
#endif
}

// OUTPUTS outputs of 1 to ROWS rows. `rows` and `bytes` (per weight) are constants at every call, so once this is
// inlined the sums stay in registers.
static inline __attribute__((always_inline)) void tile(
    const int rows, const int bytes, const Linear *l, Finish finish, long n, const Input *x, float *y)
{
    const long K = l->K;
    const char *w = l->w + (bytes == 2 ? l->starts[n / OUTPUTS] : n * K), *packed = w;
    const Ints upper = four_times(l->upper);
    if (bytes == 2)
        w += flags_size(K);
    Floats sum[ROWS][2], sums[ROWS][2];
    EACH_ROW EACH_HALF sum[r][h] = V(setzero_ps)();
    for (long k = 0; k < K; k += INPUTS) {
        Floats weights[INPUTS][2];
        Ints pairs[INPUTS / 2][2];
        for (int line = 0; line < (bytes == 2 ? PACKED : INPUTS * OUTPUTS); line += 64)
            _mm_prefetch(w + line + AHEAD, _MM_HINT_T1);
        if (bytes == 2) {
            w = read_bfloat16(w, packed[k / INPUTS], upper, pairs);
            for (int i = 0; i < INPUTS; i++)
                EACH_HALF weights[i][h] = i % 2 ? odd(pairs[i / 2][h]) : even(pairs[i / 2][h]);
        } else {
            w = read_int8(w, weights);
            for (int i = 0; i < INPUTS; i += 2)
                EACH_HALF pairs[i / 2][h] = pair(weights[i][h], weights[i + 1][h]);
        }
#ifdef ROUND_INPUTS
        EACH_ROW _Pragma("GCC unroll 2") for (int i = 0; i < INPUTS / 2; i++) {
            int32_t two;
            memcpy(&two, x + r * K + k + 2 * i, sizeof two);
            EACH_HALF sum[r][h] = add_products(sum[r][h], pairs[i][h], V(set1_epi32)(two));
        }
#else
        EACH_ROW _Pragma("GCC unroll 4") for (int i = 0; i < INPUTS; i++) {
            Floats in = V(set1_ps)(x[r * K + k + i]);
            EACH_HALF sum[r][h] = V(fmadd_ps)(weights[i][h], in, sum[r][h]);
        }
#endif
    }
    EACH_ROW EACH_HALF sums[r][h] = sum[r][h];
    finish_rows(l, finish, n, rows, sums, y);
}

static inline __attribute__((always_inline)) void products(
    const int bytes, const Linear *l, Finish finish, long M, const Input *x, float *y)
{
#pragma omp for schedule(static)
    for (long n = 0; n < l->N; n += OUTPUTS)
        for (long m = 0; m < M;) {  // the tile's weights stay cached for all rows
            const Input *in = x + m * l->K;
            float *out = y + m * l->N;
            if (M - m >= ROWS) {
                tile(ROWS, bytes, l, finish, n, in, out);
                m += ROWS;
            } else if (M - m >= 4) {
                tile(4, bytes, l, finish, n, in, out);
                m += 4;
            } else if (M - m >= 2) {
                tile(2, bytes, l, finish, n, in, out);
                m += 2;
            } else {
                tile(1, bytes, l, finish, n, in, out);
                m += 1;
            }
        }
}

// Rows to multiply by all of a matrix before the next, so that they stay in the second-level cache.
enum { SLAB = ROUNDED ? 128 : 64 };

static inline long rows_of_slab(long m, long M)
{
    return M - m < SLAB ? M - m : SLAB;
}

// To be called by every thread of an OpenMP team. If inputs are rounded, `room` is for x (M, K) in bfloat16.
static void multiply(const Linear *l, Finish finish, long M, const float *x, float *y, Input *room)
{
#ifdef ROUND_INPUTS
#pragma omp for schedule(static)
    for (long m = 0; m < M; m++)
        for (long k = 0; k < l->K; k++)
            room[m * l->K + k] = to_bfloat16(x[m * l->K + k]);
    const Input *in = room;
#else
    const Input *in = x;
#endif
    if (l->bytes == 2)
        products(2, l, finish, M, in, y);
    else
        products(1, l, finish, M, in, y);
}

// Packs the block of w (N, K) that w points to; returns its size in bytes.
static inline long pack_block(const uint16_t *w, long K, const uint8_t *upper, Ints block[4])
{
    int32_t rows[LANES];
    for (int i = 0; i < LANES; i++)
        rows[i] = i * K;
    Ints pairs[4], lower[2], all_codes = INTS(setzero)(), byte = V(set1_epi16)(255);
    uint64_t known = ALL_BYTES;
    for (int i = 0; i < 4; i++)
        pairs[i] = gather(w + i % 2 * LANES * K + i / 2 * 2, load(rows));
    for (int i = 0; i < 2; i++) {
        Ints a = pairs[2 * i], b = pairs[2 * i + 1], codes = INTS(setzero)();
        Ints uppers = V(packus_epi16)(V(srli_epi16)(a, 8), V(srli_epi16)(b, 8));  // unpack_epi8's order
        uint64_t found = 0;
        for (int j = 0; j < 16; j++)
            codes = mark(uppers, upper[j], j, codes, &found);
        known &= found;
        lower[i] = V(packus_epi16)(INTS(and)(a, byte), INTS(and)(b, byte));
        all_codes = INTS(or)(all_codes, V(slli_epi16)(codes, 4 * i));
    }
    const int packed = known == ALL_BYTES;
    block[0] = packed ? lower[0] : pairs[0];
    block[1] = packed ? lower[1] : pairs[1];
    block[2] = packed ? all_codes : pairs[2];
    block[3] = pairs[3];
    return packed ? PACKED : PLAIN;
}

// Computes the offset of each tile of w (N, K); returns the total size in bytes.
long plan(long K, long N, const uint16_t *w, const uint8_t *upper, int64_t *starts)
{
#pragma omp parallel for
    for (long n = 0; n < N; n += OUTPUTS) {
        Ints block[4];
        starts[n / OUTPUTS] = flags_size(K);
        for (long k = 0; k < K; k += INPUTS)
            starts[n / OUTPUTS] += pack_block(w + n * K + k, K, upper, block);
    }
    long size = 0;
    for (long t = 0; t < N / OUTPUTS; t++) {
        const long of_tile = starts[t];
        starts[t] = size;
        size += of_tile;
    }
    return size;
}

void pack(long K, long N, const uint16_t *w, const uint8_t *upper, const int64_t *starts, char *out)
{
#pragma omp parallel for
    for (long n = 0; n < N; n += OUTPUTS) {
        Ints block[4];
        char *flags = out + starts[n / OUTPUTS], *to = flags + flags_size(K);
        for (long k = 0; k < K; k += INPUTS) {
            const long bytes = pack_block(w + n * K + k, K, upper, block);
            flags[k / INPUTS] = bytes == PACKED;
            memcpy(to, block, bytes);
            to += bytes;
        }
    }
}

void linear(const Linear *l, long M, const float *x, float *y)
{
    Input *room = malloc(ROUNDED * SLAB * l->K * sizeof *room);
#pragma omp parallel
    for (long m = 0; m < M; m += SLAB)
        multiply(l, STORE, rows_of_slab(m, M), x + m * l->K, y + m * l->N, room);
    free(room);
}

static inline Floats widen(const uint16_t *from)
{
    return of_bits(V(slli_epi32)(load_halves(from), 16));
}

static inline void narrow(uint16_t *to, Floats x)  // rounds to nearest even
{
    Ints bits = INTS(castps)(x), odd = INTS(and)(V(srli_epi32)(bits, 16), V(set1_epi32)(1));
    bits = V(add_epi32)(bits, V(add_epi32)(odd, V(set1_epi32)(0x7fff)));
    store_halves(to, V(srli_epi32)(bits, 16));
}

enum { KEYS = 4 * LANES, QUERIES = 32 };  // QUERIES of a prompt share a block of at most KEYS keys

// Transposes n keys (n, D), LANES at a time, to floats (n / LANES, D, LANES); repeats the last to fill the LANES.
static void transpose(const uint16_t *keys, long n, long D, float *out)
{
    int32_t steps[LANES];
    for (long s = 0; s < n; s += LANES) {
        for (long j = 0; j < LANES; j++)
            steps[j] = (s + j < n ? s + j : n - 1) * D;
        for (long d = 0; d < D; d += 2, out += 2 * LANES) {
            Ints pairs = gather(keys + d, load(steps));
            V(storeu_ps)(out, even(pairs));
            V(storeu_ps)(out + LANES, odd(pairs));
        }
    }
}

// Products of a query with LANES keys from transpose().
static inline Floats scores_of(const float *query, const float *transposed, long D)
{
    Floats sums[4] = {V(setzero_ps)(), V(setzero_ps)(), V(setzero_ps)(), V(setzero_ps)()};
    for (long d = 0; d < D; d += 4)
        for (int i = 0; i < 4; i++)  // four sums, as each addition waits for the one before
            sums[i] = V(fmadd_ps)(V(set1_ps)(query[d + i]), V(loadu_ps)(transposed + (d + i) * LANES), sums[i]);
    return V(add_ps)(V(add_ps)(sums[0], sums[1]), V(add_ps)(sums[2], sums[3]));
}

// Adds n values, at most KEYS, to `out` by the weights of their keys. largest, sum_of_weights and out are those of an
// online softmax (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018).
static inline void attend_to_block(
    long n, long D, float scale, const float *query, const uint16_t *keys, const float *transposed,
    const uint16_t *values, float *largest, float *sum_of_weights, float *out)
{
    float score[KEYS], before = *largest;
    if (transposed)
        for (long s = 0; s < n; s += LANES)
            V(storeu_ps)(score + s, scores_of(query, transposed + s * D, D));
    else
        for (long j = 0; j < n; j++) {
            Floats sum = V(setzero_ps)();
            for (long d = 0; d < D; d += LANES)
                sum = V(fmadd_ps)(V(loadu_ps)(query + d), widen(keys + j * D + d), sum);
            score[j] = total(sum);
        }
    for (long j = n; j % LANES; j++)
        score[j] = -INFINITY;
    Floats most = V(loadu_ps)(score), sums = V(setzero_ps)();
    for (long s = LANES; s < n; s += LANES)
        most = V(max_ps)(most, V(loadu_ps)(score + s));
    const float now = maximum(most) * scale;
    *largest = now > before ? now : before;
    for (long s = 0; s < n; s += LANES) {
        Floats scaled = V(fmsub_ps)(V(loadu_ps)(score + s), V(set1_ps)(scale), V(set1_ps)(*largest));
        Floats weights = exponential(scaled);
        V(storeu_ps)(score + s, weights);
        sums = V(add_ps)(sums, weights);
    }
    const float shrink = V(cvtss_f32)(exponential(V(set1_ps)(before - *largest)));
    *sum_of_weights = *sum_of_weights * shrink + total(sums);
    for (long d = 0; d < D; d += LANES) {
        Floats sum = V(mul_ps)(V(loadu_ps)(out + d), V(set1_ps)(shrink));
        for (long j = 0; j < n; j++)
            sum = V(fmadd_ps)(V(set1_ps)(score[j]), widen(values + j * D + d), sum);
        V(storeu_ps)(out + d, sum);
    }
}

// Stores the keys and values of new tokens, then attends with each query to all tokens up to its own.
// qkv (B, T, 3, H, D); keys, values (B, H, L, D); positions (B, T) of the new tokens; y (B, T, H, D); D is a multiple
// of LANES.
static void attend(
    long B, long T, long H, long L, long D, float scale, const float *qkv, uint16_t *keys, uint16_t *values,
    const int64_t *positions, float *y)
{
#pragma omp for schedule(static)
    for (long i = 0; i < B * T * H; i++) {
        const long token = i / H, head = i % H, to = ((token / T * H + head) * L + positions[token]) * D;
        const float *k = qkv + (token * 3 + 1) * H * D + head * D, *v = k + H * D;
        for (long d = 0; d < D; d += LANES) {
            narrow(keys + to + d, V(loadu_ps)(k + d));
            narrow(values + to + d, V(loadu_ps)(v + d));
        }
    }
    const long groups = (T + QUERIES - 1) / QUERIES;
#pragma omp for schedule(dynamic)
    for (long i = 0; i < B * H * groups; i++) {
        const long row = i / groups / H, head = i / groups % H, begin = row * T + i % groups * QUERIES;
        const long end = begin + QUERIES < (row + 1) * T ? begin + QUERIES : (row + 1) * T, last = positions[end - 1];
        const uint16_t *key = keys + i / groups * L * D, *value = values + i / groups * L * D;
        float largest[QUERIES], sum_of_weights[QUERIES], transposed[T > 1 ? D * KEYS : 1];
        for (long token = begin; token < end; token++) {
            largest[token - begin] = -INFINITY;
            sum_of_weights[token - begin] = 0;
            memset(y + (token * H + head) * D, 0, D * sizeof *y);
        }
        for (long s = 0; s <= last; s += KEYS, key += KEYS * D, value += KEYS * D) {
            const long after = last + 1 - s - KEYS, ahead = after < 0 ? 0 : after < KEYS ? after : KEYS;
            for (long byte = 0; byte < ahead * D * 2; byte += 64) {
                _mm_prefetch((char *)(key + KEYS * D) + byte, _MM_HINT_T1);
                _mm_prefetch((char *)(value + KEYS * D) + byte, _MM_HINT_T1);
            }
            if (T > 1)
                transpose(key, after < 0 ? KEYS + after : KEYS, D, transposed);
            for (long token = begin; token < end; token++) {
                const long left = positions[token] + 1 - s, n = left < KEYS ? left : KEYS, j = token - begin;
                if (n > 0)
                    attend_to_block(
                        n, D, scale, qkv + token * 3 * H * D + head * D, key, T > 1 ? transposed : NULL, value,
                        largest + j, sum_of_weights + j, y + (token * H + head) * D);
            }
        }
        for (long token = begin; token < end; token++) {
            float *out = y + (token * H + head) * D;
            for (long d = 0; d < D; d += LANES)
                V(storeu_ps)(out + d, V(div_ps)(V(loadu_ps)(out + d), V(set1_ps)(sum_of_weights[token - begin])));
        }
    }
}

typedef struct {
    const float *weight, *bias;
} Norm;

// y = LayerNorm(x) with x and y (M, C), which may alias; C is a multiple of LANES.
static void layer_norm(const Norm *norm, float epsilon, long M, long C, const float *x, float *y)
{
#pragma omp for schedule(static)
    for (long m = 0; m < M; m++) {
        const float *in = x + m * C;
        Floats sum = V(setzero_ps)(), squares = V(setzero_ps)();
        for (long c = 0; c < C; c += LANES)
            sum = V(add_ps)(sum, V(loadu_ps)(in + c));
        const Floats mean = V(set1_ps)(total(sum) / C);
        for (long c = 0; c < C; c += LANES) {
            Floats difference = V(sub_ps)(V(loadu_ps)(in + c), mean);
            squares = V(fmadd_ps)(difference, difference, squares);
        }
        const Floats factor = V(set1_ps)(1 / sqrtf(total(squares) / C + epsilon));
        for (long c = 0; c < C; c += LANES) {
            Floats out = V(mul_ps)(V(sub_ps)(V(loadu_ps)(in + c), mean), factor);
            out = V(fmadd_ps)(out, V(loadu_ps)(norm->weight + c), V(loadu_ps)(norm->bias + c));
            V(storeu_ps)(y + m * C + c, out);
        }
    }
}

typedef struct {
    Linear attn_in, attn_out, mlp_in, mlp_out;
    Norm ln_1, ln_2;
    long n_head, post_norm;
    float scale, epsilon;  // of the attention scores; of the norms
} Block;

// What a Block computes for each position by itself: here up to the queries, keys and values, in leave() the rest. Both
// are called by every thread of an OpenMP team. x (M, C), qkv (M, 3 C); `scratch` as block() allocates it; C and the
// hidden width are multiples of 32.
static void enter(const Block *b, long M, const float *x, float *qkv, float *scratch)
{
    const long C = b->attn_out.N;
    Input *room = (Input *)(scratch + SLAB * C);
    for (long m = 0; m < M; m += SLAB, x += SLAB * C) {
        const long rows = rows_of_slab(m, M);
        if (!b->post_norm)
            layer_norm(&b->ln_1, b->epsilon, rows, C, x, scratch);
        multiply(&b->attn_in, STORE, rows, b->post_norm ? x : scratch, qkv + m * 3 * C, room);
    }
}

// heads (M, C) is what attention gathered; y (M, C) holds the Block's input and gets its output.
static void leave(const Block *b, long M, const float *heads, float *y, float *scratch)
{
    const long C = b->attn_out.N;
    float *hidden = scratch + SLAB * C;
    Input *room = (Input *)(hidden + SLAB * b->mlp_in.N);
    for (long m = 0; m < M; m += SLAB, y += SLAB * C) {
        const long rows = rows_of_slab(m, M);
        float *in = b->post_norm ? y : scratch;  // of the MLP
        multiply(&b->attn_out, ADD, rows, heads + m * C, y, room);
        layer_norm(b->post_norm ? &b->ln_1 : &b->ln_2, b->epsilon, rows, C, y, in);
        multiply(&b->mlp_in, GELU, rows, in, hidden, room);
        multiply(&b->mlp_out, ADD, rows, hidden, y, room);
        if (b->post_norm)
            layer_norm(&b->ln_2, b->epsilon, rows, C, y, y);
    }
}

// model.py's Block for T new tokens per row: x and y (B, T, C). The rest as in attend().
void block(
    const Block *b, long B, long T, long L, const float *x, uint16_t *keys, uint16_t *values, const int64_t *positions,
    float *y)
{
    const long C = b->attn_out.N, H = b->n_head, wide = b->mlp_in.N > C ? b->mlp_in.N : C;
    float *scratch = malloc(SLAB * (C + b->mlp_in.N + ROUNDED * wide) * sizeof *scratch);
    float *qkv = malloc(4 * B * T * C * sizeof *qkv), *heads = qkv + 3 * B * T * C;
    memcpy(y, x, B * T * C * sizeof *y);
#pragma omp parallel
    {
        enter(b, B * T, x, qkv, scratch);
        attend(B, T, H, L, C / H, b->scale, qkv, keys, values, positions, heads);
        leave(b, B * T, heads, y, scratch);
    }
    free(qkv);
    free(scratch);
}
