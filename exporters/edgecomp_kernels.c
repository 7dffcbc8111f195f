#include "edgecomp_kernels.h"

#include <string.h>

/* Unoptimized code has no registers left for the loops below. */
#if defined(__ARM_FEATURE_DSP) && __ARM_FEATURE_DSP && defined(__ARM_FEATURE_SIMD32) && __ARM_FEATURE_SIMD32 && \
    defined(__OPTIMIZE__)
#define DSP 1
#else
#define DSP 0
#endif

#ifdef __GNUC__
#define INLINE static inline __attribute__((always_inline))
/* For loops that need all registers for themselves. */
#define APART static __attribute__((noinline))
#else
#define INLINE static
#define APART static
#endif

/* Filters that are computed together. */
#define FILTERS 4u
/* Where so many fours of filters fit into scratch memory, a convolution is computed on patches; fewer do not pay for them,
 * unless a window is a pixel. */
#define ENOUGH_FOURS 6u

/* ---- numbers ---------------------------------------------------------------------------------------------------- */

static int8_t clamped(int32_t value, int32_t low, int32_t high) {
  return (int8_t)(value < low ? low : value > high ? high : value);
}

/* Divide by 2^shift, rounded half up; a right shift of a negative number is arithmetic in every compiler known. */
static int32_t shifted(int32_t value, uint32_t shift) { return (value + (int32_t)(1u << (shift - 1u))) >> shift; }

static int8_t rescaled_wide(int32_t sum, int32_t mantissa, uint32_t shift, int32_t zero, int32_t low, int32_t high) {
  int64_t value = ((int64_t)sum * mantissa + ((int64_t)1 << (shift - 1u))) >> shift;
  value += zero;
  return (int8_t)(value < low ? low : value > high ? high : value);
}

/* The same for shifts from 33 on: what the lower half of the product holds cannot change the result. */
static int8_t rescaled(int32_t sum, int32_t mantissa, uint32_t shift, int32_t zero, int32_t low, int32_t high) {
  return clamped(shifted((int32_t)(((int64_t)sum * mantissa) >> 32), shift - 32u) + zero, low, high);
}

static int8_t finished(const edgecomp_scaling *s, uint32_t channel, int32_t sum) {
  int32_t mantissa = s->mantissa[channel];
  uint32_t shift = s->shift[channel];
  return s->wide ? rescaled_wide(sum, mantissa, shift, s->zero, s->low, s->high)
                 : rescaled(sum, mantissa, shift, s->zero, s->low, s->high);
}

/* n sums. y may be a or b: what the structure holds is read before anything is written, for all the compiler knows y
 * might be a part of it. */
static void add_codes(const edgecomp_sum *sum, uint32_t n, const int8_t *a, const int8_t *b, int8_t *y) {
  int32_t a_factor = sum->a_factor, b_factor = sum->b_factor, zero = sum->zero, low = sum->low, high = sum->high;
  uint32_t shift = sum->shift, i;
  /* Unsigned: parts of a sum may leave the range that all of it keeps. */
  uint32_t start = (1u << (shift - 1u)) - (uint32_t)(sum->a_zero * a_factor) - (uint32_t)(sum->b_zero * b_factor);
  for (i = 0; i < n; i++) {
    int32_t total = (int32_t)(start + (uint32_t)(a[i] * a_factor) + (uint32_t)(b[i] * b_factor));
    y[i] = clamped((total >> shift) + zero, low, high);
  }
}

/* ---- weights ---------------------------------------------------------------------------------------------------- */

typedef struct {
  const edgecomp_weights *weights;
  const uint8_t *next;
  uint32_t held; /* bits that were read but not used, the next one lowest */
  uint32_t n_held;
} reader;

static reader open_stream(const edgecomp_weights *weights) {
  reader r;
  r.weights = weights;
  r.next = weights->stream;
  r.held = 0;
  r.n_held = 0;
  return r;
}

/* What is left of a byte belongs to nobody. */
static void next_part(reader *r) {
  r->held = 0;
  r->n_held = 0;
}

/* Decode n codes, one after the other. */
static void decode(reader *r, uint32_t n, int16_t *out) {
  const edgecomp_weights *w = r->weights;
  const int8_t *levels = w->form & 1u ? w->levels : 0;
  const uint8_t *p = r->next;
  uint32_t held = r->held, n_held = r->n_held, bits = w->bits, mask = (1u << bits) - 1u;
  int sparse = w->form >= EDGECOMP_SPARSE;
  int16_t *end = out + n;
  if (w->form == EDGECOMP_DENSE && bits == 8u) {
#if DSP
    for (; n >= 4u; n -= 4u, out += 4) {
      int32_t four, t;
      memcpy(&four, p, 4);
      p += 4;
      __asm__(
          "sxtb16 %1, %0\n\t"
          "sxtb16 %0, %0, ror #8\n\t"
          "pkhbt  %2, %1, %0, lsl #16\n\t"
          "pkhtb  %0, %0, %1, asr #16\n\t"
          : "+r"(four), "=&r"(t), "=&r"(n_held));
      memcpy(out, &n_held, 4);
      memcpy(out + 2, &four, 4);
    }
    n_held = 0;
#endif
    while (out != end) *out++ = (int8_t)*p++;
  } else if (w->form == EDGECOMP_DENSE && bits == 4u && n_held == 0u && (n & 3u) == 0u) {
    for (; out != end; out += 4, p += 2) {
#if DSP
      uint16_t four;
      int32_t c0, c1, c2, c3;
      memcpy(&four, p, 2);
      __asm__(
          "sbfx  %0, %4, #0, #4\n\t"
          "sbfx  %1, %4, #4, #4\n\t"
          "sbfx  %2, %4, #8, #4\n\t"
          "sbfx  %3, %4, #12, #4\n\t"
          "pkhbt %0, %0, %1, lsl #16\n\t"
          "pkhbt %2, %2, %3, lsl #16\n\t"
          : "=&r"(c0), "=&r"(c1), "=&r"(c2), "=&r"(c3)
          : "r"(four));
      memcpy(out, &c0, 4);
      memcpy(out + 2, &c2, 4);
#else
      uint32_t low = p[0], high = p[1];
      out[0] = (int16_t)((int32_t)(low << 28) >> 28);
      out[1] = (int16_t)((int32_t)(low << 24) >> 28);
      out[2] = (int16_t)((int32_t)(high << 28) >> 28);
      out[3] = (int16_t)((int32_t)(high << 24) >> 28);
#endif
    }
  } else {
    for (; out != end; out++) {
      uint32_t value;
      if (sparse) {
        if (n_held == 0u) {
          held = *p++;
          n_held = 8u;
        }
        value = held & 1u;
        held >>= 1;
        n_held--;
        if (!value) {
          *out = 0;
          continue;
        }
      }
      if (n_held < bits) {
        held |= (uint32_t)*p++ << n_held;
        n_held += 8u;
      }
      value = held & mask;
      held >>= bits;
      n_held -= bits;
      *out = (int16_t)(levels ? levels[value] : (int32_t)(value << (32u - bits)) >> (32u - bits));
    }
  }
  r->next = p;
  r->held = held;
  r->n_held = n_held;
}

/* Decode a run of n taps of up to four filters. Of every four taps come 0 and 2 of each filter, then 1 and 3; the rest in
 * turns. Filters that are missing leave their places as they are. */
static int16_t *decode_run(reader *r, uint32_t n, uint32_t n_filters, int16_t *out) {
  uint32_t fours = n & ~3u, i;
  if (n_filters == FILTERS) {
    decode(r, FILTERS * n, out);
    return out + FILTERS * n;
  }
  for (i = 0; i < fours; i += 2u, out += 2u * FILTERS) decode(r, 2u * n_filters, out);
  for (; i < n; i++, out += FILTERS) decode(r, n_filters, out);
  return out;
}

/* Multiply n weights by 2^shift. */
static void lift(int16_t *w, uint32_t n, uint32_t shift) {
  if (!shift) return;
  for (; n; n--, w++) *w = (int16_t)(*w * (1 << shift));
}

/* ---- sums of products ------------------------------------------------------------------------------------------- */

/* Where the taps of a position lie: `height` x `width` runs of `n` codes. Steps are in elements: from the start of a run
 * in the image to that of the next, and of a row of runs; in the weights what lies between two rows of runs. Depthwise:
 * a run is a tap, and every filter has a code of its own there. */
typedef struct {
  uint32_t height, width, n;
  uint32_t x_row, x_run, w_gap;
} taps;

#if DSP
static int32_t saturated(int32_t value) {
  int32_t found;
  __asm__("ssat %0, #8, %1" : "=r"(found) : "r"(value));
  return found;
}

/* The upper half of a product, and a number. */
static int32_t upper_half(int32_t a, int32_t b, int32_t added) {
  int32_t found;
  __asm__("smmla %0, %1, %2, %3" : "=r"(found) : "r"(a), "r"(b), "r"(added));
  return found;
}

#else
static int32_t saturated(int32_t value) { return clamped(value, -128, 127); }

static int32_t upper_half(int32_t a, int32_t b, int32_t added) { return (int32_t)(((int64_t)a * b) >> 32) + added; }
#endif

#if DSP
/* Loops that leave no register for their end. Clang would want one for an operand in memory, and has to loop itself. */
#ifdef __clang__
#define REPEATED(body, temporary) body
#define END_IN_MEMORY(end) [last] "i"(0)
#define AGAIN(at, end) ((at) != (end))
#else
#define REPEATED(body, temporary)          \
  "1:\n\t" body                            \
  "ldr    " temporary ", %[last]\n\t"      \
  "cmp    %[a], " temporary "\n\t"         \
  "bne    1b\n\t"
#define END_IN_MEMORY(end) [last] "m"(end)
#define AGAIN(at, end) 0
#endif

/* Four taps of four filters. No compiler tried keeps all this in registers. Without a space that is not needed: a text of
 * more than 4,095 characters is none that every compiler takes. */
#define FOUR_TAPS                       \
  "ldr %[p],[%[a]],#4\n"               \
  "ldmia %[w]!,{r8-r11}\n"             \
  "sxtb16 %[t],%[p]\n"                 \
  "smlad %[s0],%[t],r8,%[s0]\n"        \
  "smlad %[s1],%[t],r9,%[s1]\n"        \
  "smlad %[s2],%[t],r10,%[s2]\n"       \
  "smlad %[s3],%[t],r11,%[s3]\n"       \
  "ldmia %[w]!,{r8-r11}\n"             \
  "sxtb16 %[p],%[p],ror #8\n"          \
  "smlad %[s0],%[p],r8,%[s0]\n"        \
  "smlad %[s1],%[p],r9,%[s1]\n"        \
  "smlad %[s2],%[p],r10,%[s2]\n"       \
  "smlad %[s3],%[p],r11,%[s3]\n"
/* Until a reaches end, at least once. */
#define LOOP(body)          \
  "1:\n\t" body             \
  "cmp    %[a], %[end]\n\t" \
  "bne    1b\n\t"

#define RUN(body, end_of_run)                                                                                       \
  do {                                                                                                              \
    int32_t p, h;                                                                                                   \
    const int8_t *end = (end_of_run);                                                                               \
    __asm__ volatile(LOOP(body)                                                                                     \
                     : [a] "+r"(a), [w] "+r"(w), [s0] "+r"(s0), [s1] "+r"(s1), [s2] "+r"(s2), [s3] "+r"(s3),        \
                       [p] "=&r"(p), [t] "=&r"(h)                                                                   \
                     : [end] "r"(end)                                                                               \
                     : "r8", "r9", "r10", "r11", "cc", "memory");                                                   \
  } while (0)
#define SIXTEEN_TAPS FOUR_TAPS FOUR_TAPS FOUR_TAPS FOUR_TAPS

/* One tap of four channels, each with a filter of its own. */
#define TAP_OF_CHANNELS(address)                                                                                    \
  do {                                                                                                              \
    int32_t p, h, u, v;                                                                                             \
    __asm__ volatile(                                                                                               \
        "ldr    %[p], " address "\n\t"                                                                              \
        "ldrd   %[u], %[v], [%[w]], #8\n\t"                                                                         \
        "sxtb16 %[t], %[p]\n\t"                                                                                     \
        "sxtb16 %[p], %[p], ror #8\n\t"                                                                             \
        "smlabb %[s0], %[t], %[u], %[s0]\n\t"                                                                       \
        "smlabt %[s1], %[p], %[u], %[s1]\n\t"                                                                       \
        "smlatb %[s2], %[t], %[v], %[s2]\n\t"                                                                       \
        "smlatt %[s3], %[p], %[v], %[s3]\n\t"                                                                       \
        : [w] "+r"(w), [s0] "+r"(s0), [s1] "+r"(s1), [s2] "+r"(s2), [s3] "+r"(s3), [p] "=&r"(p), [t] "=&r"(h),      \
          [u] "=&r"(u), [v] "=&r"(v)                                                                                \
        : [a] "r"(a), [step] "r"(step)                                                                              \
        : "memory");                                                                                                \
  } while (0)
#endif

/* How far it is from where a run or a row was read to the next: dilated ones overlap, so it may be back. */
static int32_t gap(uint32_t step, uint32_t done) { return (int32_t)step - (int32_t)done; }

/* Add the products of four channels at one position to sums. */
INLINE void add_channels(const taps *t, const int8_t *a, const int16_t *w, int32_t *sums) {
  int32_t s0 = sums[0], s1 = sums[1], s2 = sums[2], s3 = sums[3];
  uint32_t row = t->height, run, step = t->x_run;
  int32_t row_gap = gap(t->x_row, t->width * step);
#if DSP
  if (t->width == 3u) {
    row_gap += (int32_t)step;
    for (; row; row--, a += row_gap) {
      TAP_OF_CHANNELS("[%[a]]");
      TAP_OF_CHANNELS("[%[a], %[step]]");
      a += 2u * step;
      TAP_OF_CHANNELS("[%[a]]");
    }
  }
#endif
  for (; row; row--, a += row_gap) {
    for (run = t->width; run; run--, a += step) {
#if DSP
      TAP_OF_CHANNELS("[%[a]]");
#else
      s0 += a[0] * w[0];
      s1 += a[1] * w[1];
      s2 += a[2] * w[2];
      s3 += a[3] * w[3];
      w += FILTERS;
#endif
    }
  }
  sums[0] = s0;
  sums[1] = s1;
  sums[2] = s2;
  sums[3] = s3;
}

/* What is known of the taps of many positions, so that nothing has to be asked at each. */
enum taps_kind {
  CHANNELS,     /* depthwise */
  FORTY_EIGHTS, /* one run a row, of a multiple of 48 codes */
  SIXTEENS,     /* of 16 */
  FOURS,        /* of 4 */
  ANY
};

#if DSP
static enum taps_kind kind_of(const taps *t) {
  if (t->width != 1u || (t->n & 3u) || !t->n || !t->height) return ANY;
  if (t->n & 15u) return FOURS;
  return t->n % 48u ? SIXTEENS : FORTY_EIGHTS;
}
#endif

/* Add the products of four filters at one position to sums. */
static void add_products(const taps *t, const int8_t *a, const int16_t *w, int32_t *sums) {
  int32_t s0 = sums[0], s1 = sums[1], s2 = sums[2], s3 = sums[3];
  uint32_t row, run, n_16 = t->n & ~15u, n_4 = t->n & 12u, n_1 = t->n & 3u, w_gap = t->w_gap;
  int32_t run_gap = gap(t->x_run, t->n), row_gap = gap(t->x_row, t->width * t->x_run);
  for (row = t->height; row; row--, a += row_gap, w += w_gap) {
    for (run = t->width; run; run--, a += run_gap) {
      const int8_t *last;
#if DSP
      if (n_16) RUN(SIXTEEN_TAPS, a + n_16);
      if (n_4) RUN(FOUR_TAPS, a + n_4);
#else
      for (last = a + n_16 + n_4; a != last; a += 4, w += 4u * FILTERS) {
        s0 += a[0] * w[0] + a[2] * w[1] + a[1] * w[8] + a[3] * w[9];
        s1 += a[0] * w[2] + a[2] * w[3] + a[1] * w[10] + a[3] * w[11];
        s2 += a[0] * w[4] + a[2] * w[5] + a[1] * w[12] + a[3] * w[13];
        s3 += a[0] * w[6] + a[2] * w[7] + a[1] * w[14] + a[3] * w[15];
      }
#endif
      for (last = a + n_1; a != last; a++, w += FILTERS) {
        s0 += *a * w[0];
        s1 += *a * w[1];
        s2 += *a * w[2];
        s3 += *a * w[3];
      }
    }
  }
  sums[0] = s0;
  sums[1] = s1;
  sums[2] = s2;
  sums[3] = s3;
}

/* ---- results ---------------------------------------------------------------------------------------------------- */

/* What becomes of the sums of four filters: of the first two, then of the others, mantissas, offsets, which hold zero point
 * and rounding before the shift, shifts, less 32 where the upper half of a product is enough, and biases. */
#define HEAD (EDGECOMP_FOUR_BYTES / 4u)
#define MANTISSA(f) (((f) & 2u) * 4u + ((f) & 1u))
#define OFFSET(f) (MANTISSA(f) + 2u)
#define SHIFT(f) (MANTISSA(f) + 4u)
#define BIAS(f) (MANTISSA(f) + 6u)

static void write_head(const edgecomp_scaling *s, uint32_t channel, uint32_t n, int32_t *head) {
  uint32_t f;
  for (f = 0; f < FILTERS; f++) {
    /* Those that are missing compute what another does. */
    uint32_t c = channel + (f < n ? f : 0u), shift = s->shift[c] - (s->wide ? 0u : 32u);
    head[MANTISSA(f)] = s->mantissa[c];
    head[OFFSET(f)] = s->wide ? 0 : (2 * s->zero + 1) * (int32_t)(1u << (shift - 1u));
    head[SHIFT(f)] = (int32_t)shift;
    head[BIAS(f)] = s->bias[c];
  }
}

/* What has to be done with sums. */
enum finish_kind {
  PLAIN,  /* no sum, all codes in range, and 32 bits are enough */
  SUMMED, /* a sum is added, else the same */
  OTHER
};

static enum finish_kind finish_of(const edgecomp_conv *conv, const int8_t *residual) {
  const edgecomp_scaling *s = &conv->scaling;
  if (s->wide || s->low != -128 || s->high != 127) return OTHER;
  if (!residual) return PLAIN;
  return conv->sum->low == -128 && conv->sum->high == 127 ? SUMMED : OTHER;
}

/* Filters at work. */
typedef struct {
  const edgecomp_conv *conv;
  const int8_t *residual;
  int8_t *y;
  uint32_t channel, n;
  enum finish_kind kind;
  int32_t head[HEAD];
} filters;

static void load_filters(filters *p, uint32_t channel, uint32_t n) {
  p->channel = channel;
  p->n = n;
  p->kind = n == FILTERS ? finish_of(p->conv, p->residual) : OTHER;
  write_head(&p->conv->scaling, channel, n, p->head);
}

/* The result of one sum, whatever has to become of it; f: of the four filters. */
static int8_t code_of(const edgecomp_scaling *s, const int32_t *head, uint32_t f, int32_t sum) {
  uint32_t shift = (uint32_t)head[SHIFT(f)];
  return s->wide ? rescaled_wide(sum, head[MANTISSA(f)], shift, s->zero, s->low, s->high)
                 : clamped(upper_half(sum, head[MANTISSA(f)], head[OFFSET(f)]) >> shift, s->low, s->high);
}

/* Store the results of some filters at a position. */
APART void finish(const filters *p, const int32_t *sums, uint32_t place) {
  const edgecomp_scaling *s = &p->conv->scaling;
  int8_t found[FILTERS];
  int8_t *y = p->residual ? found : p->y + place;
  uint32_t f;
  for (f = 0; f < p->n; f++) y[f] = code_of(s, p->head, f, sums[f]);
  if (p->residual) add_codes(p->conv->sum, p->n, found, p->residual + place, p->y + place);
}

#if DSP
/* What a sum is made of, and the code of it. */
typedef struct {
  int32_t a_factor, b_factor, start, shift, zero;
} addition;

static addition addition_of(const edgecomp_sum *sum) {
  addition found;
  found.a_factor = sum->a_factor;
  found.b_factor = sum->b_factor;
  /* Unsigned: parts of a sum may leave the range that all of it keeps. */
  found.start = (int32_t)((1u << (sum->shift - 1u)) - (uint32_t)(sum->a_zero * sum->a_factor) -
                          (uint32_t)(sum->b_zero * sum->b_factor));
  found.shift = sum->shift;
  found.zero = sum->zero;
  return found;
}

INLINE int8_t added(const addition *sum, int32_t a, int32_t b) {
  uint32_t total = (uint32_t)sum->start + (uint32_t)(a * sum->a_factor) + (uint32_t)(b * sum->b_factor);
  return (int8_t)saturated(((int32_t)total >> sum->shift) + sum->zero);
}

/* The same, where a sum is added and all codes are in range. */
APART void finish_sums(const filters *p, const int32_t *sums, uint32_t place) {
  const addition sum = addition_of(p->conv->sum);
  const int8_t *b = p->residual + place;
  const int32_t *h = p->head;
  int8_t *y = p->y + place;
  y[0] = added(&sum, saturated(upper_half(sums[0], h[MANTISSA(0u)], h[OFFSET(0u)]) >> h[SHIFT(0u)]), b[0]);
  y[1] = added(&sum, saturated(upper_half(sums[1], h[MANTISSA(1u)], h[OFFSET(1u)]) >> h[SHIFT(1u)]), b[1]);
  y[2] = added(&sum, saturated(upper_half(sums[2], h[MANTISSA(2u)], h[OFFSET(2u)]) >> h[SHIFT(2u)]), b[2]);
  y[3] = added(&sum, saturated(upper_half(sums[3], h[MANTISSA(3u)], h[OFFSET(3u)]) >> h[SHIFT(3u)]), b[3]);
}

/* PLAIN. */
#define FINISH_FOUR(s0, s1, s2, s3, head_of_filters, y)                                                             \
  do {                                                                                                              \
    const int32_t *from = (head_of_filters);                                                                        \
    __asm__ volatile(                                                                                               \
        "ldmia  %[h]!, {r8, r9, r10, r11}\n\t"                                                                      \
        "smmla  %[a], %[a], r8, r10\n\t"                                                                            \
        "smmla  %[b], %[b], r9, r11\n\t"                                                                            \
        "ldrd   r8, r9, [%[h]], #16\n\t"                                                                            \
        "asr    %[a], %[a], r8\n\t"                                                                                 \
        "asr    %[b], %[b], r9\n\t"                                                                                 \
        "ldmia  %[h]!, {r8, r9, r10, r11}\n\t"                                                                      \
        "smmla  %[c], %[c], r8, r10\n\t"                                                                            \
        "smmla  %[d], %[d], r9, r11\n\t"                                                                            \
        "ldrd   r8, r9, [%[h]]\n\t"                                                                                 \
        "asr    %[c], %[c], r8\n\t"                                                                                 \
        "asr    %[d], %[d], r9\n\t"                                                                                 \
        "ssat   %[a], #8, %[a]\n\t"                                                                                 \
        "ssat   %[b], #8, %[b]\n\t"                                                                                 \
        "ssat   %[c], #8, %[c]\n\t"                                                                                 \
        "ssat   %[d], #8, %[d]\n\t"                                                                                 \
        "strb   %[a], [%[to]]\n\t"                                                                                  \
        "strb   %[b], [%[to], #1]\n\t"                                                                              \
        "strb   %[c], [%[to], #2]\n\t"                                                                              \
        "strb   %[d], [%[to], #3]\n\t"                                                                              \
        : [a] "+r"(s0), [b] "+r"(s1), [c] "+r"(s2), [d] "+r"(s3), [h] "+r"(from)                                    \
        : [to] "r"(y)                                                                                               \
        : "r8", "r9", "r10", "r11", "memory");                                                                      \
  } while (0)
#endif

/* ---- convolution ------------------------------------------------------------------------------------------------ */

/* A part of the result, of positions whose windows lie alike: where it starts, in the image and in the result, and how far
 * apart its columns and rows lie. */
typedef struct {
  const int8_t *x;
  const int16_t *w;
  const int32_t *start;
  uint32_t place;
  uint32_t n_rows, n_columns;
  uint32_t x_row, x_column;
} part;

#if DSP
/* Rows of a window, each of one run of n codes; gaps, in bytes: of the image, and of the weights. */
#ifdef __clang__
#define WINDOW(body)                                                       \
  do {                                                                     \
    RUN(body, a + n);                                                      \
    a += gaps[0];                                                          \
    w += gaps[1] / 2;                                                      \
  } while (w != w_end)
#else
#define WINDOW(body)                                                                                                \
  do {                                                                                                              \
    int32_t p, h;                                                                                                   \
    const int8_t *end;                                                                                              \
    __asm__ volatile(                                                                                               \
        "2:\n\t"                                                                                                    \
        "ldr    %[end], %[n]\n\t"                                                                                   \
        "add    %[end], %[end], %[a]\n\t" LOOP(body)                                                                \
        "ldrd   %[p], %[t], %[gaps]\n\t"                                                                            \
        "add    %[a], %[a], %[p]\n\t"                                                                               \
        "add    %[w], %[w], %[t]\n\t"                                                                               \
        "ldr    %[p], %[w_end]\n\t"                                                                                 \
        "cmp    %[w], %[p]\n\t"                                                                                     \
        "bne    2b\n\t"                                                                                             \
        : [a] "+r"(a), [w] "+r"(w), [s0] "+r"(s0), [s1] "+r"(s1), [s2] "+r"(s2), [s3] "+r"(s3), [p] "=&r"(p),       \
          [t] "=&r"(h), [end] "=&r"(end)                                                                            \
        : [n] "m"(n), [gaps] "m"(gaps), [w_end] "m"(w_end)                                                          \
        : "r8", "r9", "r10", "r11", "cc", "memory");                                                                \
  } while (0)
#endif

/* Four filters at many positions, where a row of a window is a run of fours, and there is a row. */
INLINE void compute_rows(enum taps_kind kind, const filters *p, const taps *t, const part *h) {
  const int16_t *first = h->w;
  const int32_t *start = h->start;
  uint32_t x_step = h->x_column, y_step = p->conv->window.out_channels, n = t->n, row;
  const int16_t *w_end = first + t->height * (FILTERS * t->n + t->w_gap);
  const int32_t gaps[2] = {gap(t->x_row, n), (int32_t)(t->w_gap * sizeof(int16_t))};
  enum finish_kind finished_by = p->kind;
  for (row = 0; row < h->n_rows; row++) {
    const int8_t *x = h->x + row * h->x_row;
    int8_t *y = p->y + h->place + row * p->conv->window.out_width * y_step;
    uint32_t count = h->n_columns;
    for (; count; count--, x += x_step, y += y_step) {
      const int8_t *a = x;
      const int16_t *w = first;
      int32_t s0 = start[0], s1 = start[1], s2 = start[2], s3 = start[3];
      if (kind == FORTY_EIGHTS)
        WINDOW(SIXTEEN_TAPS SIXTEEN_TAPS SIXTEEN_TAPS);
      else if (kind == SIXTEENS)
        WINDOW(SIXTEEN_TAPS);
      else
        WINDOW(FOUR_TAPS);
      if (finished_by == PLAIN) {
        FINISH_FOUR(s0, s1, s2, s3, p->head, y);
      } else {
        int32_t sums[FILTERS];
        sums[0] = s0;
        sums[1] = s1;
        sums[2] = s2;
        sums[3] = s3;
        if (finished_by == SUMMED)
          finish_sums(p, sums, (uint32_t)(y - p->y));
        else
          finish(p, sums, (uint32_t)(y - p->y));
      }
    }
  }
}
#endif

INLINE void compute_kind(enum taps_kind kind, const filters *p, const taps *t, const part *h) {
  const int16_t *w = h->w;
  const int32_t *start = h->start;
  uint32_t y_step = p->conv->window.out_channels, x_step = h->x_column, row;
  const taps here = *t; /* of which no store can be a part */
  int32_t sums[FILTERS];
  for (row = 0; row < h->n_rows; row++) {
    const int8_t *a = h->x + row * h->x_row;
    uint32_t place = h->place + row * p->conv->window.out_width * y_step;
    uint32_t count = h->n_columns;
    for (; count; count--, a += x_step, place += y_step) {
      sums[0] = start[0];
      sums[1] = start[1];
      sums[2] = start[2];
      sums[3] = start[3];
      if (kind == CHANNELS)
        add_channels(&here, a, w, sums);
      else
        add_products(&here, a, w, sums);
      if (p->kind == PLAIN) {
        const int32_t *head = p->head;
        int8_t *y = p->y + place;
        y[0] = (int8_t)saturated(upper_half(sums[0], head[MANTISSA(0u)], head[OFFSET(0u)]) >> head[SHIFT(0u)]);
        y[1] = (int8_t)saturated(upper_half(sums[1], head[MANTISSA(1u)], head[OFFSET(1u)]) >> head[SHIFT(1u)]);
        y[2] = (int8_t)saturated(upper_half(sums[2], head[MANTISSA(2u)], head[OFFSET(2u)]) >> head[SHIFT(2u)]);
        y[3] = (int8_t)saturated(upper_half(sums[3], head[MANTISSA(3u)], head[OFFSET(3u)]) >> head[SHIFT(3u)]);
      } else {
        finish(p, sums, place);
      }
    }
  }
}

APART void compute(const filters *p, const taps *t, const part *h) {
#if DSP
  enum taps_kind kind = kind_of(t);
  if (kind == FORTY_EIGHTS)
    compute_rows(FORTY_EIGHTS, p, t, h);
  else if (kind == SIXTEENS)
    compute_rows(SIXTEENS, p, t, h);
  else if (kind == FOURS)
    compute_rows(FOURS, p, t, h);
  else
#endif
    compute_kind(ANY, p, t, h);
}

/* The taps of a window that lie inside, along one axis: [first, last). */
static void inside(int32_t start, uint32_t extent, uint32_t n_taps, uint32_t dilation, uint32_t *first, uint32_t *last) {
  uint32_t k = 0;
  while (k < n_taps && start + (int32_t)(k * dilation) < 0) k++;
  *first = k;
  while (k < n_taps && start + (int32_t)(k * dilation) < (int32_t)extent) k++;
  *last = k;
}

static void add_four(const int32_t *from, int32_t *to) {
  to[0] += from[0];
  to[1] += from[1];
  to[2] += from[2];
  to[3] += from[3];
}

/* What the zero point gives at each tap of the kernel, times the weights there, for every filter: what a tap outside the
 * image lacks in sums from whose bias all of it was taken. */
static void sum_taps(const edgecomp_conv *conv, const int16_t *w, int32_t *tap_sums) {
  const edgecomp_window *v = &conv->window;
  uint32_t n = (uint32_t)v->in_channels / conv->groups, n_taps = (uint32_t)v->kernel_height * v->kernel_width, k;
  int32_t zero = conv->in_zero;
  for (; n_taps; n_taps--, tap_sums += FILTERS) {
    int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    for (k = 0; k + 2u <= (n & ~3u); k += 2u, w += 2u * FILTERS) {
      s0 += w[0] + w[1];
      s1 += w[2] + w[3];
      s2 += w[4] + w[5];
      s3 += w[6] + w[7];
    }
    for (; k < n; k++, w += FILTERS) {
      s0 += w[0];
      s1 += w[1];
      s2 += w[2];
      s3 += w[3];
    }
    tap_sums[0] = zero * s0;
    tap_sums[1] = zero * s1;
    tap_sums[2] = zero * s2;
    tap_sums[3] = zero * s3;
  }
}

/* Add the rows of taps outside the image to `start`, which holds the biases, and those inside, column by column, to
 * `columns`, for where a column is outside. */
static void add_outside(const edgecomp_conv *conv, const int32_t *tap_sums, const uint32_t rows[2], int32_t *start,
                        int32_t *columns) {
  uint32_t i, k, width = FILTERS * conv->window.kernel_width;
  memset(columns, 0, width * sizeof(int32_t));
  for (i = 0; i < conv->window.kernel_height; i++) {
    int is_inside = i >= rows[0] && i < rows[1];
    for (k = 0; k < width; k += FILTERS, tap_sums += FILTERS) add_four(tap_sums, is_inside ? columns + k : start);
  }
}

static void add_columns(const int32_t *columns, uint32_t first, uint32_t last, int32_t *sums) {
  uint32_t k;
  for (k = first; k < last; k++) add_four(columns + FILTERS * k, sums);
}

/* Rows or columns of the result whose windows lie inside the image: [first, last). */
static void whole(uint32_t extent, uint32_t n_out, uint32_t reach, uint32_t stride, uint32_t pad, uint32_t *first,
                  uint32_t *last) {
  uint32_t lo = (pad + stride - 1u) / stride;
  uint32_t hi = extent + pad <= reach ? 0u : (extent + pad - 1u - reach) / stride + 1u;
  if (hi > n_out) hi = n_out;
  if (lo >= hi) lo = hi = 0u;
  *first = lo;
  *last = hi;
}

/* Go through all positions with some filters of a group. The result is cut into parts at its borders, where windows reach
 * out of the image. */
APART void convolve(const filters *p, const int8_t *x, const int16_t *w, int32_t *tap_sums) {
  const edgecomp_conv *conv = p->conv;
  const edgecomp_window *v = &conv->window;
  uint32_t n = (uint32_t)v->in_channels / conv->groups, width = v->kernel_width, k;
  int is_row = conv->groups == 1u && v->dilation_width == 1u;
  int32_t *columns = tap_sums ? tap_sums + FILTERS * v->kernel_height * width : 0;
  int32_t start[FILTERS], edge[FILTERS];
  uint32_t rows[2], cols[2], top, bottom, lo, hi, oy, ox;
  taps t;
  part h;
  t.x_row = (uint32_t)v->dilation_height * v->in_width * v->in_channels;
  t.x_run = (uint32_t)v->dilation_width * v->in_channels;
  t.n = n;
  t.width = 1u;
  h.x_row = (uint32_t)v->stride_height * v->in_width * v->in_channels;
  h.x_column = (uint32_t)v->stride_width * v->in_channels;
  whole(v->in_height, v->out_height, (v->kernel_height - 1u) * v->dilation_height, v->stride_height, v->pad_top, &top,
        &bottom);
  whole(v->in_width, v->out_width, (width - 1u) * v->dilation_width, v->stride_width, v->pad_left, &lo, &hi);
  if (tap_sums) sum_taps(conv, w, tap_sums);
  for (oy = 0; oy < v->out_height; oy += h.n_rows) {
    int32_t y0 = (int32_t)(oy * v->stride_height) - v->pad_top;
    h.n_rows = oy == top && bottom ? bottom - top : 1u;
    inside(y0, v->in_height, v->kernel_height, v->dilation_height, &rows[0], &rows[1]);
    for (k = 0; k < FILTERS; k++) start[k] = p->head[BIAS(k)];
    if (tap_sums) add_outside(conv, tap_sums, rows, start, columns);
    for (ox = 0; ox < v->out_width; ox += h.n_columns) {
      int32_t x0 = (int32_t)(ox * v->stride_width) - v->pad_left;
      h.n_columns = ox == lo && hi ? hi - lo : 1u;
      h.place = (oy * v->out_width + ox) * v->out_channels + p->channel;
      inside(x0, v->in_width, width, v->dilation_width, &cols[0], &cols[1]);
      for (k = 0; k < FILTERS; k++) edge[k] = start[k];
      if (columns) {
        add_columns(columns, 0u, cols[0], edge);
        add_columns(columns, cols[1], width, edge);
      }
      if (is_row)
        t.n = t.x_run = (cols[1] - cols[0]) * n;
      else
        t.width = cols[1] - cols[0];
      t.w_gap = (width - (cols[1] - cols[0])) * n * FILTERS;
      /* Where a window lies beside the image there is nothing to read. */
      t.height = cols[0] == cols[1] ? 0u : rows[1] - rows[0];
      h.x = x;
      if (t.height)
        h.x += ((uint32_t)(y0 + (int32_t)(rows[0] * v->dilation_height)) * v->in_width +
                (uint32_t)(x0 + (int32_t)(cols[0] * v->dilation_width))) *
               v->in_channels;
      h.w = w + (rows[0] * width + cols[0]) * n * FILTERS;
      h.start = edge;
      compute(p, &t, &h);
    }
  }
}

static int reaches_out(const edgecomp_window *v) {
  return v->pad_top || v->pad_left ||
         (v->out_height - 1u) * v->stride_height + (v->kernel_height - 1u) * v->dilation_height >= v->in_height ||
         (v->out_width - 1u) * v->stride_width + (v->kernel_width - 1u) * v->dilation_width >= v->in_width;
}

/* ---- convolution on patches ------------------------------------------------------------------------------------- */

/* A patch holds the windows of some positions, the zero point where they reach out of the image, so that one long run is
 * left for all filters that are decoded. With DSP it is widened to 16 bits once, not by every filter, and the weights that
 * are loaded serve three positions. */
#if DSP
#define POSITIONS 3u
#define PATCH_BYTES (2u * POSITIONS)
#else
#define POSITIONS 1u
#define PATCH_BYTES 0u
#endif

static void fill(int8_t code, uint32_t n, int8_t *to) {
  for (; n; n--) *to++ = code;
}

static void copy_codes(const int8_t *a, uint32_t n, int8_t *to) {
#if DSP
  const int8_t *last = a + n - 4;
  if (n >= 4u) {
    int8_t *end = to + n - 4;
    for (; a < last; a += 4, to += 4) memcpy(to, a, 4);
    memcpy(end, last, 4);
    return;
  }
#endif
  for (; n; n--) *to++ = *a++;
}

#if DSP
/* Widen codes, four by four: 0 and 2, then, behind the other positions' 0 and 2, 1 and 3. */
APART int16_t *widen(const int8_t *a, uint32_t n, int16_t *to) {
  const int8_t *end = a + n;
  while (a != end) {
    int32_t p, t;
    __asm__ volatile(
        "ldr    %[p], [%[a]], #4\n\t"
        "sxtb16 %[t], %[p]\n\t"
        "sxtb16 %[p], %[p], ror #8\n\t"
        "str    %[t], [%[to]], #12\n\t"
        "str    %[p], [%[to]], #12\n\t"
        : [a] "+r"(a), [to] "+r"(to), [p] "=&r"(p), [t] "=&r"(t)
        :
        : "memory");
  }
  return to;
}

static int16_t *widen_fill(int8_t code, uint32_t n, int16_t *to) {
  for (; n; n -= 2u, to += 2u * POSITIONS) to[0] = to[1] = code;
  return to;
}
#endif

/* Where the windows of a layer begin, and how they are copied. */
typedef struct {
  const edgecomp_conv *conv;
  const int8_t *x;
  uint32_t run, x_row;               /* codes of a row of a window, and from one to the next in the image */
  uint32_t y_step, x_step, origin;   /* from window to window, and from the first one to the image */
  uint32_t top, bottom, left, right; /* positions whose windows lie inside */
} windows;

/* Copy a window with the zero point where it reaches out of the image: as it is, or widened. */
APART void copy_border(const windows *c, int32_t top, int32_t left, int is_wide, int8_t *window, int16_t *patch) {
  const edgecomp_window *v = &c->conv->window;
  uint32_t n = v->in_channels, k, rows[2], cols[2];
  int8_t zero = c->conv->in_zero;
  inside(top, v->in_height, v->kernel_height, v->dilation_height, &rows[0], &rows[1]);
  inside(left, v->in_width, v->kernel_width, 1u, &cols[0], &cols[1]);
  for (k = 0; k < v->kernel_height; k++) {
    int is_inside = cols[0] != cols[1] && k >= rows[0] && k < rows[1];
    uint32_t before = is_inside ? cols[0] * n : c->run, some = is_inside ? (cols[1] - cols[0]) * n : 0u;
    uint32_t behind = c->run - before - some;
    const int8_t *a = c->x;
    if (is_inside)
      a += ((uint32_t)(top + (int32_t)(k * v->dilation_height)) * v->in_width + (uint32_t)(left + (int32_t)cols[0])) * n;
#if DSP
    if (is_wide) {
      patch = widen_fill(zero, before, patch);
      patch = widen(a, some, patch);
      patch = widen_fill(zero, behind, patch);
      continue;
    }
#endif
    fill(zero, before, window);
    copy_codes(a, some, window + before);
    fill(zero, behind, window + before + some);
    window += c->run;
  }
  (void)is_wide;
  (void)patch;
}

/* The same for a window that lies inside. */
static int8_t *copy_rows(const int8_t *a, uint32_t height, uint32_t run, uint32_t x_row, int8_t *to) {
  for (; height; height--, a += x_row) {
#if DSP
    if (run >= 4u) {
      const int8_t *b = a, *last = a + run - 4u;
      int8_t *end = to + run - 4u;
      for (; b < last; b += 4, to += 4) memcpy(to, b, 4);
      memcpy(end, last, 4);
      to = end + 4;
      continue;
    }
#endif
    copy_codes(a, run, to);
    to += run;
  }
  return to;
}

/* Copy the window of a position into a patch; n: its taps, rounded up to fours. */
static void copy_window(const windows *c, uint32_t oy, uint32_t ox, uint32_t n, int8_t *window, int16_t *patch) {
  const edgecomp_window *v = &c->conv->window;
  int is_inside = oy >= c->top && oy < c->bottom && ox >= c->left && ox < c->right;
  int is_wide = DSP && !((is_inside ? c->run : v->in_channels) & 3u);
  if (is_inside) {
    const int8_t *a = c->x + (oy * c->y_step + ox * c->x_step - c->origin);
    uint32_t k;
    if (!is_wide) (void)copy_rows(a, v->kernel_height, c->run, c->x_row, window);
#if DSP
    for (k = v->kernel_height; is_wide && k; k--, a += c->x_row) patch = widen(a, c->run, patch);
#else
    (void)k;
#endif
  } else {
    copy_border(c, (int32_t)(oy * v->stride_height) - v->pad_top, (int32_t)(ox * v->stride_width) - v->pad_left, is_wide,
                window, patch);
  }
#if DSP
  if (!is_wide) (void)widen(window, n, patch);
#else
  (void)n;
#endif
}

/* Decode a run of four filters, or fewer, so that it ends with a four of taps. */
static void decode_fours(reader *r, uint32_t n, uint32_t n_filters, int16_t *out) {
  int16_t rest[3u * FILTERS];
  uint32_t n_rest = n & 3u, f;
  next_part(r);
  if (n_filters < FILTERS) memset(out, 0, FILTERS * n * sizeof(int16_t));
  out = decode_run(r, n, n_filters, out) - FILTERS * n_rest;
  if (!n_rest) return;
  memset(rest, 0, sizeof rest);
  memcpy(rest, out, FILTERS * n_rest * sizeof(int16_t));
  for (f = 0; f < FILTERS; f++, out += 2) {
    out[0] = rest[f];
    out[1] = rest[2u * FILTERS + f];
    out[2u * FILTERS] = rest[FILTERS + f];
    out[2u * FILTERS + 1u] = 0;
  }
}

#if DSP
/* Two taps of two filters at three positions. */
#define TWO_TAPS                            \
  "ldmia  %[a]!, {r8, r9, r10}\n\t"         \
  "ldrd   %[u], %[v], [%[w]], #16\n\t"      \
  "smlad  %[s0], r8, %[u], %[s0]\n\t"       \
  "smlad  %[s1], r9, %[u], %[s1]\n\t"       \
  "smlad  %[s2], r10, %[u], %[s2]\n\t"      \
  "smlad  %[s3], r8, %[v], %[s3]\n\t"       \
  "smlad  %[s4], r9, %[v], %[s4]\n\t"       \
  "smlad  %[s5], r10, %[v], %[s5]\n\t"
/* Until a reaches end. */
#define PATCH_RUN(body, end)                                                                                        \
  do {                                                                                                              \
    int32_t u, v;                                                                                                   \
    __asm__ volatile(REPEATED(body, "%[u]")                                                                         \
                     : [a] "+r"(a), [w] "+r"(w), [s0] "+r"(s0), [s1] "+r"(s1), [s2] "+r"(s2), [s3] "+r"(s3),        \
                       [s4] "+r"(s4), [s5] "+r"(s5), [u] "=&r"(u), [v] "=&r"(v)                                     \
                     : END_IN_MEMORY(end)                                                                           \
                     : "r8", "r9", "r10", "cc", "memory");                                                          \
  } while (AGAIN(a, end))

/* PLAIN, of two filters at three positions. */
#define FINISH_SIX(head_of_two, y, y_step)                                                                          \
  __asm__ volatile(                                                                                                 \
        "ldmia  %[h], {r8, r9, r10, r11}\n\t"                                                                       \
        "smmla  %[s0], %[s0], r8, r10\n\t"                                                                          \
        "smmla  %[s1], %[s1], r8, r10\n\t"                                                                          \
        "smmla  %[s2], %[s2], r8, r10\n\t"                                                                          \
        "smmla  %[s3], %[s3], r9, r11\n\t"                                                                          \
        "smmla  %[s4], %[s4], r9, r11\n\t"                                                                          \
        "smmla  %[s5], %[s5], r9, r11\n\t"                                                                          \
        "ldrd   r8, r9, [%[h], #16]\n\t"                                                                            \
        "asr    %[s0], %[s0], r8\n\t"                                                                               \
        "asr    %[s1], %[s1], r8\n\t"                                                                               \
        "asr    %[s2], %[s2], r8\n\t"                                                                               \
        "asr    %[s3], %[s3], r9\n\t"                                                                               \
        "asr    %[s4], %[s4], r9\n\t"                                                                               \
        "asr    %[s5], %[s5], r9\n\t"                                                                               \
        "ssat   %[s0], #8, %[s0]\n\t"                                                                               \
        "ssat   %[s1], #8, %[s1]\n\t"                                                                               \
        "ssat   %[s2], #8, %[s2]\n\t"                                                                               \
        "ssat   %[s3], #8, %[s3]\n\t"                                                                               \
        "ssat   %[s4], #8, %[s4]\n\t"                                                                               \
        "ssat   %[s5], #8, %[s5]\n\t"                                                                               \
        "strb   %[s0], [%[to]]\n\t"                                                                                 \
        "strb   %[s3], [%[to], #1]\n\t"                                                                             \
        "add    r8, %[to], %[step]\n\t"                                                                             \
        "strb   %[s1], [r8]\n\t"                                                                                    \
        "strb   %[s4], [r8, #1]\n\t"                                                                                \
        "add    r8, r8, %[step]\n\t"                                                                                \
        "strb   %[s2], [r8]\n\t"                                                                                    \
        "strb   %[s5], [r8, #1]\n\t"                                                                                \
      : [s0] "+r"(s0), [s1] "+r"(s1), [s2] "+r"(s2), [s3] "+r"(s3), [s4] "+r"(s4), [s5] "+r"(s5)                    \
      : [h] "r"(head_of_two), [to] "r"(y), [step] "r"(y_step)                                                       \
      : "r8", "r9", "r10", "r11", "memory")

/* Store a filter's results at some positions. */
APART void finish_positions(const filters *p, const int32_t *head, uint32_t f, const int32_t *sums, uint32_t n,
                            uint32_t at) {
  uint32_t step = p->conv->window.out_channels, k;
  if (p->kind == SUMMED) {
    const addition sum = addition_of(p->conv->sum);
    int32_t mantissa = head[MANTISSA(f)], offset = head[OFFSET(f)], shift = head[SHIFT(f)];
    const int8_t *b = p->residual + at;
    int8_t *y = p->y + at;
    for (k = 0; k < n; k++, b += step, y += step)
      *y = added(&sum, saturated(upper_half(sums[k], mantissa, offset) >> shift), *b);
    return;
  }
  for (k = 0; k < n; k++, at += step) {
    int8_t found = code_of(&p->conv->scaling, head, f, sums[k]);
    if (p->residual)
      add_codes(p->conv->sum, 1u, &found, p->residual + at, p->y + at);
    else
      p->y[at] = found;
  }
}

/* Compute some filters at three positions, or fewer. n: taps; four: the first four filters, with their head. */
APART void compute_patch(const filters *p, const int16_t *patch, const int16_t *four, uint32_t n, uint32_t at,
                         uint32_t n_positions) {
  const int16_t *end_16 = patch + POSITIONS * (n & ~15u), *end = patch + POSITIONS * n;
  uint32_t step = p->conv->window.out_channels, f;
  int plain = p->kind == PLAIN && n_positions == POSITIONS && !(p->n & 1u);
  for (f = 0; f < p->n; f += 2u, at += 2u) {
    const int32_t *head = (const int32_t *)(const void *)four + BIAS(f & 2u);
    const int16_t *a = patch, *w = four + 2u * HEAD + 2u * (f & 2u);
    int32_t s0 = head[0], s1 = s0, s2 = s0, s3 = head[1], s4 = s3, s5 = s3;
    if (n & ~15u) PATCH_RUN(TWO_TAPS TWO_TAPS TWO_TAPS TWO_TAPS TWO_TAPS TWO_TAPS TWO_TAPS TWO_TAPS, end_16);
    if (n & 12u) PATCH_RUN(TWO_TAPS TWO_TAPS, end);
    head = (const int32_t *)(const void *)four;
    if (plain) {
      FINISH_SIX(head + MANTISSA(f & 2u), p->y + at, step);
    } else {
      int32_t sums[2u * POSITIONS];
      sums[0] = s0;
      sums[1] = s1;
      sums[2] = s2;
      sums[3] = s3;
      sums[4] = s4;
      sums[5] = s5;
      finish_positions(p, head, f & 2u, sums, n_positions, at);
      if (f + 1u < p->n) finish_positions(p, head, (f & 2u) + 1u, sums + POSITIONS, n_positions, at + 1u);
    }
    if (f & 2u) four += 2u * HEAD + FILTERS * n;
  }
}
#endif

/* Go through all positions with as many filters at a time as are decoded, four and four. n: taps of a filter, rounded up to
 * fours. */
APART void convolve_patches(filters *p, const int8_t *x, uint32_t n, uint32_t fours, void *scratch) {
  const edgecomp_conv *conv = p->conv;
  const edgecomp_window *v = &conv->window;
  uint32_t n_taps = (uint32_t)v->kernel_height * v->kernel_width * v->in_channels, four = EDGECOMP_FOUR_BYTES / 2u + FILTERS * n;
  uint32_t n_places = (uint32_t)v->out_height * v->out_width, n_filters = v->out_channels, first, c, place, oy, ox;
  int16_t *w = (int16_t *)scratch, *patch = w + fours * four;
  int8_t *window = (int8_t *)patch + PATCH_BYTES * n;
  reader r = open_stream(&conv->weights);
  windows from;
#if !DSP
  int32_t start[FILTERS];
  taps t;
  part h;
  t.height = t.width = 1u;
  t.n = t.x_run = n;
  t.x_row = t.w_gap = 0u;
  h.x = window;
  h.start = start;
  h.n_rows = h.n_columns = 1u;
  h.x_row = h.x_column = 0u;
#endif
  p->kind = finish_of(conv, p->residual);
  from.conv = conv;
  from.x = x;
  from.run = (uint32_t)v->kernel_width * v->in_channels;
  from.x_row = (uint32_t)v->dilation_height * v->in_width * v->in_channels;
  from.y_step = (uint32_t)v->stride_height * v->in_width * v->in_channels;
  from.x_step = (uint32_t)v->stride_width * v->in_channels;
  from.origin = ((uint32_t)v->pad_top * v->in_width + v->pad_left) * v->in_channels;
  whole(v->in_height, v->out_height, (v->kernel_height - 1u) * v->dilation_height, v->stride_height, v->pad_top,
        &from.top, &from.bottom);
  whole(v->in_width, v->out_width, v->kernel_width - 1u, v->stride_width, v->pad_left, &from.left, &from.right);
  for (c = n_taps; c < n; c++) window[c] = 0;
  for (first = 0; first < n_filters; first += FILTERS * fours) {
    uint32_t n_now = n_filters - first < FILTERS * fours ? n_filters - first : FILTERS * fours;
    for (c = 0; c < n_now; c += FILTERS) {
      uint32_t some = n_now - c < FILTERS ? n_now - c : FILTERS;
      int16_t *to = w + c / FILTERS * four;
#if DSP
      write_head(&conv->scaling, first + c, some, (int32_t *)(void *)to);
#endif
      decode_fours(&r, n_taps, some, to + EDGECOMP_FOUR_BYTES / 2u);
      lift(to + EDGECOMP_FOUR_BYTES / 2u, FILTERS * n, conv->lift);
    }
    oy = ox = 0;
    for (place = 0; place < n_places; place += POSITIONS) {
      uint32_t count = n_places - place < POSITIONS ? n_places - place : POSITIONS, k;
      for (k = 0; k < count; k++) {
        copy_window(&from, oy, ox, n, window, patch + 2u * k);
        if (++ox == v->out_width) {
          ox = 0;
          oy++;
        }
      }
#if DSP
      p->n = n_now;
      compute_patch(p, patch, w, n, place * n_filters + first, count);
#else
      for (c = 0; c < n_now; c += FILTERS) {
        load_filters(p, first + c, n_now - c < FILTERS ? n_now - c : FILTERS);
        for (k = 0; k < FILTERS; k++) start[k] = p->head[BIAS(k)];
        h.place = place * n_filters + first + c;
        h.w = w + c / FILTERS * four + EDGECOMP_FOUR_BYTES / 2u;
        compute_kind(ANY, p, &t, &h);
      }
#endif
    }
  }
}

void edgecomp_conv2d(const edgecomp_conv *conv, const int8_t *x, const int8_t *residual, int8_t *y, void *scratch,
                     uint32_t scratch_bytes) {
  const edgecomp_window *v = &conv->window;
  uint32_t n = (uint32_t)v->in_channels / conv->groups, per_group = (uint32_t)v->out_channels / conv->groups;
  uint32_t n_taps = (uint32_t)v->kernel_height * v->kernel_width;
  int is_row = conv->groups == 1u && v->dilation_width == 1u;
  uint32_t run = is_row ? n * v->kernel_width : n;
  int16_t *w = (int16_t *)scratch;
  reader r = open_stream(&conv->weights);
  uint32_t g, o;
  filters p;
  p.conv = conv;
  p.residual = residual;
  p.y = y;
  if (is_row) {
    uint32_t all = (n_taps * n + 3u) & ~3u, fours = (per_group + FILTERS - 1u) / FILTERS;
    uint32_t taken = (n & 3u ? 7u : 6u) * all;
    uint32_t room = scratch_bytes <= taken ? 0u : (scratch_bytes - taken) / (EDGECOMP_FOUR_BYTES + 8u * all);
    if (room > fours) room = fours;
    if ((n & 3u) || (DSP && room >= (n_taps == 1u && fours < ENOUGH_FOURS ? fours : ENOUGH_FOURS))) {
      convolve_patches(&p, x, all, room, scratch);
      return;
    }
  }
  for (g = 0; g < conv->groups; g++) {
    for (o = 0; o < per_group; o += FILTERS) {
      int16_t *out = w;
      uint32_t i;
      load_filters(&p, g * per_group + o, per_group - o < FILTERS ? per_group - o : FILTERS);
      if (p.n < FILTERS) memset(w, 0, FILTERS * n_taps * n * sizeof(int16_t));
      next_part(&r);
      for (i = 0; i < n_taps * n; i += run) out = decode_run(&r, run, p.n, out);
      lift(w, FILTERS * n_taps * n, conv->lift);
      convolve(&p, x + g * n, w, reaches_out(v) && conv->in_zero ? (int32_t *)(w + FILTERS * n_taps * n) : 0);
    }
  }
}

/* ---- depthwise convolution -------------------------------------------------------------------------------------- */

/* Rows of four channels, copied out of the image with the zero point around, so that no window reaches out. A row is
 * `pitch` pixels long. As they lie in the image, or each channel by itself, `plane` bytes apart. */
typedef struct {
  int8_t *codes;
  uint32_t pitch, plane, n_rows;
} strip;

APART void copy_pixels(const int8_t *a, uint32_t n_channels, uint32_t step, uint32_t n, int8_t *to) {
  uint32_t f;
  for (; n; n--, a += step, to += FILTERS) {
#if DSP
    if (n_channels == FILTERS) {
      memcpy(to, a, FILTERS);
      continue;
    }
#endif
    for (f = 0; f < n_channels; f++) to[f] = a[f];
  }
}

#if DSP
static uint32_t lower_halves(uint32_t first, uint32_t second) {
  uint32_t found;
  __asm__("pkhbt %0, %1, %2, lsl #16" : "=r"(found) : "r"(first), "r"(second));
  return found;
}

static uint32_t upper_halves(uint32_t first, uint32_t second) {
  uint32_t found;
  __asm__("pkhtb %0, %2, %1, asr #16" : "=r"(found) : "r"(first), "r"(second));
  return found;
}

static uint32_t pair_of(int16_t first, int16_t second) {
  return lower_halves((uint16_t)first, (uint16_t)second);
}

static void put_word(uint32_t word, int8_t *to) { memcpy(to, &word, 4); }

/* The same, channel by channel. */
APART void split_pixels(const int8_t *a, uint32_t n_channels, uint32_t step, uint32_t n, uint32_t plane, int8_t *to) {
  uint32_t f;
  if (n_channels == FILTERS) {
    const uint32_t even = 0x00ff00ffu;
    uint32_t p0, p1, p2, p3, low, high;
    for (; n >= 4u; n -= 4u, to += 4) {
      memcpy(&p0, a, 4);
      memcpy(&p1, a + step, 4);
      a += 2u * step;
      memcpy(&p2, a, 4);
      memcpy(&p3, a + step, 4);
      a += 2u * step;
      low = (p0 & even) | (p1 & even) << 8;
      high = (p2 & even) | (p3 & even) << 8;
      put_word(lower_halves(low, high), to);
      put_word(upper_halves(low, high), to + 2u * plane);
      low = (p0 & ~even) >> 8 | (p1 & ~even);
      high = (p2 & ~even) >> 8 | (p3 & ~even);
      put_word(lower_halves(low, high), to + plane);
      put_word(upper_halves(low, high), to + 3u * plane);
    }
    for (; n; n--, a += step, to++) {
      memcpy(&p0, a, 4);
      to[0] = (int8_t)p0;
      to[plane] = (int8_t)(p0 >> 8);
      to[2u * plane] = (int8_t)(p0 >> 16);
      to[3u * plane] = (int8_t)(p0 >> 24);
    }
  }
  for (; n; n--, a += step, to++)
    for (f = 0; f < n_channels; f++) to[f * plane] = a[f];
}

/* Windows of 3x3, two of them, one beside the other. h: of each row the weights 0 and 2, and 1; then mantissa, offset, shift
 * and bias. */
#define PAIR_OF_WINDOWS                     \
  "ldr    %[s0], [%[h], #36]\n\t"           \
  "ldmia  %[h]!, {r8, r9, r10, r11}\n\t"    \
  "mov    %[s1], %[s0]\n\t"                 \
  "ldr    %[p], [%[a]]\n\t"                 \
  "sxtb16 %[t], %[p]\n\t"                   \
  "sxtb16 %[p], %[p], ror #8\n\t"           \
  "smlad  %[s0], %[t], r8, %[s0]\n\t"       \
  "smlabb %[s0], %[p], r9, %[s0]\n\t"       \
  "smlad  %[s1], %[p], r8, %[s1]\n\t"       \
  "smlatb %[s1], %[t], r9, %[s1]\n\t"       \
  "ldr    %[p], [%[a], %[pitch]]\n\t"       \
  "sxtb16 %[t], %[p]\n\t"                   \
  "sxtb16 %[p], %[p], ror #8\n\t"           \
  "smlad  %[s0], %[t], r10, %[s0]\n\t"      \
  "smlabb %[s0], %[p], r11, %[s0]\n\t"      \
  "smlad  %[s1], %[p], r10, %[s1]\n\t"      \
  "smlatb %[s1], %[t], r11, %[s1]\n\t"      \
  "ldr    %[p], [%[a], %[pitch], lsl #1]\n\t" \
  "ldmia  %[h]!, {r8, r9, r10, r11}\n\t"    \
  "sxtb16 %[t], %[p]\n\t"                   \
  "sxtb16 %[p], %[p], ror #8\n\t"           \
  "smlad  %[s0], %[t], r8, %[s0]\n\t"       \
  "smlabb %[s0], %[p], r9, %[s0]\n\t"       \
  "smlad  %[s1], %[p], r8, %[s1]\n\t"       \
  "smlatb %[s1], %[t], r9, %[s1]\n\t"       \
  "ldr    %[t], [%[h]], #-32\n\t"           \
  "smmla  %[s0], %[s0], r10, r11\n\t"       \
  "smmla  %[s1], %[s1], r10, r11\n\t"       \
  "asr    %[s0], %[s0], %[t]\n\t"           \
  "asr    %[s1], %[s1], %[t]\n\t"           \
  "ssat   %[s0], #8, %[s0]\n\t"             \
  "ssat   %[s1], #8, %[s1]\n\t"             \
  "strb   %[s0], [%[y]]\n\t"                \
  "strb   %[s1], [%[y], %[step]]\n\t"       \
  "add    %[y], %[y], %[step], lsl #1\n\t"  \
  "add    %[a], %[a], #2\n\t"
/* Until b reaches end. */
#define PAIRS_OF_WINDOWS(table, end)                                                                                \
  do {                                                                                                              \
    int32_t s0, s1, p, t;                                                                                           \
    const int32_t *h = (table);                                                                                     \
    __asm__ volatile(REPEATED(PAIR_OF_WINDOWS, "%[p]")                                                              \
                     : [a] "+r"(b), [y] "+r"(y), [h] "+r"(h), [s0] "=&r"(s0), [s1] "=&r"(s1), [p] "=&r"(p),         \
                       [t] "=&r"(t)                                                                                 \
                     : [pitch] "r"(pitch), [step] "r"(y_step), END_IN_MEMORY(end)                                   \
                     : "r8", "r9", "r10", "r11", "cc", "memory");                                                   \
  } while (AGAIN(b, end))
/* A row of one window. */
#define ROW_OF_ONE(address, outer, middle)                                     \
  do {                                                                         \
    int32_t p, t;                                                              \
    memcpy(&p, (address), 4);                                                  \
    __asm__(                                                                   \
        "sxtb16 %[t], %[p]\n\t"                                                \
        "sxtb16 %[p], %[p], ror #8\n\t"                                        \
        "smlad  %[s0], %[t], %[o], %[s0]\n\t"                                  \
        "smlabb %[s0], %[p], %[m], %[s0]\n\t"                                  \
        : [s0] "+r"(s0), [p] "+r"(p), [t] "=&r"(t)                             \
        : [o] "r"(outer), [m] "r"(middle));                                    \
  } while (0)

/* One channel's 3x3 windows in a strip, next to each other or every second one: of a row's four codes two instructions
 * make pairs, 0 and 2, 1 and 3, that serve two windows. */
APART void compute_plane(const filters *p, uint32_t f, const int16_t *w, uint32_t pitch, const int8_t *a,
                         uint32_t n_rows, int8_t *y) {
  const edgecomp_window *v = &p->conv->window;
  uint32_t y_step = v->out_channels, stride = v->stride_width, a_step = v->stride_height * pitch;
  uint32_t in_pairs = stride == 1u ? v->out_width & ~1u : 0u, n_single = v->out_width - in_pairs, count;
  int32_t table[10]; /* of each row the weights 0 and 2, and 1; mantissa, offset, shift, bias */
  for (count = 0, w += f; count < 6u; count += 2u, w += 3u * FILTERS) {
    table[count] = (int32_t)pair_of(w[0], w[2u * FILTERS]);
    table[count + 1u] = w[FILTERS];
  }
  table[6] = p->head[MANTISSA(f)];
  table[7] = p->head[OFFSET(f)];
  table[8] = p->head[SHIFT(f)];
  table[9] = p->head[BIAS(f)];
  for (; n_rows; n_rows--, a += a_step) {
    const int8_t *b = a, *end = a + in_pairs;
    if (in_pairs) PAIRS_OF_WINDOWS(table, end);
    for (count = n_single; count; count--, b += stride, y += y_step) {
      int32_t s0 = table[9];
      ROW_OF_ONE(b, table[0], table[1]);
      ROW_OF_ONE(b + pitch, table[2], table[3]);
      ROW_OF_ONE(b + 2u * pitch, table[4], table[5]);
      y[0] = (int8_t)saturated(upper_half(s0, table[6], table[7]) >> table[8]);
    }
  }
}
#endif

/* n bytes, of words. */
static void fill_words(int8_t code, uint32_t n, int8_t *to) {
  int32_t word = (int32_t)((uint8_t)code * 0x01010101u);
  int32_t *at = (int32_t *)(void *)to;
  for (; n; n -= 4u) *at++ = word;
}

/* Fill a strip with rows of the image, from `top` on, which may lie outside. What lies beside them is not touched. */
APART void fill_strip(const edgecomp_conv *conv, const int8_t *x, uint32_t n_channels, int is_split, int32_t top,
                      const strip *to) {
  const edgecomp_window *v = &conv->window;
  uint32_t left = v->pad_left < to->pitch ? v->pad_left : to->pitch, row, f;
  uint32_t width = to->pitch - left < v->in_width ? to->pitch - left : v->in_width, n_rows = to->n_rows;
  uint32_t row_bytes = is_split ? to->pitch : to->pitch * FILTERS, x_row = (uint32_t)v->in_width * v->in_channels;
  int8_t *codes = to->codes;
  for (row = 0; row < n_rows; row++, codes += row_bytes) {
    int32_t y = top + (int32_t)row;
    if (y < 0 || y >= v->in_height) {
      for (f = 0; f < (is_split ? FILTERS : 1u); f++) fill_words(conv->in_zero, row_bytes, codes + f * to->plane);
      continue;
    }
#if DSP
    if (is_split) {
      split_pixels(x + (uint32_t)y * x_row, n_channels, v->in_channels, width, to->plane, codes + left);
      continue;
    }
#endif
    copy_pixels(x + (uint32_t)y * x_row, n_channels, v->in_channels, width, codes + left * FILTERS);
  }
}

void edgecomp_depthwise(const edgecomp_conv *conv, const int8_t *x, int8_t *y, void *scratch, uint32_t scratch_bytes) {
  const edgecomp_window *v = &conv->window;
  uint32_t n_taps = (uint32_t)v->kernel_height * v->kernel_width, c, i, oy, band;
  uint32_t reach = (v->kernel_height - 1u) * v->dilation_height + 1u;
  int16_t *w = (int16_t *)scratch;
  int is_split = DSP && v->kernel_height == 3u && v->kernel_width == 3u && v->dilation_height == 1u &&
                 v->dilation_width == 1u && v->stride_width <= 2u && finish_of(conv, 0) == PLAIN;
  reader r = open_stream(&conv->weights);
  int32_t start[FILTERS];
  filters p;
  strip s;
  taps t;
  part h;
  p.conv = conv;
  p.residual = 0;
  p.y = y;
  s.codes = (int8_t *)(w + FILTERS * n_taps);
  s.pitch = ((v->out_width - 1u) * v->stride_width + (v->kernel_width - 1u) * v->dilation_width + 4u) & ~3u;
  /* As many rows as there is room for: whole bands of the result. */
  band = (scratch_bytes - 8u * n_taps) / (FILTERS * s.pitch);
  band = band <= reach ? 1u : (band - reach) / v->stride_height + 1u;
  s.plane = s.pitch * ((band - 1u) * v->stride_height + reach);
  t.height = v->kernel_height;
  t.width = v->kernel_width;
  t.n = 1u;
  t.x_row = v->dilation_height * s.pitch * FILTERS;
  t.x_run = v->dilation_width * FILTERS;
  t.w_gap = 0;
  h.x = s.codes;
  h.w = w;
  h.start = start;
  h.n_columns = v->out_width;
  h.x_row = v->stride_height * s.pitch * FILTERS;
  h.x_column = v->stride_width * FILTERS;
  fill_words(conv->in_zero, FILTERS * s.plane, s.codes);
  for (c = 0; c < v->in_channels; c += FILTERS) {
    load_filters(&p, c, v->in_channels - c < FILTERS ? v->in_channels - c : FILTERS);
    for (i = 0; i < FILTERS; i++) start[i] = p.head[BIAS(i)];
    next_part(&r);
    if (p.n < FILTERS) memset(w, 0, FILTERS * n_taps * sizeof(int16_t));
    if (p.n == FILTERS)
      decode(&r, FILTERS * n_taps, w);
    else
      for (i = 0; i < n_taps; i++) decode(&r, p.n, w + FILTERS * i);
    lift(w, FILTERS * n_taps, conv->lift);
    for (oy = 0; oy < v->out_height; oy += band) {
      h.n_rows = v->out_height - oy < band ? v->out_height - oy : band;
      h.place = oy * v->out_width * v->out_channels + c;
      s.n_rows = (h.n_rows - 1u) * v->stride_height + reach;
      fill_strip(conv, x + c, p.n, is_split, (int32_t)(oy * v->stride_height) - v->pad_top, &s);
#if DSP
      if (is_split) {
        for (i = 0; i < p.n; i++) compute_plane(&p, i, w, s.pitch, s.codes + i * s.plane, h.n_rows, y + h.place + i);
        continue;
      }
#endif
      compute_kind(CHANNELS, &p, &t, &h);
    }
  }
}

/* ---- linear layers ---------------------------------------------------------------------------------------------- */

void edgecomp_fully_connected(const edgecomp_linear *linear, const int8_t *x, int8_t *y, void *scratch) {
  const edgecomp_scaling *s = &linear->scaling;
  reader r = open_stream(&linear->weights);
  int16_t *w = (int16_t *)scratch;
  uint32_t o, i, f;
  taps t;
  memset(&t, 0, sizeof t);
  t.height = t.width = 1u;
  for (o = 0; o < linear->n_out; o += FILTERS) {
    uint32_t n_filters = linear->n_out - o < FILTERS ? linear->n_out - o : FILTERS;
    int32_t sums[FILTERS];
    for (f = 0; f < FILTERS; f++) sums[f] = f < n_filters ? s->bias[o + f] : 0;
    next_part(&r);
    for (i = 0; i < linear->n_in; i += EDGECOMP_LINEAR_RUN) {
      t.n = linear->n_in - i < EDGECOMP_LINEAR_RUN ? linear->n_in - i : EDGECOMP_LINEAR_RUN;
      if (n_filters < FILTERS) memset(w, 0, FILTERS * t.n * sizeof(int16_t));
      (void)decode_run(&r, t.n, n_filters, w);
      add_products(&t, x + i, w, sums);
    }
    for (f = 0; f < n_filters; f++) y[o + f] = finished(s, o + f, sums[f]);
  }
}

/* ---- element by element ----------------------------------------------------------------------------------------- */

void edgecomp_add(const edgecomp_sum *sum, uint32_t n, const int8_t *a, const int8_t *b, int8_t *y) {
  add_codes(sum, n, a, b, y);
}

static int8_t multiplied(const edgecomp_product *p, int32_t a, int32_t b) {
  return rescaled_wide((a - p->a_zero) * (b - p->b_zero), p->mantissa, p->shift, p->zero, p->low, p->high);
}

void edgecomp_mul(const edgecomp_product *product, uint32_t n, const int8_t *a, const int8_t *b, int8_t *y) {
  uint32_t i;
  for (i = 0; i < n; i++) y[i] = multiplied(product, a[i], b[i]);
}

void edgecomp_mul_channels(const edgecomp_product *product, uint32_t n_pixels, uint32_t n_channels, const int8_t *a,
                           const int8_t *b, int8_t *y) {
  uint32_t i, k;
  for (i = 0; i < n_pixels; i++)
    for (k = 0; k < n_channels; k++) *y++ = multiplied(product, *a++, b[k]);
}

void edgecomp_clip(uint32_t n, int8_t low, int8_t high, const int8_t *x, int8_t *y) {
  uint32_t i;
  for (i = 0; i < n; i++) y[i] = clamped(x[i], low, high);
}

void edgecomp_lookup(uint32_t n, const int8_t *table, const int8_t *x, int8_t *y) {
  uint32_t i;
  for (i = 0; i < n; i++) y[i] = table[x[i] + 128];
}

/* ---- pools ------------------------------------------------------------------------------------------------------ */

void edgecomp_max_pool(const edgecomp_window *v, const int8_t *x, int8_t *y) {
  uint32_t oy, ox, i, j, c, rows[2], cols[2];
  for (oy = 0; oy < v->out_height; oy++) {
    int32_t top = (int32_t)(oy * v->stride_height) - v->pad_top;
    inside(top, v->in_height, v->kernel_height, v->dilation_height, &rows[0], &rows[1]);
    for (ox = 0; ox < v->out_width; ox++, y += v->in_channels) {
      int32_t left = (int32_t)(ox * v->stride_width) - v->pad_left;
      inside(left, v->in_width, v->kernel_width, v->dilation_width, &cols[0], &cols[1]);
      memset(y, -128, v->in_channels);
      for (i = rows[0]; i < rows[1]; i++) {
        for (j = cols[0]; j < cols[1]; j++) {
          uint32_t row = (uint32_t)(top + (int32_t)(i * v->dilation_height));
          uint32_t column = (uint32_t)(left + (int32_t)(j * v->dilation_width));
          const int8_t *a = x + (row * v->in_width + column) * v->in_channels;
          for (c = 0; c < v->in_channels; c++)
            if (a[c] > y[c]) y[c] = a[c];
        }
      }
    }
  }
}

/* Divide and round half to even. */
static int32_t mean_of(int32_t total, int32_t count) {
  int32_t below = total / count, rest = total % count;
  if (rest < 0) {
    rest += count;
    below--;
  }
  return below + (2 * rest + (below & 1) > count ? 1 : 0);
}

void edgecomp_avg_pool(const edgecomp_window *v, uint8_t whole, int8_t zero, const int8_t *x, int8_t *y) {
  uint32_t oy, ox, i, j, c, rows[2], cols[2];
  for (oy = 0; oy < v->out_height; oy++) {
    int32_t top = (int32_t)(oy * v->stride_height) - v->pad_top;
    inside(top, v->in_height, v->kernel_height, 1u, &rows[0], &rows[1]);
    for (ox = 0; ox < v->out_width; ox++) {
      int32_t left = (int32_t)(ox * v->stride_width) - v->pad_left;
      int32_t count;
      const int8_t *a;
      inside(left, v->in_width, v->kernel_width, 1u, &cols[0], &cols[1]);
      count = whole ? (int32_t)v->kernel_height * v->kernel_width
                    : (int32_t)((rows[1] - rows[0]) * (cols[1] - cols[0]));
      a = x + ((uint32_t)(top + (int32_t)rows[0]) * v->in_width + (uint32_t)(left + (int32_t)cols[0])) * v->in_channels;
      for (c = 0; c < v->in_channels; c++, a++) {
        int32_t total = 0;
        for (i = 0; i < rows[1] - rows[0]; i++)
          for (j = 0; j < cols[1] - cols[0]; j++) total += a[(i * v->in_width + j) * v->in_channels] - zero;
        *y++ = (int8_t)(mean_of(total, count) + zero);
      }
    }
  }
}

void edgecomp_mean(uint32_t n_pixels, uint32_t n_channels, int8_t in_zero, int32_t mantissa, uint8_t shift,
                   int8_t out_zero, const int8_t *x, int8_t *y) {
  uint32_t c, i;
  for (c = 0; c < n_channels; c++) {
    int32_t total = 0;
    for (i = 0; i < n_pixels; i++) total += x[i * n_channels + c];
    y[c] = rescaled_wide(total - (int32_t)n_pixels * in_zero, mantissa, shift, out_zero, -128, 127);
  }
}

/* ---- borders ---------------------------------------------------------------------------------------------------- */

int8_t edgecomp_code(float real, float scale, int32_t zero) {
  float steps = real / scale, rest;
  int32_t below;
  if (!(steps > -512.0f)) return clamped(steps <= -512.0f ? -512 : zero, -128, 127);
  if (steps > 512.0f) return 127;
  below = (int32_t)steps;
  if ((float)below > steps) below--;
  rest = steps - (float)below;
  if (rest > 0.5f || (rest == 0.5f && (below & 1))) below++;
  return clamped(below + zero, -128, 127);
}

/* ---- places ----------------------------------------------------------------------------------------------------- */

void edgecomp_copy(uint32_t n, uint32_t run, const int8_t *x, uint32_t from_step, int8_t *y, uint32_t to_step) {
  for (; n; n--, x += from_step, y += to_step) memcpy(y, x, run);
}

void edgecomp_gather(uint32_t n_pixels, uint32_t n_channels, uint32_t n_indices, const uint16_t *indices,
                     const int8_t *x, int8_t *y) {
  uint32_t k;
  for (; n_pixels; n_pixels--, x += n_channels)
    for (k = 0; k < n_indices; k++) *y++ = x[indices[k]];
}

void edgecomp_transpose(uint32_t n_rows, uint32_t n_columns, const int8_t *x, int8_t *y) {
  uint32_t i, j;
  for (j = 0; j < n_columns; j++)
    for (i = 0; i < n_rows; i++) *y++ = x[i * n_columns + j];
}
