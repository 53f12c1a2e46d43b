// What writing text costs on a CPU with AVX512: products with weights in bfloat16 or int8, and the attention of one new
// token of each row to a cache in bfloat16. inference.py compiles and calls this.
//
// For few rows the time is that of reading the weights, each once, and what counts is to ask for cache lines long
// before they are needed. Inputs, sums and outputs are float32. A row's sums are formed in the same order whatever
// rows stand beside it.

#include <immintrin.h>
#include <math.h>
#include <stdint.h>

enum { LANES = 16, OUTPUTS = 2 * LANES, AHEAD = 8192 };  // float32 numbers of a register and of a tile's row; bytes

#define EACH_ROW _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++)
#define EACH_HALF _Pragma("GCC unroll 2") for (int h = 0; h < 2; h++)

// OUTPUTS outputs of 1 to 8 rows. `rows` and `bytes` (of a weight) are constants wherever this is inlined, so that the
// sums stay in registers.
static inline __attribute__((always_inline)) void tile(
    const int rows, const int bytes, long K, long N,
    const float *x, const char *w, const float *scale, const float *bias, float *y)
{
    __m512 sum[8][2];
    EACH_ROW EACH_HALF sum[r][h] = _mm512_setzero_ps();
    for (long k = 0; k < K; k += 2, w += 2 * OUTPUTS * bytes) {
        __m512 first[2], second[2];  // weights of k and k + 1
        EACH_HALF {
            if (bytes == 2) {  // a bfloat16 is the upper half of a float32; those of k and k + 1 alternate
                _mm_prefetch(w + 64 * h + AHEAD, _MM_HINT_T1);
                __m512i pairs = _mm512_loadu_si512(w + 64 * h);
                first[h] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
                second[h] = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)));
            } else {
                const __m128i *bytes16 = (const __m128i *)w + h;
                if (h == 0)
                    _mm_prefetch(w + AHEAD, _MM_HINT_T1);
                first[h] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes16)));
                second[h] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes16 + 2)));
            }
        }
        EACH_ROW {
            __m512 x0 = _mm512_set1_ps(x[r * K + k]), x1 = _mm512_set1_ps(x[r * K + k + 1]);
            EACH_HALF sum[r][h] = _mm512_fmadd_ps(first[h], x0, sum[r][h]);
            EACH_HALF sum[r][h] = _mm512_fmadd_ps(second[h], x1, sum[r][h]);
        }
    }
    EACH_ROW EACH_HALF {
        __m512 scales = _mm512_loadu_ps(scale + LANES * h), biases = _mm512_loadu_ps(bias + LANES * h);
        _mm512_storeu_ps(y + r * N + LANES * h, _mm512_fmadd_ps(sum[r][h], scales, biases));
    }
}

static inline __attribute__((always_inline)) void linear(
    const int bytes, long M, long K, long N,
    const float *x, const char *w, const float *scale, const float *bias, float *y)
{
#pragma omp parallel for schedule(static)
    for (long n = 0; n < N; n += OUTPUTS) {
        const char *block = w + n * K * bytes;  // stays in the cache for all rows
        for (long m = 0; m < M;) {
            const float *in = x + m * K;
            float *out = y + m * N + n;
            switch (M - m) {
            case 1: tile(1, bytes, K, N, in, block, scale + n, bias + n, out); m += 1; break;
            case 2: case 3: tile(2, bytes, K, N, in, block, scale + n, bias + n, out); m += 2; break;
            case 4: case 5: case 6: case 7: tile(4, bytes, K, N, in, block, scale + n, bias + n, out); m += 4; break;
            default: tile(8, bytes, K, N, in, block, scale + n, bias + n, out); m += 8;
            }
        }
    }
}

// y = x w' * scale + bias of x (M, K), w (N / 32, K / 2, 32, 2), scale and bias (N), y (M, N); 2 divides K, 32 N.
void linear_bfloat16(
    long M, long K, long N, const float *x, const char *w, const float *scale, const float *bias, float *y)
{
    linear(2, M, K, N, x, w, scale, bias, y);
}

// The same of w (N / 32, K, 32).
void linear_int8(
    long M, long K, long N, const float *x, const char *w, const float *scale, const float *bias, float *y)
{
    linear(1, M, K, N, x, w, scale, bias, y);
}

static inline __m512 widen(__mmask16 lanes, const uint16_t *from)
{
    __m256i half = _mm256_maskz_loadu_epi16(lanes, from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

static inline void narrow(__mmask16 lanes, uint16_t *to, __m512 x)  // to the nearest, of two equally near to the even
{
    __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    _mm256_mask_storeu_epi16(to, lanes, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
}

static inline __m512 exponential(__m512 x)  // of numbers of at most 0, to 3e-7 of the result
{
    static const float series[] = {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f};
    x = _mm512_max_ps(_mm512_set1_ps(-104), x);  // there it is 0; in this order a NaN stays
    __m512 twos = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    x = _mm512_fnmadd_ps(twos, _mm512_set1_ps(0.693145752f), x);  // the logarithm of 2 in two parts
    x = _mm512_fnmadd_ps(twos, _mm512_set1_ps(1.42860677e-6f), x);
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < 7; i++)
        sum = _mm512_fmadd_ps(sum, x, _mm512_set1_ps(series[i]));
    return _mm512_scalef_ps(sum, twos);
}

// Sixteen of the D numbers at a time, or what is left of them.
#define EACH_PART \
    for (long d = 0, lanes; lanes = D - d < LANES ? (1 << (D - d)) - 1 : 0xffff, d < D; d += LANES)

// Stores the key and value of a new token of each row and attends with its query to all of that row, by an online
// softmax (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018) over 16 keys at a time.
// q, k, v (B, H, D), rows `stride` apart; keys, values (B, H, L, D); seen (B), the tokens stored before; y (B, H, D).
void attend(
    long B, long H, long L, long D, long stride, float scale, const float *q, const float *k, const float *v,
    uint16_t *keys, uint16_t *values, const int64_t *seen, float *y)
{
#pragma omp parallel for schedule(dynamic)
    for (long i = 0; i < B * H; i++) {
        const long row = i / H * stride + i % H * D, last = seen[i / H];
        uint16_t *key = keys + i * L * D, *value = values + i * L * D;
        float *out = y + i * D, largest = -INFINITY, total = 0;
        EACH_PART {
            narrow(lanes, key + last * D + d, _mm512_maskz_loadu_ps(lanes, k + row + d));
            narrow(lanes, value + last * D + d, _mm512_maskz_loadu_ps(lanes, v + row + d));
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
                    __m512 query = _mm512_maskz_loadu_ps(lanes, q + row + d);
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
