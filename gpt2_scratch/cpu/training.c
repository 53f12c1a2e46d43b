// tanh GELU, attention and their gradients for training, in C that compilers vectorize. training.py compiles and calls
// this.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static inline float of_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline float exponential(float x)  // for x <= 0, to a relative error of 3e-7; 0 below -88
{
    x = x < -104 ? -104 : x;
    float twos = rintf(x * 1.44269504f);
    x -= twos * 0.693145752f;  // ln 2 in two parts, for precision
    x -= twos * 1.42860677e-6f;
    float sum = 1 + x * (1 + x * (1.f / 2 + x * (1.f / 6 + x * (1.f / 24 + x * (1.f / 120 + x * (1.f / 720))))));
    int32_t power = (int32_t)twos + 127;
    return sum * of_bits((uint32_t)(power > 0 ? power : 0) << 23);
}

// gelu(x) = x / (1 + exp(-z)) with z = sqrt(8 / pi) (x + 0.044715 x^3)
static const float LINEAR = 1.5957691216f, CUBIC = 1.5957691216f * 0.044715f;

static inline float gelu(float x)
{
    float z = x * (LINEAR + CUBIC * x * x), small = exponential(-fabsf(z)), above = 1 / (1 + small);
    return x * (z < 0 ? small * above : above);
}

static inline float slope(float x)
{
    float square = x * x, z = x * (LINEAR + CUBIC * square), small = exponential(-fabsf(z)), above = 1 / (1 + small);
    return (z < 0 ? small * above : above) + small * above * above * x * (LINEAR + 3 * CUBIC * square);
}

static inline float widen(uint16_t x) { return of_bits((uint32_t)x << 16); }  // bfloat16 is float32's upper half

static inline uint16_t narrow(float x)  // rounds to nearest even
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Below 2^15 numbers waking the other threads takes longer than it saves.
#define EACH _Pragma("omp parallel for simd if (parallel : n >= 32768)") for (long i = 0; i < n; i++)

void gelu_float32(const float *x, float *y, long n)
{
    EACH y[i] = gelu(x[i]);
}

void gelu_gradient_float32(const float *x, const float *dy, float *dx, long n)
{
    EACH dx[i] = dy[i] * slope(x[i]);
}

void gelu_bfloat16(const uint16_t *x, uint16_t *y, long n)
{
    EACH y[i] = narrow(gelu(widen(x[i])));
}

void gelu_gradient_bfloat16(const uint16_t *x, const uint16_t *dy, uint16_t *dx, long n)
{
    EACH dx[i] = narrow(widen(dy[i]) * slope(widen(x[i])));
}

// Attention by blocks of queries, whose scores fit a cache (Dao et al., "FlashAttention", 2022, whose backward pass
// this is). All arithmetic is float32's. Matrices are padded with zeros to whole tiles.

#ifdef __AVX512F__
enum { LANES = 16, ROWS = 8, QUERIES = 32 };
#else
enum { LANES = 8, ROWS = 6, QUERIES = 48 };
#endif
enum { COLUMNS = 2 * LANES };  // of a tile of ROWS, whose sums fit the registers; ROWS and COLUMNS divide QUERIES
typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// Inlined wherever they are called, these take the compiler twice as long and gain nothing.
#define ONCE static __attribute__((noinline))

static inline long pad(long n, long to) { return (n + to - 1) / to * to; }

// c (rows, columns) = a (rows, inner) b (inner, columns), added to c if `add`. An element of a is row_step further on
// for each row, and inner_step for each column; rows of b and c are b_step and c_step long.
ONCE void product(
    long rows, long columns, long inner, const float *a, long row_step, long inner_step, const float *b, long b_step,
    float *c, long c_step, int add)
{
    for (long row = 0; row < rows; row += ROWS)
        for (long column = 0; column < columns; column += COLUMNS) {
            Floats sums[ROWS][2];
            for (int r = 0; r < ROWS; r++)
                for (int h = 0; h < 2; h++) {
                    Floats *at = (Floats *)(c + (row + r) * c_step + column + LANES * h);
                    sums[r][h] = add ? *at : (Floats){0};
                }
            for (long k = 0; k < inner; k++) {
                const float *of_b = b + k * b_step + column, *of_a = a + row * row_step + k * inner_step;
                const Floats left = *(const Floats *)of_b, right = *(const Floats *)(of_b + LANES);
                for (int r = 0; r < ROWS; r++) {
                    sums[r][0] += of_a[r * row_step] * left;
                    sums[r][1] += of_a[r * row_step] * right;
                }
            }
            for (int r = 0; r < ROWS; r++)
                for (int h = 0; h < 2; h++)
                    *(Floats *)(c + (row + r) * c_step + column + LANES * h) = sums[r][h];
        }
}

// Copies of x (T, D), whose rows are `step` apart, in float32; y has rows of y_step.
ONCE void load_rows(int half, const void *x, long at, long step, long T, long D, float *y, long y_step)
{
    for (long t = 0; t < T; t++)
        for (long d = 0; d < D; d++)
            y[t * y_step + d] = half ? widen(((uint16_t *)x)[at + t * step + d]) : ((float *)x)[at + t * step + d];
}

ONCE void transpose(const float *x, long x_step, long T, long D, float *y, long y_step)
{
    for (long t = 0; t < T; t++)
        for (long d = 0; d < D; d++)
            y[d * y_step + t] = x[t * x_step + d];
}

ONCE void store_rows(int half, const float *x, long x_step, long T, long D, void *y, long at, long step)
{
    for (long t = 0; t < T; t++)
        for (long d = 0; d < D; d++)
            if (half)
                ((uint16_t *)y)[at + t * step + d] = narrow(x[t * x_step + d]);
            else
                ((float *)y)[at + t * step + d] = x[t * x_step + d];
}

// Turns the first n of `keys` scores into weights and the others into 0; returns the logarithm of their sum.
ONCE float softmax(float *scores, long n, long keys, float scale)
{
    float most[LANES], sums[LANES] = {0}, largest = -INFINITY, sum = 0;
    for (long j = n; j < keys; j++)
        scores[j] = -INFINITY;
    for (int l = 0; l < LANES; l++)
        most[l] = -INFINITY;
    for (long j = 0; j < keys; j += LANES)
        for (int l = 0; l < LANES; l++)
            most[l] = scores[j + l] > most[l] ? scores[j + l] : most[l];
    for (int l = 0; l < LANES; l++)
        largest = most[l] > largest ? most[l] : largest;
    for (long j = 0; j < keys; j += LANES)
        for (int l = 0; l < LANES; l++)
            sums[l] += scores[j + l] = exponential((scores[j + l] - largest) * scale);
    for (int l = 0; l < LANES; l++)
        sum += sums[l];
    for (long j = 0; j < keys; j++)
        scores[j] *= 1 / sum;
    return largest * scale + logf(sum);
}

// qkv (B, T, 3, H, D) and y (B, T, H, D) in bfloat16 if `half`, else float32; log_sums (B, H, T) for the gradient.
void attention(long half, const void *qkv, void *y, float *log_sums, long B, long T, long H, long D, float scale)
{
    // Rows of a power of two would share few sets of the cache.
    const long wide = pad(D, COLUMNS), keys = pad(T, QUERIES), step = 3 * H * D, row = keys + LANES;
#pragma omp parallel
    {
        float *k = calloc(keys * (2 * wide) + wide * row + QUERIES * (2 * wide + row), sizeof *k), *v = k + keys * wide;
        float *k_t = v + keys * wide, *q = k_t + wide * row, *out = q + QUERIES * wide, *weights = out + QUERIES * wide;
#pragma omp for schedule(dynamic)
        for (long i = 0; i < B * H; i++) {
            const long at = i / H * T * step + i % H * D, to = i / H * T * H * D + i % H * D;
            load_rows(half, qkv, at + H * D, step, T, D, k, wide);
            load_rows(half, qkv, at + 2 * H * D, step, T, D, v, wide);
            transpose(k, wide, T, D, k_t, row);
            for (long t = 0; t < T; t += QUERIES) {
                const long n = T - t < QUERIES ? T - t : QUERIES, seen = t + QUERIES;
                load_rows(half, qkv, at + t * step, step, n, D, q, wide);
                product(QUERIES, seen, D, q, wide, 1, k_t, row, weights, row, 0);
                for (long r = 0; r < n; r++)
                    log_sums[i * T + t + r] = softmax(weights + r * row, t + r + 1, seen, scale);
                product(QUERIES, wide, seen, weights, row, 1, v, wide, out, wide, 0);
                store_rows(half, out, wide, n, D, y, to + t * H * D, H * D);
            }
        }
        free(k);
    }
}

void attention_gradient(
    long half, const void *qkv, const void *y, const float *log_sums, const void *dy, void *dqkv, long B, long T,
    long H, long D, float scale)
{
    const long wide = pad(D, COLUMNS), keys = pad(T, QUERIES), step = 3 * H * D, row = keys + LANES;
#pragma omp parallel
    {
        float *k = calloc(keys * 4 * wide + 2 * wide * row + QUERIES * (4 * wide + 2 * row), sizeof *k);
        float *v = k + keys * wide, *dk = v + keys * wide, *dv = dk + keys * wide;
        float *k_t = dv + keys * wide, *v_t = k_t + wide * row;
        float *q = v_t + wide * row, *dq = q + QUERIES * wide, *out = dq + QUERIES * wide, *dout = out + QUERIES * wide;
        float *weights = dout + QUERIES * wide, *dscores = weights + QUERIES * row;
#pragma omp for schedule(dynamic)
        for (long i = 0; i < B * H; i++) {
            const long at = i / H * T * step + i % H * D, to = i / H * T * H * D + i % H * D;
            load_rows(half, qkv, at + H * D, step, T, D, k, wide);
            load_rows(half, qkv, at + 2 * H * D, step, T, D, v, wide);
            transpose(k, wide, T, D, k_t, row);
            transpose(v, wide, T, D, v_t, row);
            memset(dk, 0, 2 * keys * wide * sizeof *dk);
            for (long t = 0; t < T; t += QUERIES) {
                const long n = T - t < QUERIES ? T - t : QUERIES, seen = t + QUERIES;
                load_rows(half, qkv, at + t * step, step, n, D, q, wide);
                load_rows(half, y, to + t * H * D, H * D, n, D, out, wide);
                load_rows(half, dy, to + t * H * D, H * D, n, D, dout, wide);
                product(QUERIES, seen, D, q, wide, 1, k_t, row, weights, row, 0);
                product(QUERIES, seen, D, dout, wide, 1, v_t, row, dscores, row, 0);
                memset(weights + n * row, 0, (QUERIES - n) * row * sizeof *weights);
                memset(dscores + n * row, 0, (QUERIES - n) * row * sizeof *dscores);
                for (long r = 0; r < n; r++) {
                    float *w = weights + r * row, *dw = dscores + r * row, mean = 0;
                    const float log_sum = log_sums[i * T + t + r];
                    for (long d = 0; d < D; d++)
                        mean += out[r * wide + d] * dout[r * wide + d];
                    for (long j = 0; j < seen; j++) {
                        w[j] = j <= t + r ? exponential(w[j] * scale - log_sum) : 0;
                        dw[j] = w[j] * (dw[j] - mean) * scale;
                    }
                }
                product(QUERIES, wide, seen, dscores, row, 1, k, wide, dq, wide, 0);
                product(seen, wide, QUERIES, weights, 1, row, dout, wide, dv, wide, 1);
                product(seen, wide, QUERIES, dscores, 1, row, q, wide, dk, wide, 1);
                store_rows(half, dq, wide, n, D, dqkv, at + t * step, step);
            }
            store_rows(half, dk, wide, T, D, dqkv, at + H * D, step);
            store_rows(half, dv, wide, T, D, dqkv, at + 2 * H * D, step);
        }
        free(k);
    }
}
