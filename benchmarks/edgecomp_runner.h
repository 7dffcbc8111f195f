/* The runner in C, for devices without Python: what its three sources share.
 *
 * It gathers and judges nothing: samples, memory and the texts that the system keeps about itself go to standard output
 * as JSON, and edgecomp on another machine makes a report of them (benchmarks/gathered.py). Numbers and names that both
 * sides must agree on are in edgecomp_shared.h, which benchmarks/native_runner.py writes from the Python modules. */
#ifndef EDGECOMP_RUNNER_H
#define EDGECOMP_RUNNER_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

/* Exit codes, as those of the command line: how it was called or a file; the device. */
enum { WRONG_USE = 2, WRONG_DEVICE = 6 };

/* Say on one line what is wrong, where standard error was when the program began, and end. */
void fail(int code, const char *format, ...) __attribute__((noreturn, format(printf, 2, 3)));

/* Memory, or the end. */
void *allocate(size_t bytes);
void *resize(void *memory, size_t bytes);
char *joined(const char *a, const char *b, const char *c);

/* Write n bytes as a JSON string: each byte is the character of its number, so that any bytes make legal JSON. */
void put_text(FILE *out, const char *bytes, size_t n);

/* Give all of a file, with a zero behind it, or NULL; *n is its length. */
char *read_whole(const char *path, size_t *n);

/* ---- runtimes --------------------------------------------------------------------------------------------------- */

/* What goes into a model or comes out of it, where it lies, and how many bytes it has. */
typedef struct {
  void *data;
  size_t bytes;
} Border;

enum { REAL = 1, SIGNED = 2, UNSIGNED = 3 };

/* A model that is loaded. Its one input and its outputs stay in the same places. */
typedef struct Model Model;

typedef struct {
  const char *name;            /* in reports */
  const char *extension;       /* of its files */
  const char *library;         /* how its file's name begins; what follows is its version */
  const unsigned char *tiny;   /* the smallest model, y = Relu(x), which makes it set itself up */
  size_t tiny_bytes;
  void (*start)(void *library, const char *place);
  const char *(*version)(void); /* NULL where it does not say */
  Model *(*load)(const char *path, int n_threads, const char *profile);
  void (*infer)(Model *model);
  /* Bring the input there, or the outputs here; infer needs neither. */
  void (*set)(Model *model, const void *bytes);
  Border (*output)(Model *model, size_t i);
  void (*describe)(const Model *model, FILE *out); /* as JSON: how it runs this model */
  char *(*profiled)(Model *model, size_t *n);      /* what the profiler wrote, or NULL */
  void (*release)(Model *model);
} Runtime;

struct Model {
  const Runtime *runtime;
  const char *file;
  void *own[4]; /* of the runtime */
  void **inputs, **outputs;
  size_t n_outputs, input_bytes;
  int input_kind, n_threads, all_delegated;
};

extern const Runtime runtimes[];
extern const size_t n_runtimes;

/* ---- a session over SSH ------------------------------------------------------------------------------------------ */

/* Take orders on standard input until it ends or they do; then remove the folder with all that lies in it. */
int session(const char *self, const char *folder);

#endif
