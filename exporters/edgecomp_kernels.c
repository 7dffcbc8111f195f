#include "edgecomp_kernels.h"

#include <string.h>

#if defined(__ARM_FEATURE_DSP) && __ARM_FEATURE_DSP && defined(__ARM_FEATURE_SIMD32) && __ARM_FEATURE_SIMD32
#include <arm_acle.h>
#define DSP 1
#else
#define DSP 0
#endif

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
static int32_t rescaled(int32_t sum, int32_t mantissa, uint32_t shift) {
  return shifted((int32_t)(((int64_t)sum * mantissa) >> 32), shift - 32u);
}

static int32_t added(const edgecomp_sum *sum, int32_t a, int32_t b) {
  int32_t total = (a - sum->a_zero) * sum->a_factor + (b - sum->b_zero) * sum->b_factor;
  return clamped(shifted(total, sum->shift) + sum->zero, sum->low, sum->high);
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
static void next_pair(reader *r) {
  r->held = 0;
  r->n_held = 0;
}

static uint32_t field(reader *r, uint32_t bits) {
  uint32_t value;
  if (r->n_held < bits) {
    r->held |= (uint32_t)*r->next++ << r->n_held;
    r->n_held += 8u;
  }
  value = r->held & ((1u << bits) - 1u);
  r->held >>= bits;
  r->n_held -= bits;
  return value;
}

static int32_t code(reader *r) {
  const edgecomp_weights *w = r->weights;
  uint32_t value;
  if (w->form >= EDGECOMP_SPARSE && !field(r, 1u)) return 0;
  value = field(r, w->bits);
  if (w->form & 1u) return w->levels[value];
  return (int32_t)(value << (32u - w->bits)) >> (32u - w->bits);
}

/* Decode a run of n taps for one filter or two: fours of taps of the one, then of the other, and so on. */
static int16_t *decode_run(reader *r, uint32_t n, uint32_t n_filters, int16_t *out) {
  uint32_t i, f, k;
  if (r->weights->form == EDGECOMP_DENSE && r->weights->bits == 4u && n_filters == 2u && (n & 3u) == 0u) {
    const uint8_t *p = r->next;
    int16_t *end = out + 2u * n;
    while (out != end) {
      uint32_t low = p[0], high = p[1];
      out[0] = (int16_t)((int32_t)(low << 28) >> 28);
      out[1] = (int16_t)((int32_t)(low << 24) >> 28);
      out[2] = (int16_t)((int32_t)(high << 28) >> 28);
      out[3] = (int16_t)((int32_t)(high << 24) >> 28);
      p += 2;
      out += 4;
    }
    r->next = p;
    return out;
  }
  for (i = 0; i + 4u <= n; i += 4u, out += 8)
    for (f = 0; f < n_filters; f++)
      for (k = 0; k < 4u; k++) out[4u * f + k] = (int16_t)code(r);
  for (; i < n; i++, out += 2)
    for (f = 0; f < n_filters; f++) out[f] = (int16_t)code(r);
  return out;
}

/* ---- sums of products ------------------------------------------------------------------------------------------- */

/* Where the taps of a position lie: `height` x `width` runs of `n` codes in the image, and in the weights. Steps are in
 * elements. */
typedef struct {
  uint32_t height, width, n;
  uint32_t x_row, x_run;
  uint32_t w_row, w_run;
} taps;

#if DSP
static int8x4_t word(const int8_t *x) {
  int8x4_t value;
  memcpy(&value, x, 4);
  return value;
}

/* Bytes 1 and 3 of a word, extended; the intrinsics have no form that turns the word in the same instruction. */
static int16x2_t upper(int8x4_t value) {
  int16x2_t found;
  __asm__("sxtb16 %0, %1, ror #8" : "=r"(found) : "r"(value));
  return found;
}

/* Two codes of the scratch memory, which are int16_t when they are written. */
typedef int16x2_t __attribute__((may_alias)) two_codes;
#define PAIRS(w, i) (((const two_codes *)(const void *)(w))[i])
#endif

/* Two filters at two positions: sums[2 * position + filter]. */
static void sums_2x2(const taps *t, const int8_t *x0, const int8_t *x1, const int16_t *w, int32_t sums[4]) {
  int32_t s0 = sums[0], s1 = sums[1], s2 = sums[2], s3 = sums[3];
  uint32_t row, run;
  for (row = 0; row < t->height; row++) {
    for (run = 0; run < t->width; run++) {
      const int8_t *a = x0 + row * t->x_row + run * t->x_run;
      const int8_t *b = x1 + row * t->x_row + run * t->x_run;
      const int16_t *v = w + row * t->w_row + run * t->w_run;
      const int8_t *end = a + (t->n & ~3u);
#if DSP
#define STEP                                                        \
  do {                                                              \
    int8x4_t aw = word(a), bw = word(b);                            \
    int16x2_t a02 = __sxtb16(aw), b02 = __sxtb16(bw);               \
    int16x2_t a13 = upper(aw), b13 = upper(bw);                     \
    s0 = __smlad(a02, PAIRS(v, 0), s0);                             \
    s2 = __smlad(b02, PAIRS(v, 0), s2);                             \
    s0 = __smlad(a13, PAIRS(v, 1), s0);                             \
    s2 = __smlad(b13, PAIRS(v, 1), s2);                             \
    s1 = __smlad(a02, PAIRS(v, 2), s1);                             \
    s3 = __smlad(b02, PAIRS(v, 2), s3);                             \
    s1 = __smlad(a13, PAIRS(v, 3), s1);                             \
    s3 = __smlad(b13, PAIRS(v, 3), s3);                             \
    a += 4;                                                         \
    b += 4;                                                         \
    v += 8;                                                         \
  } while (0)
      const int8_t *most = a + (t->n & ~15u);
      while (a != most) {
        STEP;
        STEP;
        STEP;
        STEP;
      }
      while (a != end) STEP;
#undef STEP
#else
      for (; a != end; a += 4, b += 4, v += 8) {
        s0 += a[0] * v[0] + a[2] * v[1] + a[1] * v[2] + a[3] * v[3];
        s1 += a[0] * v[4] + a[2] * v[5] + a[1] * v[6] + a[3] * v[7];
        s2 += b[0] * v[0] + b[2] * v[1] + b[1] * v[2] + b[3] * v[3];
        s3 += b[0] * v[4] + b[2] * v[5] + b[1] * v[6] + b[3] * v[7];
      }
#endif
      for (end = a + (t->n & 3u); a != end; a++, b++, v += 2) {
        s0 += *a * v[0];
        s1 += *a * v[1];
        s2 += *b * v[0];
        s3 += *b * v[1];
      }
    }
  }
  sums[0] = s0;
  sums[1] = s1;
  sums[2] = s2;
  sums[3] = s3;
}

/* Two filters at one position. */
static void sums_2x1(const taps *t, const int8_t *x, const int16_t *w, int32_t sums[2]) {
  int32_t s0 = sums[0], s1 = sums[1];
  uint32_t row, run;
  for (row = 0; row < t->height; row++) {
    for (run = 0; run < t->width; run++) {
      const int8_t *a = x + row * t->x_row + run * t->x_run;
      const int16_t *v = w + row * t->w_row + run * t->w_run;
      const int8_t *end = a + (t->n & ~3u);
      for (; a != end; a += 4, v += 8) {
#if DSP
        int8x4_t aw = word(a);
        int16x2_t a02 = __sxtb16(aw), a13 = upper(aw);
        s0 = __smlad(a02, PAIRS(v, 0), s0);
        s0 = __smlad(a13, PAIRS(v, 1), s0);
        s1 = __smlad(a02, PAIRS(v, 2), s1);
        s1 = __smlad(a13, PAIRS(v, 3), s1);
#else
        s0 += a[0] * v[0] + a[2] * v[1] + a[1] * v[2] + a[3] * v[3];
        s1 += a[0] * v[4] + a[2] * v[5] + a[1] * v[6] + a[3] * v[7];
#endif
      }
      for (end = a + (t->n & 3u); a != end; a++, v += 2) {
        s0 += *a * v[0];
        s1 += *a * v[1];
      }
    }
  }
  sums[0] = s0;
  sums[1] = s1;
}

/* ---- convolution ------------------------------------------------------------------------------------------------ */

/* A pair of filters at work. */
typedef struct {
  const edgecomp_conv *conv;
  const int8_t *residual;
  int8_t *y;
  uint32_t channel, n_filters;
  int32_t bias[2], mantissa[2];
  uint32_t shift[2];
} pair;

static void store(const pair *p, uint32_t position, const int32_t sums[2]) {
  const edgecomp_scaling *s = &p->conv->scaling;
  uint32_t place = position * p->conv->window.out_channels + p->channel;
  uint32_t f;
  for (f = 0; f < p->n_filters; f++, place++) {
    int32_t value = s->wide ? rescaled_wide(sums[f], p->mantissa[f], p->shift[f], s->zero, s->low, s->high)
                            : clamped(rescaled(sums[f], p->mantissa[f], p->shift[f]) + s->zero, s->low, s->high);
    if (p->residual) value = added(p->conv->sum, value, p->residual[place]);
    p->y[place] = (int8_t)value;
  }
}

/* The taps of a window that lie inside, along one axis: [first, last). */
static void inside(int32_t start, uint32_t extent, uint32_t n_taps, uint32_t dilation, uint32_t *first, uint32_t *last) {
  uint32_t k = 0;
  while (k < n_taps && start + (int32_t)(k * dilation) < 0) k++;
  *first = k;
  while (k < n_taps && start + (int32_t)(k * dilation) < (int32_t)extent) k++;
  *last = k;
}

/* Sums of the weights of each tap of the kernel, for both filters: what it gives outside the image, but for the zero
 * point. Not for parts of fours: see `patched`. */
static void sum_taps(const edgecomp_conv *conv, const int16_t *w, int32_t *tap_sums) {
  const edgecomp_window *v = &conv->window;
  uint32_t n = (uint32_t)v->in_channels / conv->groups, n_taps = (uint32_t)v->kernel_height * v->kernel_width, k;
  for (; n_taps; n_taps--, tap_sums += 2) {
    int32_t s0 = 0, s1 = 0;
    for (k = 0; k + 4u <= n; k += 4u, w += 8) {
      s0 += w[0] + w[1] + w[2] + w[3];
      s1 += w[4] + w[5] + w[6] + w[7];
    }
    for (; k < n; k++, w += 2) {
      s0 += w[0];
      s1 += w[1];
    }
    tap_sums[0] = s0;
    tap_sums[1] = s1;
  }
}

static void outside(const edgecomp_conv *conv, const int32_t *tap_sums, const uint32_t rows[2], const uint32_t cols[2],
                    const int32_t bias[2], int32_t sums[2]) {
  uint32_t i, k;
  int32_t s0 = 0, s1 = 0;
  for (i = 0; i < conv->window.kernel_height; i++)
    for (k = 0; k < conv->window.kernel_width; k++, tap_sums += 2)
      if (i < rows[0] || i >= rows[1] || k < cols[0] || k >= cols[1]) {
        s0 += tap_sums[0];
        s1 += tap_sums[1];
      }
  sums[0] = bias[0] + conv->in_zero * s0;
  sums[1] = bias[1] + conv->in_zero * s1;
}

/* Copy a window of the image, with the zero point where it reaches outside. */
static void copy_patch(const edgecomp_conv *conv, const int8_t *x, int32_t top, int32_t left, const uint32_t rows[2],
                       const uint32_t cols[2], int8_t *patch) {
  const edgecomp_window *v = &conv->window;
  uint32_t run = (uint32_t)v->kernel_width * v->in_channels;
  uint32_t k;
  memset(patch, conv->in_zero, (size_t)v->kernel_height * run);
  for (k = rows[0]; k < rows[1]; k++) {
    uint32_t row = (uint32_t)(top + (int32_t)(k * v->dilation_height));
    uint32_t column = (uint32_t)(left + (int32_t)cols[0]);
    memcpy(patch + k * run + cols[0] * v->in_channels, x + (row * v->in_width + column) * v->in_channels,
           (size_t)(cols[1] - cols[0]) * v->in_channels);
  }
}

/* Columns of the result whose windows lie inside the image: [first, last). */
static void whole_columns(const edgecomp_window *v, uint32_t *first, uint32_t *last) {
  int32_t reach = (int32_t)(v->kernel_width - 1) * v->dilation_width;
  int32_t room = (int32_t)v->in_width + v->pad_left - 1 - reach;
  uint32_t lo = ((uint32_t)v->pad_left + v->stride_width - 1u) / v->stride_width;
  uint32_t hi = room < 0 ? 0u : (uint32_t)room / v->stride_width + 1u;
  if (hi > v->out_width) hi = v->out_width;
  if (lo >= hi) lo = hi = 0u;
  *first = lo;
  *last = hi;
}

static void convolve_pair(const pair *p, const int8_t *x, const int16_t *w, int32_t *tap_sums, int8_t *patch) {
  const edgecomp_conv *conv = p->conv;
  const edgecomp_window *v = &conv->window;
  uint32_t n = (uint32_t)v->in_channels / conv->groups;
  int rows_run = conv->groups == 1u && v->dilation_width == 1u;
  uint32_t run = rows_run ? n * v->kernel_width : n;
  uint32_t step = (uint32_t)v->stride_width * v->in_channels;
  uint32_t all[2], lo, hi, oy, ox;
  taps t;
  all[0] = 0u;
  all[1] = v->kernel_width;
  t.x_row = (uint32_t)v->dilation_height * v->in_width * v->in_channels;
  t.x_run = rows_run ? 0u : (uint32_t)v->dilation_width * v->in_channels;
  t.w_run = rows_run ? 0u : 2u * n;
  t.w_row = 2u * n * v->kernel_width;
  whole_columns(v, &lo, &hi);
  if (tap_sums) sum_taps(conv, w, tap_sums);
  for (oy = 0; oy < v->out_height; oy++) {
    int32_t top = (int32_t)(oy * v->stride_height) - v->pad_top;
    uint32_t position = oy * v->out_width;
    uint32_t rows[2];
    int32_t start[2];
    inside(top, v->in_height, v->kernel_height, v->dilation_height, &rows[0], &rows[1]);
    if (rows[1] - rows[0] == v->kernel_height || !tap_sums) {
      start[0] = p->bias[0];
      start[1] = p->bias[1];
    } else {
      outside(conv, tap_sums, rows, all, p->bias, start);
    }
    for (ox = 0; ox < v->out_width;) {
      int32_t left = (int32_t)(ox * v->stride_width) - v->pad_left;
      int32_t sums[4];
      t.height = rows[1] - rows[0];
      t.width = rows_run ? 1u : v->kernel_width;
      t.n = run;
      if (ox >= lo && ox < hi && (rows[1] - rows[0] == v->kernel_height || !patch)) {
        const int8_t *a = x + ((uint32_t)(top + (int32_t)(rows[0] * v->dilation_height)) * v->in_width + (uint32_t)left) *
                                  v->in_channels;
        const int16_t *u = w + rows[0] * t.w_row;
        sums[0] = sums[2] = start[0];
        sums[1] = sums[3] = start[1];
        if (ox + 1u < hi) {
          sums_2x2(&t, a, a + step, u, sums);
          store(p, position + ox + 1u, sums + 2);
          store(p, position + ox, sums);
          ox += 2u;
        } else {
          sums_2x1(&t, a, u, sums);
          store(p, position + ox, sums);
          ox++;
        }
        continue;
      }
      {
        uint32_t cols[2];
        inside(left, v->in_width, v->kernel_width, v->dilation_width, &cols[0], &cols[1]);
        if (patch) {
          taps whole = t;
          whole.height = v->kernel_height;
          whole.x_row = run;
          copy_patch(conv, x, top, left, rows, cols, patch);
          sums[0] = p->bias[0];
          sums[1] = p->bias[1];
          sums_2x1(&whole, patch, w, sums);
        } else {
          int32_t y0 = top + (int32_t)(rows[0] * v->dilation_height), x0 = left + (int32_t)(cols[0] * v->dilation_width);
          if (tap_sums) {
            outside(conv, tap_sums, rows, cols, p->bias, sums);
          } else {
            sums[0] = p->bias[0];
            sums[1] = p->bias[1];
          }
          if (rows_run)
            t.n = (cols[1] - cols[0]) * n;
          else
            t.width = cols[1] - cols[0];
          if (t.height && cols[0] != cols[1])
            sums_2x1(&t, x + ((uint32_t)y0 * v->in_width + (uint32_t)x0) * v->in_channels,
                     w + rows[0] * t.w_row + 2u * n * cols[0], sums);
        }
        store(p, position + ox, sums);
        ox++;
      }
    }
  }
}

static void load_filter(pair *p, uint32_t f, uint32_t channel) {
  const edgecomp_scaling *s = &p->conv->scaling;
  p->bias[f] = s->bias[channel];
  p->mantissa[f] = s->mantissa[channel];
  p->shift[f] = s->shift[channel];
}

void edgecomp_conv2d(const edgecomp_conv *conv, const int8_t *x, const int8_t *residual, int8_t *y, void *scratch) {
  const edgecomp_window *v = &conv->window;
  uint32_t n = (uint32_t)v->in_channels / conv->groups, per_group = (uint32_t)v->out_channels / conv->groups;
  uint32_t n_taps = (uint32_t)v->kernel_height * v->kernel_width;
  int rows_run = conv->groups == 1u && v->dilation_width == 1u;
  uint32_t run = rows_run ? n * v->kernel_width : n;
  int reaches_out = v->pad_top || v->pad_left ||
                    (v->out_height - 1u) * v->stride_height + (v->kernel_height - 1u) * v->dilation_height >= v->in_height ||
                    (v->out_width - 1u) * v->stride_width + (v->kernel_width - 1u) * v->dilation_width >= v->in_width;
  /* Parts of a run can be read only from a four on. */
  int patched = reaches_out && rows_run && (n & 3u);
  int16_t *w = (int16_t *)scratch;
  int32_t *tap_sums = (int32_t *)scratch + n_taps * n;
  int8_t *patch = (int8_t *)scratch + 4u * n_taps * n;
  reader r = open_stream(&conv->weights);
  uint32_t g, o;
  pair p;
  p.conv = conv;
  p.residual = residual;
  p.y = y;
  for (g = 0; g < conv->groups; g++) {
    for (o = 0; o < per_group; o += 2u) {
      int16_t *out = w;
      uint32_t i;
      p.channel = g * per_group + o;
      p.n_filters = per_group - o < 2u ? 1u : 2u;
      load_filter(&p, 0, p.channel);
      load_filter(&p, 1, p.channel + p.n_filters - 1u);
      if (p.n_filters == 1u) memset(w, 0, (size_t)4 * n_taps * n);
      next_pair(&r);
      for (i = 0; i < n_taps * n; i += run) out = decode_run(&r, run, p.n_filters, out);
      convolve_pair(&p, x + g * n, w, reaches_out && !patched && conv->in_zero ? tap_sums : 0, patched ? patch : 0);
    }
  }
}

/* ---- depthwise convolution -------------------------------------------------------------------------------------- */

static void store_channels(const edgecomp_conv *conv, uint32_t position, uint32_t channel, uint32_t n,
                           const int32_t *sums, int8_t *y) {
  const edgecomp_scaling *s = &conv->scaling;
  int8_t *place = y + position * conv->window.out_channels + channel;
  uint32_t k;
  for (k = 0; k < n; k++) {
    uint32_t c = channel + k;
    place[k] = s->wide ? rescaled_wide(sums[k], s->mantissa[c], s->shift[c], s->zero, s->low, s->high)
                       : clamped(rescaled(sums[k], s->mantissa[c], s->shift[c]) + s->zero, s->low, s->high);
  }
}

/* Four channels at a position, w as channels 0, 2, 1, 3 of every tap. */
static void sums_of_four(uint32_t height, uint32_t width, uint32_t x_row, uint32_t x_tap, const int8_t *x,
                         const int16_t *w, int32_t sums[4]) {
  int32_t s0 = sums[0], s1 = sums[1], s2 = sums[2], s3 = sums[3];
  uint32_t row, k;
#if DSP
#define TAP(place)                                        \
  do {                                                    \
    int8x4_t aw = word(place);                            \
    int16x2_t a02 = __sxtb16(aw), a13 = upper(aw);        \
    int16x2_t w02 = PAIRS(w, 0), w13 = PAIRS(w, 1);       \
    s0 = __smlabb(a02, w02, s0);                          \
    s2 = __smlatt(a02, w02, s2);                          \
    s1 = __smlabb(a13, w13, s1);                          \
    s3 = __smlatt(a13, w13, s3);                          \
    w += 4;                                               \
  } while (0)
#else
#define TAP(place)              \
  do {                          \
    const int8_t *a = (place);  \
    s0 += a[0] * w[0];          \
    s2 += a[2] * w[1];          \
    s1 += a[1] * w[2];          \
    s3 += a[3] * w[3];          \
    w += 4;                     \
  } while (0)
#endif
  for (row = 0; row < height; row++, x += x_row) {
    if (width == 3u) {
      TAP(x);
      TAP(x + x_tap);
      TAP(x + 2u * x_tap);
    } else {
      for (k = 0; k < width; k++) TAP(x + k * x_tap);
    }
  }
#undef TAP
  sums[0] = s0;
  sums[1] = s1;
  sums[2] = s2;
  sums[3] = s3;
}

/* n channels, four or one, at a position whose window reaches out of the image. */
static void sums_at_edge(const edgecomp_conv *conv, const int8_t *x, uint32_t n, int32_t top, int32_t left,
                         const int16_t *w, int32_t *sums) {
  static const uint8_t order[4] = {0, 2, 1, 3};
  const edgecomp_window *v = &conv->window;
  uint32_t i, j, k;
  for (i = 0; i < v->kernel_height; i++) {
    int32_t row = top + (int32_t)(i * v->dilation_height);
    for (j = 0; j < v->kernel_width; j++, w += n) {
      int32_t column = left + (int32_t)(j * v->dilation_width);
      int is_inside = row >= 0 && row < (int32_t)v->in_height && column >= 0 && column < (int32_t)v->in_width;
      uint32_t place = is_inside ? ((uint32_t)row * v->in_width + (uint32_t)column) * v->in_channels : 0u;
      for (k = 0; k < n; k++) sums[order[k]] += (is_inside ? x[place + order[k]] : conv->in_zero) * w[k];
    }
  }
}

void edgecomp_depthwise(const edgecomp_conv *conv, const int8_t *x, int8_t *y, void *scratch) {
  const edgecomp_window *v = &conv->window;
  uint32_t n_taps = (uint32_t)v->kernel_height * v->kernel_width;
  uint32_t x_tap = (uint32_t)v->dilation_width * v->in_channels;
  uint32_t x_row = (uint32_t)v->dilation_height * v->in_width * v->in_channels;
  int16_t *w = (int16_t *)scratch;
  reader r = open_stream(&conv->weights);
  uint32_t lo, hi, c, n, k, oy, ox;
  whole_columns(v, &lo, &hi);
  for (c = 0; c < v->in_channels; c += n) {
    n = v->in_channels - c < 4u ? 1u : 4u;
    next_pair(&r);
    for (k = 0; k < n_taps * n; k++) w[k] = (int16_t)code(&r);
    for (oy = 0; oy < v->out_height; oy++) {
      int32_t top = (int32_t)(oy * v->stride_height) - v->pad_top;
      int is_inside = top >= 0 && top + (int32_t)((v->kernel_height - 1u) * v->dilation_height) < (int32_t)v->in_height;
      for (ox = 0; ox < v->out_width; ox++) {
        int32_t left = (int32_t)(ox * v->stride_width) - v->pad_left;
        int32_t sums[4];
        for (k = 0; k < n; k++) sums[k] = conv->scaling.bias[c + k];
        if (n == 4u && is_inside && ox >= lo && ox < hi)
          sums_of_four(v->kernel_height, v->kernel_width, x_row, x_tap,
                       x + ((uint32_t)top * v->in_width + (uint32_t)left) * v->in_channels + c, w, sums);
        else
          sums_at_edge(conv, x + c, n, top, left, w, sums);
        store_channels(conv, oy * v->out_width + ox, c, n, sums, y);
      }
    }
  }
}

/* ---- linear layers ---------------------------------------------------------------------------------------------- */

void edgecomp_fully_connected(const edgecomp_linear *linear, const int8_t *x, int8_t *y, void *scratch) {
  const edgecomp_scaling *s = &linear->scaling;
  reader r = open_stream(&linear->weights);
  int16_t *w = (int16_t *)scratch;
  uint32_t o, i, f;
  for (o = 0; o < linear->n_out; o += 2u) {
    uint32_t n_filters = linear->n_out - o < 2u ? 1u : 2u;
    int32_t sums[2];
    for (f = 0; f < 2u; f++) sums[f] = f < n_filters ? s->bias[o + f] : 0;
    next_pair(&r);
    for (i = 0; i < linear->n_in; i += EDGECOMP_LINEAR_RUN) {
      taps t;
      memset(&t, 0, sizeof t);
      t.height = t.width = 1u;
      t.n = linear->n_in - i < EDGECOMP_LINEAR_RUN ? linear->n_in - i : EDGECOMP_LINEAR_RUN;
      if (n_filters == 1u) memset(w, 0, (size_t)4 * t.n);
      (void)decode_run(&r, t.n, n_filters, w);
      sums_2x1(&t, x + i, w, sums);
    }
    for (f = 0; f < n_filters; f++)
      y[o + f] = s->wide ? rescaled_wide(sums[f], s->mantissa[o + f], s->shift[o + f], s->zero, s->low, s->high)
                         : clamped(rescaled(sums[f], s->mantissa[o + f], s->shift[o + f]) + s->zero, s->low, s->high);
  }
}

/* ---- element by element ----------------------------------------------------------------------------------------- */

void edgecomp_add(const edgecomp_sum *sum, uint32_t n, const int8_t *a, const int8_t *b, int8_t *y) {
  uint32_t i;
  for (i = 0; i < n; i++) y[i] = (int8_t)added(sum, a[i], b[i]);
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
