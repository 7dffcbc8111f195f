/* One picture through the network; what comes out goes to the serial port. */
#include <stdint.h>

#include "network.h"
#include "picture.h"

/* As model/plan.json says under "preprocessing": (pixel / 255 - mean) / std, two pixels of black on each side. */
#define MEAN 0.286f
#define STD 0.353f
#define PAD 2
#define SIDE (PICTURE_SIDE + 2 * PAD)

static const char *const names[RESNET8_OUTPUT_BYTES] = {"T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
                                                        "Sandal",      "Shirt",   "Sneaker",  "Bag",   "Ankle boot"};
static int32_t arena[RESNET8_ARENA_BYTES / 4];
static float real[RESNET8_INPUT_BYTES];
static int8_t out[RESNET8_OUTPUT_BYTES];

/* The board's first serial port (CMSDK UART). */
static volatile uint32_t *const uart = (volatile uint32_t *)0x40004000u; /* data, state, control, -, divider */

static void put(const char *text) {
  for (; *text; text++) {
    while (uart[1] & 1u) {
    }
    uart[0] = (uint8_t)*text;
  }
}

static void put_number(int value) {
  char digits[8], *at = digits + sizeof digits - 1;
  unsigned left = value < 0 ? 0u - (unsigned)value : (unsigned)value;
  *at = 0;
  do {
    *--at = (char)('0' + left % 10u);
    left /= 10u;
  } while (left);
  if (value < 0) *--at = '-';
  put(at);
}

int main(void) {
  int8_t *in = (int8_t *)arena + RESNET8_INPUT_OFFSET;
  int x, y, i, best = 0;
  uart[4] = 16;
  uart[2] = 1;
  for (y = 0; y < SIDE; y++) {
    for (x = 0; x < SIDE; x++) {
      int inside = x >= PAD && x < SIDE - PAD && y >= PAD && y < SIDE - PAD;
      float pixel = inside ? (float)picture[(y - PAD) * PICTURE_SIDE + x - PAD] : 0.0f;
      real[y * SIDE + x] = (pixel / 255.0f - MEAN) / STD;
    }
  }
  resnet8_quantize(real, in);
  if (resnet8_run(in, out, arena)) {
    put("the arena is not on a multiple of 4\n");
    return 1;
  }
  for (i = 1; i < RESNET8_OUTPUT_BYTES; i++) {
    if (out[i] > out[best]) best = i;
  }
  put("codes:");
  for (i = 0; i < RESNET8_OUTPUT_BYTES; i++) {
    put(" ");
    put_number(out[i]);
  }
  put("\nclass: ");
  put(names[best]);
  put("\n");
  return 0;
}
