// tanh GELU and its gradient for training, in plain C that compilers vectorize. gelu.py compiles and calls this.

#include <math.h>
#include <stdint.h>
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

void gelu_float32(long n, const float *x, float *y)
{
    EACH y[i] = gelu(x[i]);
}

void gradient_float32(long n, const float *x, const float *dy, float *dx)
{
    EACH dx[i] = dy[i] * slope(x[i]);
}

void gelu_bfloat16(long n, const uint16_t *x, uint16_t *y)
{
    EACH y[i] = narrow(gelu(widen(x[i])));
}

void gradient_bfloat16(long n, const uint16_t *x, const uint16_t *dy, uint16_t *dx)
{
    EACH dx[i] = narrow(widen(dy[i]) * slope(widen(x[i])));
}
