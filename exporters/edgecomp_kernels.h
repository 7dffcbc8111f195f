/* Kernels for networks that edgecomp writes in C: int8 activations, weights packed in 1-8 bits. C99, C++11.
 *
 * Images are H x W x C, a byte a code. The caller gives all memory; nothing is allocated, and no state is kept, so
 * networks may run in several threads, each with an arena of its own. Every result is that of edgecomp's integer
 * reference, to the last bit. Chosen by the compiler's flags: with the DSP extension of Armv7E-M and Armv8-M
 * (__ARM_FEATURE_DSP, __ARM_FEATURE_SIMD32), and optimized, two products an instruction, else portable C.
 */
#ifndef EDGECOMP_KERNELS_H_
#define EDGECOMP_KERNELS_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* How codes are stored: a stream of fields, the lowest bits first, that starts on a byte for every four filters. */
enum edgecomp_form {
  EDGECOMP_DENSE,  /* a code of `bits` bits in two's complement */
  EDGECOMP_TABLE,  /* a place of `bits` bits in `levels` */
  EDGECOMP_SPARSE, /* a bit: is there a code? then the code, as in DENSE */
  EDGECOMP_SPARSE_TABLE /* a bit: is there a code? then its place, as in TABLE */
};

/* The weights of a layer: filters by fours, and of them the taps in the order in which the kernels read them. Of every
 * four taps of a run come 0 and 2 of each filter, then 1 and 3 of each; then the rest of the run, each tap of all filters
 * in turn. A run is a kernel's row, or its pixel if it is dilated in width or there are groups; where pixels are no fours of
 * codes, and neither is so, it is all of the kernel. */
typedef struct {
  const uint8_t *stream;
  const int8_t *levels;
  uint8_t form;
  uint8_t bits;
} edgecomp_weights;

/* What becomes of the sum of a filter: clamp((sum + bias) * mantissa / 2^shift + zero), rounded half up. The bias holds
 * the input's zero point times the filter's sum of weights. */
typedef struct {
  const int32_t *bias;
  const int32_t *mantissa;
  const uint8_t *shift;
  uint8_t wide; /* a shift is not within 33-54: 64-bit arithmetic */
  int8_t zero;
  int8_t low;
  int8_t high;
} edgecomp_scaling;

/* A sum: clamp(((a - a_zero) * a_factor + (b - b_zero) * b_factor) / 2^shift + zero), rounded half up. */
typedef struct {
  int32_t a_factor;
  int32_t b_factor;
  uint8_t shift;
  int8_t a_zero;
  int8_t b_zero;
  int8_t zero;
  int8_t low;
  int8_t high;
} edgecomp_sum;

typedef struct {
  uint16_t in_height, in_width, in_channels;
  uint16_t out_height, out_width, out_channels;
  uint16_t kernel_height, kernel_width;
  uint16_t stride_height, stride_width;
  uint16_t pad_top, pad_left;
  uint16_t dilation_height, dilation_width;
} edgecomp_window;

typedef struct {
  edgecomp_window window;
  edgecomp_weights weights;
  edgecomp_scaling scaling;
  const edgecomp_sum *sum; /* what is added to the result, or none */
  uint16_t groups;
  int8_t in_zero;
  uint8_t lift; /* sums are multiplied by 2^lift, as biases and shifts are already: so that shifts are not too small */
} edgecomp_conv;

typedef struct {
  edgecomp_weights weights;
  edgecomp_scaling scaling;
  uint32_t n_in;
  uint16_t n_out;
} edgecomp_linear;

/* A product: clamp((a - a_zero) * (b - b_zero) * mantissa / 2^shift + zero), rounded half up. */
typedef struct {
  int32_t mantissa;
  uint8_t shift;
  int8_t a_zero;
  int8_t b_zero;
  int8_t zero;
  int8_t low;
  int8_t high;
} edgecomp_product;

/* So many taps of a linear layer are decoded at a time. */
#define EDGECOMP_LINEAR_RUN 128u
/* What becomes of the sums of four filters takes so many bytes where they are computed on patches. */
#define EDGECOMP_FOUR_BYTES 64u

/* Convolution, dense or in groups. y may be the memory of `residual`, which has the shape of y, where a sum is fused.
 * scratch, on a multiple of 4: at least 8 bytes a tap of a filter (kernel height x width x channels of a group), then,
 * where windows reach out of the image, 16 bytes a tap of the kernel and of its width. Where pixels are no fours of codes
 * (one group, not dilated in width): 7 bytes a tap of a filter, rounded up to fours, then, once or for every four of
 * filters, 8 a tap and EDGECOMP_FOUR_BYTES. Other such layers are computed in that way, faster, where that and 6 bytes a tap
 * are there for six fours, or, where a window is a pixel, for all. */
void edgecomp_conv2d(const edgecomp_conv *conv, const int8_t *x, const int8_t *residual, int8_t *y, void *scratch,
                     uint32_t scratch_bytes);
/* One filter a channel; weights: every tap of four channels, then of the next four. scratch: 8 bytes a tap of the kernel,
 * then 4 a pixel of the rows that a window reaches over, rounded up to fours of pixels; the more rows the better. */
void edgecomp_depthwise(const edgecomp_conv *conv, const int8_t *x, int8_t *y, void *scratch, uint32_t scratch_bytes);
/* scratch: 8 bytes a tap, of at most EDGECOMP_LINEAR_RUN. */
void edgecomp_fully_connected(const edgecomp_linear *linear, const int8_t *x, int8_t *y, void *scratch);

/* y may be a or b. */
void edgecomp_add(const edgecomp_sum *sum, uint32_t n, const int8_t *a, const int8_t *b, int8_t *y);
void edgecomp_mul(const edgecomp_product *product, uint32_t n, const int8_t *a, const int8_t *b, int8_t *y);
/* b holds one code a channel. y may be a. */
void edgecomp_mul_channels(const edgecomp_product *product, uint32_t n_pixels, uint32_t n_channels, const int8_t *a,
                           const int8_t *b, int8_t *y);
/* y may be x. */
void edgecomp_clip(uint32_t n, int8_t low, int8_t high, const int8_t *x, int8_t *y);
void edgecomp_lookup(uint32_t n, const int8_t *table, const int8_t *x, int8_t *y);

void edgecomp_max_pool(const edgecomp_window *window, const int8_t *x, int8_t *y);
/* whole: padding counts in the mean. */
void edgecomp_avg_pool(const edgecomp_window *window, uint8_t whole, int8_t zero, const int8_t *x, int8_t *y);
void edgecomp_mean(uint32_t n_pixels, uint32_t n_channels, int8_t in_zero, int32_t mantissa, uint8_t shift,
                   int8_t out_zero, const int8_t *x, int8_t *y);

/* The code of a real number: divided by the scale, rounded half to even, plus the zero point. NaN gives the zero point. */
int8_t edgecomp_code(float real, float scale, int32_t zero);

/* Copy n runs of `run` bytes; the starts of two runs lie from_step and to_step bytes apart. */
void edgecomp_copy(uint32_t n, uint32_t run, const int8_t *x, uint32_t from_step, int8_t *y, uint32_t to_step);
/* y[p, k] = x[p, indices[k]] */
void edgecomp_gather(uint32_t n_pixels, uint32_t n_channels, uint32_t n_indices, const uint16_t *indices,
                     const int8_t *x, int8_t *y);
/* rows x columns -> columns x rows */
void edgecomp_transpose(uint32_t n_rows, uint32_t n_columns, const int8_t *x, int8_t *y);

#ifdef __cplusplus
}
#endif

#endif
