// Decoding on a CPU with AVX512: linear layers with bfloat16 or int8 weights, and a transformer block for one new token
// per row with a bfloat16 cache. decode.py compiles and calls this.
//
// With few rows the work is bandwidth-bound: every weight is read once, and what matters is to prefetch cache lines
// long before they are needed. Inputs, sums and outputs are float32. A row is summed in the same order whatever the
// other rows, so it gives the same bits alone and in a batch.

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { LANES = 16, OUTPUTS = 2 * LANES, AHEAD = 8192 };  // floats per register, per tile row; bytes to prefetch

#define EACH_ROW _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++)
#define EACH_HALF _Pragma("GCC unroll 2") for (int h = 0; h < 2; h++)

static inline __m512 exponential(__m512 x)  // for x <= 0, to a relative error of 3e-7
{
    static const float series[] = {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f};
    x = _mm512_max_ps(_mm512_set1_ps(-104), x);  // exp is 0 there; this operand order keeps NaN
    __m512 twos = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    x = _mm512_fnmadd_ps(twos, _mm512_set1_ps(0.693145752f), x);  // ln 2 in two parts, for precision
    x = _mm512_fnmadd_ps(twos, _mm512_set1_ps(1.42860677e-6f), x);
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < 7; i++)
        sum = _mm512_fmadd_ps(sum, x, _mm512_set1_ps(series[i]));
    return _mm512_scalef_ps(sum, twos);
}

static inline __m512 gelu(__m512 x)  // tanh form: x / (1 + exp(-z)) with z = sqrt(8 / pi) (x + 0.044715 x^3)
{
    __m512 one = _mm512_set1_ps(1), cubic = _mm512_mul_ps(_mm512_set1_ps(0.044715f), _mm512_mul_ps(x, x));
    __m512 z = _mm512_mul_ps(_mm512_mul_ps(_mm512_set1_ps(1.5957691216f), x), _mm512_add_ps(one, cubic));
    __m512 small = exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(z)));
    __mmask16 negative = _mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_div_ps(_mm512_mask_mul_ps(x, negative, x, small), _mm512_add_ps(one, small));
}

// y = x w' * scale + bias with x (M, K), scale and bias (N), y (M, N); K is a multiple of 4, N of 32. int8 weights have
// shape (N / 32, K, 32).
//
// bfloat16 weights are compressed without loss, mostly to 12 bits: of the 256 values of their upper byte (the sign and
// seven bits of the exponent) sixteen cover nearly all of a matrix. A matrix is stored as tiles of 32 outputs, a tile
// as blocks of 4 inputs. A tile starts with one byte per block: whether it is packed. A plain block has shape
// (2, 2, 16, 2): pairs of inputs, halves of the outputs, outputs, inputs. A packed block holds the lower bytes of the
// first pair of inputs, those of the second, and then half a byte per weight: the index of its upper byte among the
// sixteen.
typedef struct {
    long bytes, K, N;  // bytes per weight: 2 or 1
    const char *w;
    const int64_t *starts;  // offsets of the tiles
    const uint8_t *upper;  // the sixteen upper bytes
    const float *scale, *bias;
} Linear;

enum { INPUTS = 4, PACKED = 192, PLAIN = 256 };  // inputs per block; bytes per block

static inline long flags_size(long K)
{
    return (K / INPUTS + 63) / 64 * 64;
}

typedef enum { STORE, ADD, GELU } Finish;  // what to do with a sum: store it, add it to y, or apply GELU

// These two read a block and return a pointer to the next one.
static inline __attribute__((always_inline)) const char *read_bfloat16(
    const char *w, int packed, __m512i upper, __m512 weights[INPUTS][2])
{
    __m512i pairs[2][2], nibble = _mm512_set1_epi8(15);
    if (packed) {
        __m512i codes = _mm512_loadu_si512(w + 128);
        for (int i = 0; i < 2; i++, codes = _mm512_srli_epi16(codes, 4)) {
            __m512i lowers = _mm512_loadu_si512(w + 64 * i);
            __m512i uppers = _mm512_shuffle_epi8(upper, _mm512_and_si512(codes, nibble));
            pairs[i][0] = _mm512_unpacklo_epi8(lowers, uppers);
            pairs[i][1] = _mm512_unpackhi_epi8(lowers, uppers);
        }
        w += PACKED;
    } else {
        for (int i = 0; i < 4; i++)
            pairs[i / 2][i % 2] = _mm512_loadu_si512(w + 64 * i);
        w += PLAIN;
    }
    for (int i = 0; i < 2; i++)
        EACH_HALF {  // bfloat16 is the upper half of float32
            __m512i second = _mm512_and_si512(pairs[i][h], _mm512_set1_epi32(0xffff0000));
            weights[2 * i][h] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs[i][h], 16));
            weights[2 * i + 1][h] = _mm512_castsi512_ps(second);
        }
    return w;
}

static inline __attribute__((always_inline)) const char *read_int8(const char *w, __m512 weights[INPUTS][2])
{
    for (int i = 0; i < INPUTS; i++)
        EACH_HALF {
            weights[i][h] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)w)));
            w += LANES;
        }
    return w;
}

static void finish_rows(const Linear *l, Finish finish, long n, int rows, const __m512 sums[8][2], float *y)
{
    for (int r = 0; r < rows; r++)
        for (int h = 0; h < 2; h++) {
            const long at = n + LANES * h;
            __m512 out = _mm512_fmadd_ps(sums[r][h], _mm512_loadu_ps(l->scale + at), _mm512_loadu_ps(l->bias + at));
            if (finish == ADD)
                out = _mm512_add_ps(out, _mm512_loadu_ps(y + r * l->N + at));
            else if (finish == GELU)
                out = gelu(out);
            _mm512_storeu_ps(y + r * l->N + at, out);
        }
}

// OUTPUTS outputs of 1 to 8 rows. `rows` and `bytes` (per weight) are constants at every call, so once this is inlined
// the sums stay in registers.
static inline __attribute__((always_inline)) void tile(
    const int rows, const int bytes, const Linear *l, Finish finish, long n, const float *x, float *y)
{
    const long K = l->K;
    const char *w = l->w + (bytes == 2 ? l->starts[n / OUTPUTS] : n * K), *packed = w;
    const __m512i upper = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)l->upper));
    if (bytes == 2)
        w += flags_size(K);
    __m512 sum[8][2], sums[8][2];
    EACH_ROW EACH_HALF sum[r][h] = _mm512_setzero_ps();
    for (long k = 0; k < K; k += INPUTS) {
        __m512 weights[INPUTS][2];
        for (int line = 0; line < bytes + 1; line++)
            _mm_prefetch(w + 64 * line + AHEAD, _MM_HINT_T1);
        w = bytes == 2 ? read_bfloat16(w, packed[k / INPUTS], upper, weights) : read_int8(w, weights);
        EACH_ROW _Pragma("GCC unroll 4") for (int i = 0; i < INPUTS; i++) {
            __m512 in = _mm512_set1_ps(x[r * K + k + i]);
            EACH_HALF sum[r][h] = _mm512_fmadd_ps(weights[i][h], in, sum[r][h]);
        }
    }
    EACH_ROW EACH_HALF sums[r][h] = sum[r][h];
    finish_rows(l, finish, n, rows, sums, y);
}

static inline __attribute__((always_inline)) void products(
    const int bytes, const Linear *l, Finish finish, long M, const float *x, float *y)
{
#pragma omp for schedule(static)
    for (long n = 0; n < l->N; n += OUTPUTS)
        for (long m = 0; m < M;) {  // the tile's weights stay cached for all rows
            const float *in = x + m * l->K;
            float *out = y + m * l->N;
            switch (M - m) {
            case 1: tile(1, bytes, l, finish, n, in, out); m += 1; break;
            case 2: case 3: tile(2, bytes, l, finish, n, in, out); m += 2; break;
            case 4: case 5: case 6: case 7: tile(4, bytes, l, finish, n, in, out); m += 4; break;
            default: tile(8, bytes, l, finish, n, in, out); m += 8;
            }
        }
}

// To be called by every thread of an OpenMP team.
static void multiply(const Linear *l, Finish finish, long M, const float *x, float *y)
{
    if (l->bytes == 2)
        products(2, l, finish, M, x, y);
    else
        products(1, l, finish, M, x, y);
}

// Packs the block of w (N, K) that w points to; returns its size in bytes.
static inline long pack_block(const uint16_t *w, long K, const uint8_t *upper, __m512i block[4])
{
    __m512i outputs = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512i rows = _mm512_mullo_epi32(outputs, _mm512_set1_epi32(K)), byte = _mm512_set1_epi16(255);
    __m512i pairs[4], lower[2], all_codes = _mm512_setzero_si512();
    __mmask64 known = -1;
    for (int i = 0; i < 4; i++)
        pairs[i] = _mm512_i32gather_epi32(rows, w + i % 2 * LANES * K + i / 2 * 2, sizeof *w);
    for (int i = 0; i < 2; i++) {
        __m512i a = pairs[2 * i], b = pairs[2 * i + 1], codes = _mm512_setzero_si512();
        __m512i uppers = _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8));  // unpack_epi8's order
        __mmask64 found = 0;
        for (int j = 0; j < 16; j++) {
            __mmask64 here = _mm512_cmpeq_epi8_mask(uppers, _mm512_set1_epi8(upper[j]));
            codes = _mm512_mask_mov_epi8(codes, here, _mm512_set1_epi8(j));
            found |= here;
        }
        known &= found;
        lower[i] = _mm512_packus_epi16(_mm512_and_si512(a, byte), _mm512_and_si512(b, byte));
        all_codes = _mm512_or_si512(all_codes, _mm512_slli_epi16(codes, 4 * i));
    }
    const int packed = known == (__mmask64)-1;
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
        __m512i block[4];
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
        __m512i block[4];
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
#pragma omp parallel
    multiply(l, STORE, M, x, y);
}

static inline __m512 widen(__mmask16 lanes, const uint16_t *from)
{
    __m256i half = _mm256_maskz_loadu_epi16(lanes, from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

static inline void narrow(__mmask16 lanes, uint16_t *to, __m512 x)  // rounds to nearest even
{
    __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    _mm256_mask_storeu_epi16(to, lanes, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
}

// Loops over D numbers, sixteen at a time, with a mask for the remainder.
#define EACH_PART \
    for (long d = 0, lanes; lanes = D - d < LANES ? (1 << (D - d)) - 1 : 0xffff, d < D; d += LANES)

// Stores the key and value of one new token per row, then attends with its query to the whole row, by an online softmax
// (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018) over 16 keys at a time.
// qkv (B, 3, H, D); keys, values (B, H, L, D); seen (B), the number of tokens stored before; y (B, H, D).
static void attend(
    long B, long H, long L, long D, float scale, const float *qkv, uint16_t *keys, uint16_t *values,
    const int64_t *seen, float *y)
{
#pragma omp for schedule(dynamic)
    for (long i = 0; i < B * H; i++) {
        const float *q = qkv + i / H * 3 * H * D + i % H * D, *k = q + H * D, *v = k + H * D;
        const long last = seen[i / H];
        uint16_t *key = keys + i * L * D, *value = values + i * L * D;
        float *out = y + i * D, largest = -INFINITY, total = 0;
        EACH_PART {
            narrow(lanes, key + last * D + d, _mm512_maskz_loadu_ps(lanes, k + d));
            narrow(lanes, value + last * D + d, _mm512_maskz_loadu_ps(lanes, v + d));
            _mm512_mask_storeu_ps(out + d, lanes, _mm512_setzero_ps());
        }
        for (long s = 0; s <= last; s += LANES, key += LANES * D, value += LANES * D) {
            const long n = last + 1 - s < LANES ? last + 1 - s : LANES;
            float score[LANES], before = largest;
            const long ahead = 4 * LANES;
            for (long byte = 0; s + ahead <= last && byte < LANES * D * 2; byte += 64) {
                _mm_prefetch((char *)(key + ahead * D) + byte, _MM_HINT_T1);
                _mm_prefetch((char *)(value + ahead * D) + byte, _MM_HINT_T1);
            }
            for (long j = 0; j < n; j++) {
                __m512 sum = _mm512_setzero_ps();
                EACH_PART {
                    __m512 query = _mm512_maskz_loadu_ps(lanes, q + d);
                    sum = _mm512_fmadd_ps(query, widen(lanes, key + j * D + d), sum);
                }
                score[j] = _mm512_reduce_add_ps(sum) * scale;
                largest = score[j] > largest ? score[j] : largest;
            }
            __mmask16 there = (1 << n) - 1;
            __m512 differences = _mm512_sub_ps(_mm512_maskz_loadu_ps(there, score), _mm512_set1_ps(largest));
            __m512 weights = _mm512_maskz_mov_ps(there, exponential(differences));
            const float shrink = _mm512_cvtss_f32(exponential(_mm512_set1_ps(before - largest)));
            total = total * shrink + _mm512_reduce_add_ps(weights);
            _mm512_storeu_ps(score, weights);
            EACH_PART {
                __m512 sum = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, out + d), _mm512_set1_ps(shrink));
                for (long j = 0; j < n; j++)
                    sum = _mm512_fmadd_ps(_mm512_set1_ps(score[j]), widen(lanes, value + j * D + d), sum);
                _mm512_mask_storeu_ps(out + d, lanes, sum);
            }
        }
        EACH_PART {
            __m512 sum = _mm512_maskz_loadu_ps(lanes, out + d);
            _mm512_mask_storeu_ps(out + d, lanes, _mm512_div_ps(sum, _mm512_set1_ps(total)));
        }
    }
}

typedef struct {
    const float *weight, *bias;
} Norm;

// y = LayerNorm(x) with x and y (M, C), which may alias; C is a multiple of 16.
static void layer_norm(const Norm *norm, float epsilon, long M, long C, const float *x, float *y)
{
#pragma omp for schedule(static)
    for (long m = 0; m < M; m++) {
        const float *in = x + m * C;
        __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
        for (long c = 0; c < C; c += LANES)
            sum = _mm512_add_ps(sum, _mm512_loadu_ps(in + c));
        const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / C);
        for (long c = 0; c < C; c += LANES) {
            __m512 difference = _mm512_sub_ps(_mm512_loadu_ps(in + c), mean);
            squares = _mm512_fmadd_ps(difference, difference, squares);
        }
        const __m512 factor = _mm512_set1_ps(1 / sqrtf(_mm512_reduce_add_ps(squares) / C + epsilon));
        for (long c = 0; c < C; c += LANES) {
            __m512 out = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(in + c), mean), factor);
            out = _mm512_fmadd_ps(out, _mm512_loadu_ps(norm->weight + c), _mm512_loadu_ps(norm->bias + c));
            _mm512_storeu_ps(y + m * C + c, out);
        }
    }
}

typedef struct {
    Linear attn_in, attn_out, mlp_in, mlp_out;
    Norm ln_1, ln_2;
    long n_head, post_norm;
    float scale, epsilon;  // of the attention scores; of the norms
} Block;

// model.py's Block for one new token per row: x and y (B, C); C and the hidden width are multiples of 32. The rest as
// in attend().
void block(
    const Block *b, long B, long L, const float *x, uint16_t *keys, uint16_t *values, const int64_t *seen, float *y)
{
    const long C = b->attn_out.N, H = b->n_head;
    float *normed = malloc(B * (5 * C + b->mlp_in.N) * sizeof(float));
    float *qkv = normed + B * C, *heads = qkv + 3 * B * C, *hidden = heads + B * C;
    float *in = b->post_norm ? y : normed;  // input of the attention and of the MLP
    memcpy(y, x, B * C * sizeof(float));
#pragma omp parallel
    {
        if (!b->post_norm)
            layer_norm(&b->ln_1, b->epsilon, B, C, y, in);
        multiply(&b->attn_in, STORE, B, in, qkv);
        attend(B, H, L, C / H, b->scale, qkv, keys, values, seen, heads);
        multiply(&b->attn_out, ADD, B, heads, y);
        layer_norm(b->post_norm ? &b->ln_1 : &b->ln_2, b->epsilon, B, C, y, in);
        multiply(&b->mlp_in, GELU, B, in, hidden);
        multiply(&b->mlp_out, ADD, B, hidden, y);
        if (b->post_norm)
            layer_norm(&b->ln_2, b->epsilon, B, C, y, y);
    }
    free(normed);
}
