/* The runner in C: see edgecomp_runner.h. */
#include "edgecomp_runner.h"

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <malloc.h>
#include <math.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "edgecomp_shared.h"

enum { MOST_MODELS = 100, MOST_TEXT = 1 << 16, MOST_THREADS = 1024 };

static FILE *messages; /* where standard error was */
static int native = -1; /* what the runtimes write there, in memory */

/* ---- small things ------------------------------------------------------------------------------------------------ */

/* The last line with ERROR that a runtime wrote: some say there what is wrong, and only there. */
static void put_native_error(void) {
  static char text[MOST_TEXT + 1];
  ssize_t n = native < 0 ? 0 : pread(native, text, MOST_TEXT, 0);
  char *line, *last = NULL, *next;
  text[n < 0 ? 0 : n] = 0;
  for (line = text; line; line = next) {
    next = strchr(line, '\n');
    if (next) *next++ = 0;
    if (strstr(line, "ERROR: ")) last = strstr(line, "ERROR: ") + strlen("ERROR: ");
  }
  if (last) fprintf(messages, ": %.300s", last);
}

void fail(int code, const char *format, ...) {
  char line[1024], *c;
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  for (c = line; *c; c++)
    if ((unsigned char)*c < ' ') *c = ' ';
  fputs(line, messages);
  put_native_error();
  fputc('\n', messages);
  fflush(messages);
  /* Not exit: threads of a runtime may be at work. */
  _exit(code);
}

void *allocate(size_t bytes) { return resize(NULL, bytes); }

void *resize(void *memory, size_t bytes) {
  void *found = realloc(memory, bytes ? bytes : 1);
  if (!found) fail(WRONG_DEVICE, "out of memory: %zu bytes", bytes);
  return found;
}

char *joined(const char *a, const char *b, const char *c) {
  char *text = allocate(strlen(a) + strlen(b) + strlen(c) + 1);
  return strcat(strcat(strcpy(text, a), b), c);
}

void put_text(FILE *out, const char *bytes, size_t n) {
  size_t i;
  fputc('"', out);
  for (i = 0; i < n; i++) {
    unsigned char c = (unsigned char)bytes[i];
    if (c < ' ' || c == '"' || c == '\\' || c > '~') fprintf(out, "\\u%04x", c);
    else fputc(c, out);
  }
  fputc('"', out);
}

char *read_whole(const char *path, size_t *n) {
  size_t room = 4096;
  ssize_t got;
  char *text;
  int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) return NULL;
  text = allocate(room + 1);
  *n = 0;
  while ((got = read(file, text + *n, room - *n)) > 0) {
    *n += (size_t)got;
    if (*n == room) text = resize(text, (room *= 2) + 1);
  }
  close(file);
  if (got < 0) {
    free(text);
    return NULL;
  }
  text[*n] = 0;
  return text;
}

static int64_t now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Marsaglia's xorshift; the state is never 0. */
static uint64_t drawn(uint64_t *state) {
  *state ^= *state << 13;
  *state ^= *state >> 7;
  *state ^= *state << 17;
  return *state;
}

/* Keep from standard error what the runtimes write there. */
static void hold_back(void) {
  int kept = fcntl(2, F_DUPFD_CLOEXEC, 3);
  messages = kept < 0 ? stderr : fdopen(kept, "w");
  if (!messages) messages = stderr;
  native = memfd_create("messages", MFD_CLOEXEC);
  if (kept >= 0 && native >= 0) dup2(native, 2);
}

/* ---- SHA-256: FIPS 180-4 ----------------------------------------------------------------------------------------- */

static uint32_t turned(uint32_t x, int n) { return x >> n | x << (32 - n); }

/* The first 32 bits of the fractional parts of the roots of the first primes. */
static void constants(uint32_t k[64], uint32_t h[8]) {
  int n = 0, candidate = 2;
  for (; n < 64; candidate++) {
    int divisor = 2;
    while (divisor * divisor <= candidate && candidate % divisor) divisor++;
    if (divisor * divisor <= candidate) continue;
    if (n < 8) h[n] = (uint32_t)(int64_t)ldexpl(sqrtl(candidate) - floorl(sqrtl(candidate)), 32);
    k[n++] = (uint32_t)(int64_t)ldexpl(cbrtl(candidate) - floorl(cbrtl(candidate)), 32);
  }
}

static void add_block(uint32_t h[8], const uint32_t k[64], const unsigned char *block) {
  uint32_t w[64], s[8], a, b;
  int i;
  for (i = 0; i < 16; i++)
    w[i] = (uint32_t)block[4 * i] << 24 | (uint32_t)block[4 * i + 1] << 16 | (uint32_t)block[4 * i + 2] << 8 |
           block[4 * i + 3];
  for (; i < 64; i++) {
    a = turned(w[i - 15], 7) ^ turned(w[i - 15], 18) ^ w[i - 15] >> 3;
    b = turned(w[i - 2], 17) ^ turned(w[i - 2], 19) ^ w[i - 2] >> 10;
    w[i] = w[i - 16] + a + w[i - 7] + b;
  }
  memcpy(s, h, sizeof s);
  for (i = 0; i < 64; i++) {
    a = s[7] + (turned(s[4], 6) ^ turned(s[4], 11) ^ turned(s[4], 25)) + ((s[4] & s[5]) ^ (~s[4] & s[6])) + k[i] + w[i];
    b = (turned(s[0], 2) ^ turned(s[0], 13) ^ turned(s[0], 22)) + ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
    memmove(s + 1, s, 7 * sizeof *s);
    s[4] += a;
    s[0] = a + b;
  }
  for (i = 0; i < 8; i++) h[i] += s[i];
}

/* Write the digest of a file as 64 digits. */
static void digest(const char *path, char text[65], long long *n_bytes) {
  unsigned char block[64] = {0};
  uint32_t k[64], h[8];
  FILE *file = fopen(path, "rb");
  size_t n;
  int i;
  if (!file) fail(WRONG_USE, "%s: %s", path, strerror(errno));
  constants(k, h);
  *n_bytes = 0;
  while ((n = fread(block, 1, 64, file)) == 64) {
    add_block(h, k, block);
    *n_bytes += 64;
  }
  if (ferror(file)) fail(WRONG_USE, "%s: %s", path, strerror(errno));
  fclose(file);
  *n_bytes += (long long)n;
  memset(block + n, 0, 64 - n);
  block[n] = 0x80;
  if (n >= 56) {
    add_block(h, k, block);
    memset(block, 0, 64);
  }
  for (i = 0; i < 8; i++) block[63 - i] = (unsigned char)((uint64_t)*n_bytes * 8 >> 8 * i);
  add_block(h, k, block);
  for (i = 0; i < 8; i++) sprintf(text + 8 * i, "%08x", h[i]);
}

/* ---- what is asked for ------------------------------------------------------------------------------------------- */

typedef struct {
  const char *label, *path;
  const Runtime *runtime;
} Entry;

static struct {
  Entry entries[MOST_MODELS];
  size_t n;
  const char *runtime, *result, *inputs, *libraries, *task, *folder, *cores;
  long n_threads, n_runs, warmup_runs, processes, seed;
  double min_s, max_s;
  int profile;
} asked = {.task = "time", .n_threads = 1, .n_runs = 1, .processes = PROCESSES, .min_s = MIN_S, .max_s = MAX_S};

static const char help[] =
    "usage: edgecomp-runner [--graph=[LABEL=]FILE]... [flags] [MODEL [RESULT]]\n"
    "Measure .onnx and .tflite files on this device, in turns; JSON on standard output or in RESULT, which\n"
    "edgecomp bench MODEL --gathered RESULT judges and shows, on any machine.\n"
    "  --graph=[LABEL=]FILE        a model; several take turns\n"
    "  --runtime=R                 onnxruntime, litert\n"
    "  --libraries=DIR             where libonnxruntime.so.* and libLiteRt.so.* lie; beside this program by default\n"
    "  --num_threads=N, -x         default 1\n"
    "  --num_runs=N, -r            samples of each model at least\n"
    "  --warmup_runs=N             at least; it goes on until latency is steady\n"
    "  --min_secs=S, -t            for each model at least\n"
    "  --max_secs=S                for each model, when 5 rounds are done\n"
    "  --enable_op_profiling=true  time each operator, in onnxruntime\n"
    "  --cores=A,B                 run on these cores alone\n"
    "  --processes=N               in which memory and load time are taken\n"
    "  --seed=N                    of the order of turns\n"
    "  -m times|duration           -r or -t alone decides how long it takes\n"
    "  -e cpu, -I                  always so\n";

static long whole(const char *flag, const char *text, long least) {
  char *end;
  long value;
  errno = 0;
  value = strtol(text, &end, 10);
  if (*end || text[0] < '0' || text[0] > '9' || errno || value < least || value > INT32_MAX)
    fail(WRONG_USE, "%s: '%.80s': expected a whole number, %ld or more", flag, text, least);
  return value;
}

static double seconds(const char *flag, const char *text) {
  char *end;
  double value = strtod(text, &end);
  if (end == text || *end || text[0] == ' ' || !(value >= 0 && value < 1e9))
    fail(WRONG_USE, "%s: '%.80s': expected seconds, 0 or more and below 1e9", flag, text);
  return value;
}

static int is_file(const char *path) {
  struct stat status;
  return stat(path, &status) == 0 && S_ISREG(status.st_mode);
}

static void add_model(const char *text) {
  const char *equals = strrchr(text, '='), *slash;
  Entry *entry = &asked.entries[asked.n];
  if (asked.n++ == MOST_MODELS) fail(WRONG_USE, "more than %d models", MOST_MODELS);
  if (equals && !is_file(text)) {
    entry->path = equals + 1;
    entry->label = strndup(text, (size_t)(equals - text));
  } else {
    entry->path = text;
    slash = strrchr(text, '/');
    entry->label = strdup(slash ? slash + 1 : text);
  }
  if (!is_file(entry->path)) fail(WRONG_USE, "%s: no such file; expected an exported model", entry->path);
}

/* Give a flag's value, which stands behind "=" or is the next word. */
static const char *value_of(char **words, int *i, const char *flag) {
  const char *equals = words[*i][1] == '-' ? strchr(words[*i], '=') : NULL;
  if (equals) return equals + 1;
  if (!words[*i + 1]) fail(WRONG_USE, "%s: expected one argument; see -h", flag);
  return words[++*i];
}

static int is_flag(const char *word, const char *flag) {
  size_t n = strlen(flag);
  return strncmp(word, flag, n) == 0 && (word[n] == 0 || (flag[1] == '-' && word[n] == '='));
}

static void read_profiling(const char *word) {
  const char *equals = strchr(word, '='), *value = equals ? equals + 1 : "true";
  if (strcasecmp(value, "true") && strcasecmp(value, "false") && strcmp(value, "1") && strcmp(value, "0"))
    fail(WRONG_USE, "--enable_op_profiling: '%.80s': expected true or false", value);
  asked.profile = !strcasecmp(value, "true") || !strcmp(value, "1");
}

static void read_words(char **words) {
  static const struct {
    const char *flag, **value;
  } texts[] = {{"--runtime", &asked.runtime},     {"--inputs", &asked.inputs}, {"--result", &asked.result},
               {"--libraries", &asked.libraries}, {"--task", &asked.task},     {"--folder", &asked.folder},
               {"--cores", &asked.cores}};
  static const struct {
    const char *flag, *brief;
    long *value, least;
  } counts[] = {{"--num_threads", "-x", &asked.n_threads, 1},
                {"--num_runs", "-r", &asked.n_runs, 1},
                {"--warmup_runs", "", &asked.warmup_runs, 0},
                {"--processes", "", &asked.processes, 1},
                {"--seed", "", &asked.seed, 0}};
  static const struct {
    const char *flag, *brief;
    double *value;
  } times[] = {{"--min_secs", "-t", &asked.min_s}, {"--max_secs", "", &asked.max_s}};
  const char *plain[2] = {NULL, NULL}, *value;
  int i, n_plain = 0;
  for (i = 1; words[i]; i++) {
    const char *word = words[i];
    size_t j;
    int known = 0;
    for (j = 0; !known && j < sizeof texts / sizeof *texts; j++)
      if ((known = is_flag(word, texts[j].flag))) *texts[j].value = value_of(words, &i, texts[j].flag);
    for (j = 0; !known && j < sizeof counts / sizeof *counts; j++)
      if ((known = is_flag(word, counts[j].flag) || !strcmp(word, counts[j].brief)))
        *counts[j].value = whole(counts[j].flag, value_of(words, &i, counts[j].flag), counts[j].least);
    for (j = 0; !known && j < sizeof times / sizeof *times; j++)
      if ((known = is_flag(word, times[j].flag) || !strcmp(word, times[j].brief)))
        *times[j].value = seconds(times[j].flag, value_of(words, &i, times[j].flag));
    if (asked.n_threads > MOST_THREADS)
      fail(WRONG_USE, "--num_threads: '%ld': expected a whole number from 1 to %d", asked.n_threads, MOST_THREADS);
    if (known) continue;
    if (is_flag(word, "--graph")) {
      add_model(value_of(words, &i, "--graph"));
    } else if (is_flag(word, "--enable_op_profiling")) {
      read_profiling(word);
    } else if (!strcmp(word, "-m")) {
      value = value_of(words, &i, "-m");
      if (!strcmp(value, "times")) asked.min_s = 0;
      else if (!strcmp(value, "duration")) asked.n_runs = 1;
      else fail(WRONG_USE, "-m: '%.80s': expected times or duration", value);
    } else if (!strcmp(word, "-e")) {
      if (strcmp(value = value_of(words, &i, "-e"), "cpu")) fail(WRONG_USE, "-e: '%.80s': expected cpu", value);
    } else if (!strcmp(word, "-h") || !strcmp(word, "--help")) {
      fputs(help, stdout);
      exit(0);
    } else if (word[0] == '-' && strcmp(word, "-I")) {
      fail(WRONG_USE, "%.80s: no such flag; see -h", word);
    } else if (word[0] != '-' && n_plain == 2) {
      fail(WRONG_USE, "%.80s: expected one model and one result; see -h", word);
    } else if (word[0] != '-') {
      plain[n_plain++] = word;
    }
  }
  if (plain[0]) add_model(plain[0]);
  if (plain[1]) asked.result = plain[1];
}

static const Runtime *runtime_of(const char *path) {
  const char *dot = strrchr(path, '.');
  size_t i;
  for (i = 0; i < n_runtimes; i++) {
    if (asked.runtime ? !strcmp(asked.runtime, runtimes[i].name) : dot && !strcmp(dot + 1, runtimes[i].extension))
      return &runtimes[i];
  }
  if (asked.runtime) fail(WRONG_USE, "runtime '%.80s' is unknown; expected onnxruntime or litert", asked.runtime);
  fail(WRONG_DEVICE, "%s: no runtime reads this format; expected .onnx or .tflite", path);
}

/* Look through what is asked for, before anything is done. */
static void check_words(void) {
  struct stat model, result;
  size_t i, j;
  if (!asked.n) fail(WRONG_USE, "no model; expected --graph=FILE");
  for (i = 0; i < asked.n; i++) {
    Entry *entry = &asked.entries[i];
    const char *dot = strrchr(entry->path, '.');
    entry->runtime = runtime_of(entry->path);
    if (!dot || strcmp(dot + 1, entry->runtime->extension))
      fail(WRONG_DEVICE, "runtime %s reads %s, not %s", entry->runtime->name, entry->runtime->extension, entry->path);
    for (j = 0; j < i; j++)
      if (!strcmp(asked.entries[j].label, entry->label))
        fail(WRONG_USE, "label %s: expected each once; --graph=LABEL=FILE gives another", entry->label);
    if (asked.result && !stat(asked.result, &result) && !stat(entry->path, &model) && result.st_ino == model.st_ino &&
        result.st_dev == model.st_dev)
      fail(WRONG_USE, "%s: is a model, and would be replaced by the result; choose another file", asked.result);
  }
  if (asked.max_s < asked.min_s) asked.max_s = asked.min_s;
}

static void choose_cores(void) {
  cpu_set_t there, wanted;
  const char *text = asked.cores;
  char *end;
  if (!text) return;
  CPU_ZERO(&wanted);
  sched_getaffinity(0, sizeof there, &there);
  do {
    long core = strtol(text, &end, 10);
    if (*text < '0' || *text > '9' || (*end && *end != ','))
      fail(WRONG_USE, "--cores: '%.80s': expected numbers of cores, e.g. 2,3", asked.cores);
    if (core >= CPU_SETSIZE || !CPU_ISSET((size_t)core, &there))
      fail(WRONG_USE, "--cores %.80s: core %ld is not there, or not for us", asked.cores, core);
    CPU_SET((size_t)core, &wanted);
    text = end + 1;
  } while (*end);
  if (sched_setaffinity(0, sizeof wanted, &wanted)) fail(WRONG_USE, "--cores %.80s: %s", asked.cores, strerror(errno));
}

/* ---- runtimes ---------------------------------------------------------------------------------------------------- */

static char versions[8][64]; /* of each runtime, when it is started */

static void start(const Runtime *runtime) {
  char *version = versions[runtime - runtimes], *place = NULL;
  const struct dirent *entry;
  size_t n = strlen(runtime->library);
  void *library;
  DIR *folder;
  if (*version) return;
  folder = opendir(asked.libraries);
  while (folder && (entry = readdir(folder))) {
    if (strncmp(entry->d_name, runtime->library, n)) continue;
    free(place);
    place = joined(asked.libraries, "/", entry->d_name);
    snprintf(version, sizeof *versions, "%.63s", entry->d_name + n);
  }
  if (folder) closedir(folder);
  if (!place) fail(WRONG_DEVICE, "%s: has no %s*; it is in the package %s for this processor", asked.libraries,
                   runtime->library, runtime->name);
  library = dlopen(place, RTLD_NOW | RTLD_LOCAL);
  if (!library) fail(WRONG_DEVICE, "%s cannot be used here: %s", runtime->name, dlerror());
  runtime->start(library, place);
  if (runtime->version) snprintf(version, sizeof *versions, "%.63s", runtime->version());
  free(place);
}

static const char *file_at_work, *what_is_done;

/* LiteRT trusts a file's offsets and shapes: one that is damaged makes it read or write where nothing is. */
static void crashed(int number) {
  const char *parts[] = {file_at_work, ": the runtime crashed ", what_is_done, " it; is the file damaged or cut off?\n"};
  size_t i;
  for (i = 0; i < sizeof parts / sizeof *parts; i++)
    if (write(fileno(messages), parts[i], strlen(parts[i])) < 0) _exit(128 + number);
  _exit(WRONG_USE);
}

/* Say what a crash of the runtime is to be put down to, from now on; NULL for nothing. */
static void at_work(const char *file, const char *what) {
  static const int signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGABRT};
  size_t i;
  file_at_work = file;
  what_is_done = what;
  for (i = 0; i < sizeof signals / sizeof *signals; i++) signal(signals[i], file ? crashed : SIG_DFL);
}

/* Load a model and give it an image of noise, as zeros could take shortcuts: even noise, over all codes, or real numbers
 * of mean 0 and variance 1. */
static Model *loaded(const Runtime *runtime, const char *path, const char *profile) {
  uint64_t state = 0x9e3779b97f4a7c15u;
  size_t i, n;
  char *image;
  Model *model;
  at_work(path, "loading");
  model = runtime->load(path, (int)asked.n_threads, profile);
  at_work(path, "running");
  n = model->input_bytes / (model->input_kind == REAL ? sizeof(float) : 1);
  image = allocate(model->input_bytes);
  for (i = 0; i < n; i++) {
    uint64_t word = drawn(&state) >> 32;
    float real = ((float)(word & 0xffff) - 32767.5f) * (3.4641016f / 65536);
    if (model->input_kind == REAL) memcpy(image + i * sizeof real, &real, sizeof real);
    else image[i] = (char)(word & 0xff);
  }
  runtime->set(model, image);
  free(image);
  return model;
}

/* ---- latency: as harness.py, which says why ----------------------------------------------------------------------- */

typedef struct {
  Model *model;
  int64_t *samples_ns;
  size_t n_samples, room;
  long warmups, block;
  int steady;
} Body;

static int by_size(const void *a, const void *b) {
  int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
  return (x > y) - (x < y);
}

static double median(int64_t *values, size_t n) {
  qsort(values, n, sizeof *values, by_size);
  return n % 2 ? (double)values[n / 2] : ((double)values[n / 2 - 1] + (double)values[n / 2]) / 2;
}

static int64_t timed(Model *model) {
  int64_t before = now_ns();
  model->runtime->infer(model);
  return now_ns() - before;
}

static void warm_up(Body *body) {
  double medians[STEADY_WINDOWS] = {0}, low, high, block;
  double most_s = asked.warmup_runs && asked.max_s > WARMUP_MAX_S ? asked.max_s : WARMUP_MAX_S;
  int64_t start = now_ns(), window_start, *window = NULL;
  size_t n, room = 0, windows = 0, i;
  at_work(body->model->file, "running");
  while (!body->steady) {
    window_start = now_ns();
    for (n = 0; n < 3 || (double)(now_ns() - window_start) < WINDOW_S * 1e9; n++) {
      if (n == room) window = resize(window, (room = room ? 2 * room : 64) * sizeof *window);
      window[n] = timed(body->model);
    }
    body->warmups += (long)n;
    memmove(medians, medians + 1, sizeof medians - sizeof *medians);
    medians[STEADY_WINDOWS - 1] = fmax(median(window, n), 1);
    windows++;
    low = high = medians[STEADY_WINDOWS - 1];
    for (i = windows < STEADY_WINDOWS ? STEADY_WINDOWS - windows : 0; i < STEADY_WINDOWS; i++) {
      low = fmin(low, medians[i]);
      high = fmax(high, medians[i]);
    }
    if (body->warmups < asked.warmup_runs) continue;
    body->steady = windows >= STEADY_WINDOWS && high / low - 1 <= TOLERANCE &&
                   (double)(now_ns() - start) >= WARMUP_MIN_S * 1e9;
    if ((double)(now_ns() - start) >= most_s * 1e9) break;
  }
  block = floor(BLOCK_S * 1e9 / medians[STEADY_WINDOWS - 1]);
  body->block = block < 1 ? 1 : block > MAX_BLOCK ? MAX_BLOCK : (long)block;
  free(window);
}

static void turn(Body *body) {
  long i;
  if (body->n_samples + (size_t)body->block > body->room) {
    body->room = 2 * body->room + (size_t)body->block;
    body->samples_ns = resize(body->samples_ns, body->room * sizeof *body->samples_ns);
  }
  at_work(body->model->file, "running");
  body->model->runtime->infer(body->model);
  for (i = 0; i < body->block; i++) body->samples_ns[body->n_samples++] = timed(body->model);
}

/* Time all bodies in turns; gives the number of rounds. */
static long measure(Body *bodies, size_t n) {
  uint64_t state = 0x2545f4914f6cdd1du + (uint64_t)asked.seed;
  int64_t start;
  long rounds = ROUNDS, done = 0, fewest;
  double elapsed = 0, shortest = asked.min_s * (double)n * 1e9, longest = asked.max_s * (double)n * 1e9;
  size_t i, order[MOST_MODELS];
  for (i = 0; i < n; i++) {
    long needed;
    warm_up(&bodies[i]);
    needed = (asked.n_runs + bodies[i].block - 1) / bodies[i].block;
    if (needed > rounds) rounds = needed;
    order[i] = i;
  }
  fewest = rounds < MIN_ROUNDS ? rounds : MIN_ROUNDS;
  start = now_ns();
  while ((done < rounds || elapsed < shortest) && (done < fewest || elapsed < longest)) {
    for (i = n; i > 1; i--) {
      size_t j = drawn(&state) % i, kept = order[j];
      order[j] = order[i - 1];
      order[i - 1] = kept;
    }
    for (i = 0; i < n; i++) turn(&bodies[order[i]]);
    done++;
    elapsed = (double)(now_ns() - start);
  }
  return done;
}

/* ---- memory: as memory.py, which says why ------------------------------------------------------------------------- */

static long long status_bytes(const char *name) {
  size_t n, length = strlen(name);
  char *text = read_whole("/proc/self/status", &n), *line = text;
  long long kilobytes = -1;
  for (; line; line = strchr(line, '\n')) {
    if (*line == '\n') line++;
    if (!strncmp(line, name, length) && line[length] == ':') kilobytes = atoll(line + length + 1);
  }
  free(text);
  if (kilobytes < 0) fail(WRONG_DEVICE, "/proc/self/status has no %s", name);
  return kilobytes * 1024;
}

static int reset_peak(void) {
  int file = open("/proc/self/clear_refs", O_WRONLY | O_CLOEXEC);
  int done = file >= 0 && write(file, "5", 1) == 1;
  if (file >= 0) close(file);
  return done;
}

/* What this process, a fresh one, needs for the one model; a line of JSON. */
static void weigh(void) {
  const Runtime *runtime = asked.entries[0].runtime;
  char tiny_path[64];
  long long before, base, at_load, after;
  int64_t began, took;
  Model *model;
  int i, tiny = memfd_create("tiny", MFD_CLOEXEC);
  start(runtime);
  if (tiny < 0 || write(tiny, runtime->tiny, runtime->tiny_bytes) != (ssize_t)runtime->tiny_bytes)
    fail(WRONG_DEVICE, "no file in memory: %s", strerror(errno));
  sprintf(tiny_path, "/proc/self/fd/%d", tiny);
  model = loaded(runtime, tiny_path, NULL);
  runtime->infer(model);
  runtime->release(model);
  close(tiny);
  malloc_trim(0);
  before = status_bytes("VmHWM");
  base = reset_peak() ? status_bytes("VmRSS") : before;
  began = now_ns();
  model = loaded(runtime, asked.entries[0].path, NULL);
  took = now_ns() - began;
  at_load = status_bytes("VmHWM");
  for (i = 0; i < MEMORY_RUNS; i++) runtime->infer(model);
  after = status_bytes("VmHWM");
  printf("{\"runtime_bytes\": %lld, \"loaded_bytes\": %lld, \"peak_bytes\": %lld, \"model_bytes\": %lld, "
         "\"load_ns\": %lld}", base, at_load, before > after ? before : after, after - base, (long long)took);
  runtime->release(model);
}

/* Have another process do that, and pass on what it writes. */
static void put_footprint(FILE *out, const char *self, const Entry *entry) {
  char threads[32], text[512];
  char *graph = joined("--graph=", "it=", entry->path), *place = joined("--libraries=", asked.libraries, "");
  char *runtime = joined("--runtime=", entry->runtime->name, "");
  char *words[] = {(char *)(uintptr_t)self, (char *)(uintptr_t)"--task=memory", graph, place, runtime, threads, NULL};
  int ends[2], status;
  size_t n = 0;
  ssize_t got;
  pid_t child;
  sprintf(threads, "--num_threads=%ld", asked.n_threads);
  if (pipe2(ends, O_CLOEXEC) || (child = fork()) < 0) fail(WRONG_DEVICE, "no process for memory: %s", strerror(errno));
  if (!child) {
    dup2(ends[1], 1);
    dup2(fileno(messages), 2);
    execv(self, words);
    _exit(127);
  }
  close(ends[1]);
  while (n < sizeof text && (got = read(ends[0], text + n, sizeof text - n)) > 0) n += (size_t)got;
  close(ends[0]);
  waitpid(child, &status, 0);
  if (WIFSIGNALED(status))
    fail(WRONG_DEVICE, "memory of %s: the process was killed by signal %d; is there memory enough?", entry->path,
         WTERMSIG(status));
  if (WEXITSTATUS(status)) _exit(WEXITSTATUS(status)); /* it has said why */
  fwrite(text, 1, n, out);
  free(graph);
  free(place);
  free(runtime);
}

/* ---- the machine -------------------------------------------------------------------------------------------------- */

static void put_file(FILE *out, const char *name, const char *text, size_t n, const char **comma) {
  fputs(*comma, out);
  put_text(out, name, strlen(name));
  fputs(": ", out);
  put_text(out, text, n > MOST_TEXT ? MOST_TEXT : n);
  *comma = ", ";
}

/* The Raspberry Pi's own program, where the kernel has no file of its flags. */
static void put_flags(FILE *out, const char **comma) {
  char line[128], *equals;
  FILE *said;
  if (!access("/" THROTTLE_FLAGS, R_OK) || access("/usr/bin/vcgencmd", X_OK)) return;
  said = popen("exec /usr/bin/vcgencmd get_throttled 2>/dev/null", "r");
  if (!said) return;
  if (fgets(line, sizeof line, said) && (equals = strchr(line, '=')))
    put_file(out, THROTTLE_FLAGS, equals + 1, strlen(equals + 1), comma);
  pclose(said);
}

/* Files as they are; what they mean is not known here. */
static void put_files(FILE *out, const char *const *patterns, size_t n) {
  const char *comma = "";
  size_t i, j, length;
  fputc('{', out);
  for (i = 0; i < n; i++) {
    char *pattern = joined("/", patterns[i], "");
    glob_t there;
    if (!glob(pattern, 0, NULL, &there)) {
      for (j = 0; j < there.gl_pathc; j++) {
        char *text = read_whole(there.gl_pathv[j], &length);
        if (text) put_file(out, there.gl_pathv[j] + 1, text, length, &comma);
        free(text);
      }
      globfree(&there);
    }
    free(pattern);
  }
  put_flags(out, &comma);
  fputc('}', out);
}

static void put_machine(FILE *out) {
  static const char *const facts[] = {FACT_FILES};
  struct utsname system;
  cpu_set_t cores;
  const char *comma = "";
  size_t i;
  uname(&system);
  fputs("\"machine\": ", out);
  put_text(out, system.machine, strlen(system.machine));
  fputs(", \"kernel\": ", out);
  put_text(out, system.release, strlen(system.release));
  fprintf(out, ", \"cores\": %ld, \"affinity\": [", sysconf(_SC_NPROCESSORS_ONLN));
  CPU_ZERO(&cores);
  sched_getaffinity(0, sizeof cores, &cores);
  for (i = 0; i < CPU_SETSIZE; i++) {
    if (!CPU_ISSET(i, &cores)) continue;
    fprintf(out, "%s\"%zu\"", comma, i);
    comma = ", ";
  }
  fputs("], \"files\": ", out);
  put_files(out, facts, sizeof facts / sizeof *facts);
}

static void put_state(FILE *out) {
  static const char *const state[] = {STATE_FILES};
  put_files(out, state, sizeof state / sizeof *state);
}

/* ---- tasks -------------------------------------------------------------------------------------------------------- */

/* Whole, or not at all. */
static void write_result(const char *text, size_t n) {
  char *beside;
  FILE *file;
  int failed;
  if (!asked.result) {
    if (fwrite(text, 1, n, stdout) != n || fflush(stdout)) fail(WRONG_USE, "standard output: %s", strerror(errno));
    return;
  }
  beside = joined(asked.result, ".unfinished", "");
  file = fopen(beside, "wb");
  failed = !file || fwrite(text, 1, n, file) != n || fflush(file) || fsync(fileno(file));
  if (file) failed |= fclose(file);
  if (failed || rename(beside, asked.result)) {
    int why = errno;
    unlink(beside);
    fail(WRONG_USE, "%s: %s", asked.result, strerror(why));
  }
  free(beside);
}

static void put_profile(FILE *out, const Entry *entry) {
  const char *folder = getenv("TMPDIR");
  size_t n;
  char *prefix, *text, number[32];
  Model *model;
  if (!asked.profile || !entry->runtime->profiled) {
    fputs("null", out);
    return;
  }
  sprintf(number, "%ld", (long)getpid());
  prefix = joined(folder ? folder : "/tmp", "/edgecomp-profile-", number);
  model = loaded(entry->runtime, entry->path, prefix);
  text = entry->runtime->profiled(model, &n);
  if (!text) fail(WRONG_DEVICE, "%s: the profile cannot be read", entry->path);
  put_text(out, text, n);
  entry->runtime->release(model);
  at_work(NULL, NULL);
  free(text);
  free(prefix);
}

static void put_model(FILE *out, const Entry *entry, const Body *body, long rounds, const char *self) {
  char sha256[65];
  long long n_bytes;
  size_t i;
  long p;
  digest(entry->path, sha256, &n_bytes);
  fputs("{\"label\": ", out);
  put_text(out, entry->label, strlen(entry->label));
  fprintf(out, ", \"bytes\": %lld, \"sha256\": \"%s\", \"runtime\": \"%s\", \"runtime_version\": ", n_bytes, sha256,
          entry->runtime->name);
  put_text(out, versions[entry->runtime - runtimes], strlen(versions[entry->runtime - runtimes]));
  fputs(", \"execution\": ", out);
  entry->runtime->describe(body->model, out);
  fprintf(out, ", \"warmups\": %ld, \"steady\": %s, \"rounds\": %ld, \"samples_ns\": [", body->warmups,
          body->steady ? "true" : "false", rounds);
  for (i = 0; i < body->n_samples; i++) fprintf(out, "%s%lld", i ? "," : "", (long long)body->samples_ns[i]);
  fputs("], \"memory\": [", out);
  /* Its own memory goes first, on a board with little of it. */
  at_work(entry->path, "unloading");
  entry->runtime->release(body->model);
  at_work(NULL, NULL);
  for (p = 0; p < asked.processes; p++) {
    if (p) fputs(", ", out);
    put_footprint(out, self, entry);
  }
  fputs("], \"profile\": ", out);
  put_profile(out, entry);
  fputc('}', out);
}

static void time_all(const char *self) {
  static Body bodies[MOST_MODELS];
  char *text;
  size_t n, i;
  long rounds;
  FILE *out = open_memstream(&text, &n);
  if (!out) fail(WRONG_DEVICE, "out of memory");
  for (i = 0; i < asked.n; i++) {
    start(asked.entries[i].runtime);
    bodies[i].model = loaded(asked.entries[i].runtime, asked.entries[i].path, NULL);
  }
  fprintf(out, "{\"schema\": \"%s\", \"edgecomp\": \"%s\", \"threads\": %ld, ", SCHEMA, VERSION, asked.n_threads);
  put_machine(out);
  fputs(", \"before\": ", out);
  put_state(out);
  rounds = measure(bodies, asked.n);
  at_work(NULL, NULL);
  fputs(", \"after\": ", out);
  put_state(out);
  fputs(", \"models\": [", out);
  for (i = 0; i < asked.n; i++) {
    if (i) fputs(", ", out);
    put_model(out, &asked.entries[i], &bodies[i], rounds, self);
  }
  fputs("]}\n", out);
  fclose(out);
  write_result(text, n);
  free(text);
  for (i = 0; i < asked.n; i++) {
    size_t m = bodies[i].n_samples;
    double p50 = median(bodies[i].samples_ns, m);
    fprintf(messages, "%s: p50 %.3f ms, min %.3f ms of %zu samples\n", asked.entries[i].label, p50 / 1e6,
            (double)bodies[i].samples_ns[0] / 1e6, m);
    free(bodies[i].samples_ns);
  }
}

/* The outputs for images given as bytes, one behind the other. */
static void write_outputs(void) {
  const Entry *entry = &asked.entries[0];
  size_t n, n_images, i, j, n_text;
  char *images = asked.inputs ? read_whole(asked.inputs, &n) : NULL, *text;
  Model *model;
  FILE *out = open_memstream(&text, &n_text);
  if (!images || !out) fail(WRONG_USE, "--task outputs: --inputs cannot be read");
  start(entry->runtime);
  model = loaded(entry->runtime, entry->path, NULL);
  n_images = n / model->input_bytes;
  if (!n_images || n % model->input_bytes)
    fail(WRONG_USE, "%s: %zu bytes, expected a multiple of %zu", asked.inputs, n, model->input_bytes);
  for (i = 0; i < n_images; i++) {
    model->runtime->set(model, images + i * model->input_bytes);
    model->runtime->infer(model);
    for (j = 0; j < model->n_outputs; j++) {
      Border border = model->runtime->output(model, j);
      fwrite(border.data, 1, border.bytes, out);
    }
  }
  fclose(out);
  write_result(text, n_text);
  model->runtime->release(model);
  free(images);
  free(text);
}

/* Where this program lies. */
static char *own_path(void) {
  static char path[4096];
  ssize_t n = readlink("/proc/self/exe", path, sizeof path - 1);
  if (n < 0) fail(WRONG_DEVICE, "/proc/self/exe: %s", strerror(errno));
  path[n] = 0;
  return path;
}

int main(int argc, char **argv) {
  const char *self;
  char *beside;
  size_t i;
  (void)argc;
  hold_back();
  /* onnxruntime's telemetry is a thread and a data base of its own: neither belongs into a measurement. */
  setenv("ORT_DISABLE_TELEMETRY", "1", 1);
  read_words(argv);
  self = own_path();
  if (!strcmp(asked.task, "session") && asked.folder) return session(self, asked.folder);
  check_words();
  choose_cores();
  beside = joined(self, "", "");
  *strrchr(beside, '/') = 0;
  if (!asked.libraries) asked.libraries = beside;
  if (!strcmp(asked.task, "memory")) weigh();
  else if (!strcmp(asked.task, "outputs")) write_outputs();
  else if (!strcmp(asked.task, "time")) time_all(self);
  else fail(WRONG_USE, "--task: '%.80s': expected time", asked.task);
  for (i = 0; i < asked.n; i++) free((char *)(uintptr_t)asked.entries[i].label);
  free(beside);
  fclose(messages);
  return 0;
}
