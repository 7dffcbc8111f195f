/* The device's end of a session over SSH where there is no Python: what session.py is where there is.
 *
 * Both ends take turns. The device speaks first and answers in lines of JSON, some with bytes behind them. Orders are
 * lines of words: files and arguments follow, a line each, then the files' bytes. What is sent lies in the folder that
 * the shell made for this session; it is removed however the session ends: by a last word, by a signal, by a time limit,
 * or by a lost connection, which is noticed because standard input ends. What stays is a folder of libraries for each
 * set of them, in the user's cache folder. */
#include "edgecomp_runner.h"

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <gnu/libc-version.h>
#include <dirent.h>
#include <poll.h>
#include <pwd.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { LINE = 4096, NAME = 256, MOST_FILES = 200, KEY = 16, SAID = 4000 };
#define LIBRARIES "native-"

static const char *work;         /* this session's folder */
static char *cache, *making;     /* the cache folder, and one in it that is not done */
static volatile pid_t child;     /* that is running */
static volatile sig_atomic_t over;

static int remove_one(const char *path, const struct stat *status, int type, struct FTW *place) {
  (void)status, (void)type, (void)place;
  (void)remove(path);
  return 0;
}

static void remove_all(const char *folder) { (void)nftw(folder, remove_one, 16, FTW_DEPTH | FTW_PHYS); }

/* End, and leave nothing: nobody is at the other end any more. */
static void __attribute__((noreturn)) leave(void) {
  if (child > 0) {
    kill(-child, SIGKILL);
    waitpid(child, NULL, 0);
  }
  if (making) remove_all(making);
  remove_all(work);
  free(making);
  free(cache);
  exit(0);
}

static void on_signal(int number) {
  (void)number;
  over = 1;
}

static void read_exactly(char *bytes, size_t n) {
  while (n) {
    ssize_t got = over ? 0 : read(0, bytes, n);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) leave();
    bytes += got;
    n -= (size_t)got;
  }
}

/* A line, without its end. */
static void read_line(char line[LINE]) {
  size_t n = 0;
  for (;;) {
    read_exactly(line + n, 1);
    if (line[n] == '\n') break;
    if (++n == LINE) leave(); /* no edgecomp says so much on one line */
  }
  line[n] = 0;
}

/* Wait a moment, and notice if the other end is gone. */
static void watch(void) {
  struct pollfd input = {0, POLLIN, 0};
  char byte;
  if (poll(&input, 1, 100) > 0) read_exactly(&byte, 1);
  if (over) leave();
}

static void write_exactly(const char *bytes, size_t n) {
  while (n) {
    ssize_t put = write(1, bytes, n);
    if (put < 0 && errno == EINTR && !over) continue;
    if (put <= 0) leave();
    bytes += put;
    n -= (size_t)put;
  }
}

/* Send what was written to a stream, which is closed; then n bytes. */
static void answer(FILE *out, char **text, const char *bytes, size_t n) {
  fprintf(out, ", \"bytes\": %zu}\n", n);
  fclose(out);
  write_exactly(*text, strlen(*text));
  write_exactly(bytes, n);
  free(*text);
}

static FILE *memory_stream(char **text) {
  static size_t n;
  FILE *out = open_memstream(text, &n);
  if (!out) leave();
  return out;
}

/* Say that something went wrong, with what or where it was, and what the system says. */
static void answer_error(const char *what, const char *why) {
  char *text;
  FILE *out = memory_stream(&text);
  char *both = joined(what, ": ", why);
  fprintf(out, "{\"error\": ");
  put_text(out, both, strlen(both));
  free(both);
  answer(out, &text, "", 0);
}

static double now_s(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

/* Take the files that follow an order into a folder; all are taken off the wire, also if the disk is full. 0, or the
 * number of the first error. */
static int take_files(const char *folder, size_t n, char names[][NAME], const size_t *bytes) {
  static char part[1 << 16];
  size_t i, left;
  int trouble = 0;
  for (i = 0; i < n; i++) {
    char *path = joined(folder, "/", names[i]);
    int file = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (file < 0 && !trouble) trouble = errno;
    for (left = bytes[i]; left;) {
      size_t m = left < sizeof part ? left : sizeof part, done = 0;
      read_exactly(part, m);
      while (file >= 0 && !trouble && done < m) {
        ssize_t put = write(file, part + done, m - done);
        if (put < 0 && errno != EINTR) trouble = errno;
        if (put > 0) done += (size_t)put;
      }
      left -= m;
    }
    if (file >= 0 && close(file) && !trouble) trouble = errno;
    free(path);
  }
  return trouble;
}

/* Lengths and names, a line each; a name is that of a plain file within a folder. */
static void read_names(size_t n, char names[][NAME], size_t *bytes) {
  char line[LINE];
  size_t i;
  for (i = 0; i < n; i++) {
    read_line(line);
    if (sscanf(line, "%zu %255s", &bytes[i], names[i]) != 2 || strchr(names[i], '/') || names[i][0] == '.') leave();
  }
}

static int make_folders(const char *path) {
  char *copy = joined(path, "", ""), *slash;
  int failed;
  for (slash = strchr(copy + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
    *slash = 0;
    (void)mkdir(copy, 0777);
    *slash = '/';
  }
  failed = mkdir(copy, 0777) && errno != EEXIST;
  free(copy);
  return failed;
}

/* Where libraries stay: in the cache folder, or for this session alone where none can be made. */
static void find_cache(void) {
  const char *base = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
  const struct passwd *user = getpwuid(getuid());
  if (!home && user) home = user->pw_dir;
  if (base && *base) cache = joined(base, "/", "edgecomp");
  else if (home) cache = joined(home, "/.cache/", "edgecomp");
  if (cache && !make_folders(cache) && access(cache, W_OK) == 0) return;
  free(cache);
  cache = joined(work, "", "");
}

static void say_facts(void) {
  char *text;
  FILE *out = memory_stream(&text);
  struct utsname system;
  struct statvfs disk;
  const struct dirent *entry;
  DIR *folder = opendir(cache);
  const char *comma = "";
  uname(&system);
  if (statvfs(cache, &disk)) memset(&disk, 0, sizeof disk);
  fprintf(out, "{\"session\": 1, \"machine\": ");
  put_text(out, system.machine, strlen(system.machine));
  fprintf(out, ", \"libc\": \"%s\", \"free_bytes\": %llu, \"environments\": [", gnu_get_libc_version(),
          (unsigned long long)disk.f_bavail * disk.f_frsize);
  while (folder && (entry = readdir(folder))) {
    if (strncmp(entry->d_name, LIBRARIES, strlen(LIBRARIES))) continue;
    fputs(comma, out);
    put_text(out, entry->d_name + strlen(LIBRARIES), strlen(entry->d_name) - strlen(LIBRARIES));
    comma = ", ";
  }
  if (folder) closedir(folder);
  fputc(']', out);
  answer(out, &text, "", 0);
}

static void take_libraries(const char *key, size_t n, char names[][NAME], size_t *bytes) {
  char *place = joined(cache, "/" LIBRARIES, key), *text;
  int trouble;
  read_names(n, names, bytes);
  making = joined(cache, "/", "making-XXXXXX");
  trouble = mkdtemp(making) ? 0 : errno;
  /* Without a folder they are still taken off the wire. */
  if (trouble) (void)take_files("/dev/null", n, names, bytes);
  else trouble = take_files(making, n, names, bytes);
  /* Another session may have been quicker. */
  if (!trouble && rename(making, place) && access(place, R_OK)) trouble = errno;
  remove_all(making);
  free(making);
  making = NULL;
  if (trouble) {
    answer_error(cache, strerror(trouble));
  } else {
    FILE *out = memory_stream(&text);
    fprintf(out, "{\"done\": true");
    answer(out, &text, "", 0);
  }
  free(place);
}

/* Run the runner to its end; its exit code, or minus the signal that ended it, or INT32_MIN when its time was over. */
static int run_watched(char **arguments, double deadline) {
  int status;
  pid_t made = fork();
  if (made < 0) return INT32_MIN;
  if (made == 0) {
    int input = open("/dev/null", O_RDONLY), out = open("out", O_WRONLY | O_CREAT | O_TRUNC, 0600);
    int err = open("err", O_WRONLY | O_CREAT | O_TRUNC, 0600);
    setsid();
    if (input < 0 || out < 0 || err < 0 || dup2(input, 0) < 0 || dup2(out, 1) < 0 || dup2(err, 2) < 0) _exit(127);
    execv(arguments[0], arguments);
    _exit(127);
  }
  child = made;
  while (waitpid(made, &status, WNOHANG) == 0) {
    watch();
    if (now_s() <= deadline) continue;
    kill(-made, SIGKILL);
    waitpid(made, NULL, 0);
    child = 0;
    return INT32_MIN;
  }
  /* Children of its own, where it was killed. */
  kill(-made, SIGKILL);
  child = 0;
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

static void say_result(int code) {
  char *text, *said, *bytes;
  size_t n_said = 0, n = 0, skipped;
  FILE *out = memory_stream(&text);
  said = read_whole("err", &n_said);
  bytes = read_whole("out", &n);
  skipped = n_said > SAID ? n_said - SAID : 0;
  fprintf(out, "{\"exit\": %d, \"stderr\": ", code);
  put_text(out, said ? said + skipped : "", said ? n_said - skipped : 0);
  answer(out, &text, bytes ? bytes : "", bytes ? n : 0);
  free(said);
  free(bytes);
}

/* Run the runner, alone on this device. */
static void run(const char *self, const char *key, double limit_s, size_t n, char names[][NAME], size_t *bytes,
                size_t n_arguments) {
  char **arguments = allocate((n_arguments + 3) * sizeof *arguments), line[LINE], *place;
  double deadline = now_s() + limit_s;
  int lock = -1, trouble, code;
  size_t i;
  read_names(n, names, bytes);
  place = joined(cache, "/" LIBRARIES, key);
  arguments[0] = joined(self, "", "");
  arguments[1] = joined("--libraries=", place, "");
  for (i = 0; i < n_arguments; i++) {
    read_line(line);
    arguments[i + 2] = joined(line, "", "");
  }
  arguments[n_arguments + 2] = NULL;
  trouble = take_files(work, n, names, bytes);
  free(place);
  place = joined(cache, "/", "run.lock");
  if (!trouble && (lock = open(place, O_RDWR | O_CREAT | O_CLOEXEC, 0666)) < 0) trouble = errno;
  while (!trouble && flock(lock, LOCK_EX | LOCK_NB)) {
    /* Two at once would measure each other. */
    if (now_s() > deadline) trouble = EBUSY;
    watch();
  }
  if (trouble == EBUSY) {
    answer_error("this device", "another measurement holds it for longer than the time limit");
  } else if (trouble) {
    answer_error(work, strerror(trouble));
  } else if ((code = run_watched(arguments, deadline)) == INT32_MIN) {
    answer_error("the runner", "not done when its time was over");
  } else {
    say_result(code);
  }
  if (lock >= 0) close(lock);
  for (i = 0; arguments[i]; i++) free(arguments[i]);
  free(arguments);
  free(place);
}

int session(const char *self, const char *folder) {
  static char names[MOST_FILES][NAME];
  static size_t bytes[MOST_FILES];
  static const int signals[] = {SIGTERM, SIGHUP, SIGINT, SIGPIPE};
  struct sigaction action;
  size_t i;
  memset(&action, 0, sizeof action);
  action.sa_handler = on_signal;
  for (i = 0; i < sizeof signals / sizeof *signals; i++) sigaction(signals[i], &action, NULL);
  work = folder;
  if (chdir(work)) fail(WRONG_DEVICE, "%s: %s", work, strerror(errno));
  setenv("TMPDIR", work, 1);
  find_cache();
  say_facts();
  for (;;) {
    char line[LINE], key[KEY + 1];
    size_t n, n_arguments;
    double limit_s;
    read_line(line);
    if (sscanf(line, "libraries %16[0-9a-f] %zu", key, &n) == 2 && n <= MOST_FILES)
      take_libraries(key, n, names, bytes);
    else if (sscanf(line, "run %16[0-9a-f] %lf %zu %zu", key, &limit_s, &n, &n_arguments) == 4 && n <= MOST_FILES &&
             n_arguments <= MOST_FILES)
      run(self, key, limit_s, n, names, bytes, n_arguments);
    else
      leave();
  }
}
