/* What runs before main() on a Cortex-M4: vectors, memory, floating point. */
#include <stdint.h>

extern uint32_t stack_top, data_load, data_begin, data_end, bss_begin, bss_end;

int main(void);
void reset(void);
void halt(void);

typedef void (*handler)(void);

/* The sixteen entries of the architecture; no interrupt of the board is used. */
__attribute__((section(".vectors"), used)) static const struct {
  uint32_t *stack;
  handler handlers[15];
} vectors = {&stack_top, {reset, halt, halt, halt, halt, halt, 0, 0, 0, 0, halt, halt, 0, halt, halt}};

/* Where everything ends, faults included. A debugger finds it by its name, as run.py does. */
__attribute__((noinline)) void halt(void) {
  for (;;) __asm volatile("");
}

void reset(void) {
  volatile uint32_t *const cpacr = (volatile uint32_t *)0xE000ED88u;
  const uint32_t *from = &data_load;
  uint32_t *to;
  *cpacr |= 0xFu << 20;
  __asm volatile("dsb\n isb" ::: "memory");
  /* volatile: no call of a memcpy that is not there yet. */
  for (to = &data_begin; to < &data_end; to++) *(volatile uint32_t *)to = *from++;
  for (to = &bss_begin; to < &bss_end; to++) *(volatile uint32_t *)to = 0;
  main();
  halt();
}
