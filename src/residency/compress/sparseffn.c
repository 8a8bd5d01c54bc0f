/* One gated feed-forward layer for a few tokens, reading only the rows that are active. Compiled on the user's machine
   by sparsekernel.py; see sparseffn.py for what it computes and why.

   x [B, d] float, gate [F, d], up [F, d], down [F, d] (the transpose of down_proj.weight), all rows contiguous:

       g = round(gate[i] . x[b]);   inactive if g < threshold or g = 0
       y[b] += round(g * round(up[i] . x[b])) * down[i]      over the rows i that are active for b

   round() is to bfloat16 where the weights are, as a dense layer rounds what it stores; sums are float.
   The rows are divided among the threads; each sums into its own part [B, d], and the parts are added in order, so
   that the result depends on the number of threads but on no timing.

   A row is read in blocks of 2 * LANES numbers, as two vectors. For bfloat16 these are the even and the odd numbers of
   the block (a shift and a mask of 32-bit words, where widening in order takes shuffles); x is sorted likewise
   beforehand, and y back afterwards. */

#ifndef ROW
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define LANES 16
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t wide __attribute__((vector_size(4 * LANES), aligned(2), may_alias));

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the order of even and odd numbers below is that of little-endian machines"
#endif
typedef struct { vec a, b; } two;

static inline two load_f32(const float *p) { return (two){*(const vec *)p, *(const vec *)(p + LANES)}; }
static inline float one_f32(const float *p) { return *p; }
static inline float round_f32(float v) { return v; }

static inline two load_bf16(const uint16_t *p) {
    wide words = *(const wide *)p;
    return (two){(vec)(words << 16), (vec)(words & 0xffff0000u)};
}
static inline float one_bf16(const uint16_t *p) {
    uint32_t bits = (uint32_t)*p << 16;
    float v;
    memcpy(&v, &bits, 4);
    return v;
}
static inline float round_bf16(float v) { /* to nearest, ties to even */
    uint32_t bits;
    if (v != v) return v;
    memcpy(&bits, &v, 4);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
    memcpy(&v, &bits, 4);
    return v;
}
static inline float total(vec v) {
    float s = 0;
    for (int k = 0; k < LANES; k++) s += v[k];
    return s;
}
static inline void fetch(const void *row, long bytes) { /* the start of a row; the hardware follows from there */
    if (bytes > AHEAD) bytes = AHEAD;
    for (long k = 0; k < bytes; k += 64) __builtin_prefetch((const char *)row + k, 0, 3);
}

/* the two orders of x and y; to and from are [B, d] and not the same */
static void sort_f32(const float *from, float *to, long B, long d, int back) {
    (void)back;
    memcpy(to, from, sizeof(float) * B * d);
}
static void sort_bf16(const float *from, float *to, long B, long d, int back) {
    for (long b = 0; b < B; b++, from += d, to += d) {
        long k = 0;
        for (; k + 2 * LANES <= d; k += 2 * LANES)
            for (int j = 0; j < LANES; j++)
                for (int odd = 0; odd < 2; odd++)
                    if (back)
                        to[k + 2 * j + odd] = from[k + odd * LANES + j];
                    else
                        to[k + odd * LANES + j] = from[k + 2 * j + odd];
        memcpy(to + k, from + k, sizeof(float) * (d - k));
    }
}

/* scratch of one thread, grown when needed and kept */
static __thread void *kept;
static __thread size_t kept_bytes;
static void *scratch(size_t bytes) {
    if (bytes > kept_bytes) {
        void *grown = realloc(kept, bytes);
        if (!grown) return NULL;
        kept = grown;
        kept_bytes = bytes;
    }
    return kept;
}

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define OWN(name) JOIN(name, KIND)

#define ROW float
#define KIND f32
#include "sparseffn.c"
#undef ROW
#undef KIND
#define ROW uint16_t
#define KIND bf16
#include "sparseffn.c"

#else

/* four rows against one token; where there are fewer rows, the last ones repeat */
static inline void OWN(dots)(const ROW *const r[4], const float *x, long d, float out[4]) {
    vec s[4] = {{0}}, t[4] = {{0}};
    long k = 0;
    for (; k + 2 * LANES <= d; k += 2 * LANES) {
        two v = load_f32(x + k);
        for (int j = 0; j < 4; j++) {
            two w = OWN(load)(r[j] + k);
            s[j] += w.a * v.a;
            t[j] += w.b * v.b;
        }
    }
    for (int j = 0; j < 4; j++) out[j] = total(s[j] + t[j]);
    for (; k < d; k++)
        for (int j = 0; j < 4; j++) out[j] += OWN(one)(r[j] + k) * x[k];
}

/* y += a[0] r[0] + ... + a[3] r[3] */
static inline void OWN(add)(const ROW *const r[4], const float a[4], long d, float *y) {
    long k = 0;
    for (; k + 2 * LANES <= d; k += 2 * LANES) {
        two s = load_f32(y + k);
        for (int j = 0; j < 4; j++) {
            two w = OWN(load)(r[j] + k);
            s.a += a[j] * w.a;
            s.b += a[j] * w.b;
        }
        *(vec *)(y + k) = s.a;
        *(vec *)(y + k + LANES) = s.b;
    }
    for (; k < d; k++)
        for (int j = 0; j < 4; j++) y[k] += a[j] * OWN(one)(r[j] + k);
}

/* rows lo..hi; returns how many are active for some token, -1 without memory */
static long OWN(part)(const float *x, const ROW *gate, const ROW *up, const ROW *down, float *y, long B, long d,
                      long lo, long hi, float threshold) {
    long n = 0, bytes = d * sizeof(ROW);
    memset(y, 0, sizeof(float) * B * d);
    if (lo >= hi) return 0;
    int32_t *index = scratch((sizeof(int32_t) + sizeof(float) * B) * (hi - lo + 4));
    if (!index) return -1;
    float *value = (float *)(index + (hi - lo + 4)); /* [n, B] gate values of the active rows */
    for (long i = lo; i < hi; i += 4) {
        const ROW *r[4];
        long rows = hi - i < 4 ? hi - i : 4;
        for (int j = 0; j < 4; j++) r[j] = gate + (i + (j < rows ? j : rows - 1)) * d;
        float g[4], *at[4];
        int active[4] = {0, 0, 0, 0};
        for (int j = 0; j < rows; j++) at[j] = value + (n + j) * B;
        for (long b = 0; b < B; b++) {
            OWN(dots)(r, x + b * d, d, g);
            for (int j = 0; j < rows; j++) {
                float v = OWN(round)(g[j]);
                if (v < threshold) v = 0; /* a NaN stays */
                at[j][b] = v;
                active[j] |= v != 0;
            }
        }
        long to = n;
        for (int j = 0; j < rows; j++)
            if (active[j]) {
                if (at[j] != value + to * B) memmove(value + to * B, at[j], sizeof(float) * B);
                index[to++] = i + j;
            }
        n = to;
    }
    for (long k = 0; k < n; k += 4) {
        const ROW *u[4], *w[4];
        long rows = n - k < 4 ? n - k : 4;
        for (int j = 0; j < 4; j++) {
            long i = index[k + (j < rows ? j : rows - 1)];
            u[j] = up + i * d;
            w[j] = down + i * d;
        }
        for (long j = k + 4; j < k + 8 && j < n; j++) {
            fetch(up + index[j] * d, bytes);
            fetch(down + index[j] * d, bytes);
        }
        for (long b = 0; b < B; b++) {
            float a[4];
            OWN(dots)(u, x + b * d, d, a);
            for (int j = 0; j < 4; j++) {
                float g = j < rows ? value[(k + j) * B + b] : 0;
                a[j] = g == 0 ? 0 : OWN(round)(g * OWN(round)(a[j])); /* inactive for this token: exactly nothing */
            }
            OWN(add)(w, a, d, y + b * d);
        }
    }
    return n;
}

/* work [threads + 1, B, d]: the sorted x, then each thread's part of y */
long OWN(gated)(const float *x, const ROW *gate, const ROW *up, const ROW *down, float *y, float *work, long B, long d,
                long F, float threshold, int threads) {
    long n = 0, size = B * d;
    int failed = 0, used = 1;
    float *parts = work + size;
    OWN(sort)(x, work, B, d, 0);
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads) reduction(+ : n) reduction(| : failed)
        {
            int t = omp_get_thread_num(), all = omp_get_num_threads();
            long lo = F * t / all, hi = F * (t + 1) / all;
            long mine = OWN(part)(work, gate, up, down, parts + t * size, B, d, lo, hi, threshold);
            n += mine;
            failed |= mine < 0;
#pragma omp single nowait
            used = all;
        }
    } else
#endif
    {
        (void)threads;
        n = OWN(part)(work, gate, up, down, parts, B, d, 0, F, threshold);
        failed = n < 0;
    }
    for (int t = 1; t < used; t++)
        for (long k = 0; k < size; k++) parts[k] += parts[t * size + k];
    OWN(sort)(parts, y, B, d, 1);
    return failed ? -1 : n;
}
#endif
