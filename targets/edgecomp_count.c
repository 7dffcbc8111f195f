/*
 * A QEMU plugin that counts the instructions of an emulated Arm program in user mode, of 64-bit ones by class.
 *
 * The program marks places by closing file -31337: that fails in every kernel and changes nothing. At each mark, and at
 * the end, one line is written to the file given as out=PATH: the count of each class so far. Counts are added as blocks
 * of instructions are entered, and a block ends at a system call, so at a mark they are exact. They are of all threads
 * together, in version 1 added without locks: run the program with one.
 *
 * Loaded before QEMU's own libraries it also answers getrandom(), which seeds hash tables and names, with the same bytes
 * in every run: else a program would take slightly other ways each time. Clocks likewise: how the difference of two times
 * is taken depends on their fractions. Each question is answered by a microsecond more than the one before.
 *
 * QEMU's plugin interface, versions 1 to 6 (QEMU 4.2 to 8.2, 9.0, 9.1 and later), is declared here, because Debian 12
 * ships no header for it. One binary serves all: what a version does not have is a weak symbol, which is then NULL.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>

#define MARK (-31337)
#define EXPORT __attribute__((visibility("default")))

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
struct qemu_plugin_scoreboard;
typedef struct {
    struct qemu_plugin_scoreboard *score;
    size_t offset;
} qemu_plugin_u64;
typedef struct {
    const char *target_name;
    struct {
        int min, cur;
    } version; /* more follows that is not needed */
} qemu_info_t;
typedef void (*translated)(qemu_plugin_id_t, struct qemu_plugin_tb *);
typedef void (*called)(qemu_plugin_id_t, unsigned, int64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                       uint64_t, uint64_t);
typedef void (*ended)(qemu_plugin_id_t, void *);
enum { INLINE_ADD_U64 };
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, translated);
void qemu_plugin_register_vcpu_syscall_cb(qemu_plugin_id_t, called);
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t, ended, void *);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
/* Before version 3 it took the first argument alone and gave a pointer, which a caller with three does not hinder. */
uintptr_t qemu_plugin_insn_data(const struct qemu_plugin_insn *, void *, size_t);

#define WEAK __attribute__((weak))
/* version 1 */
WEAK void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int, void *, uint64_t);
WEAK int qemu_plugin_n_vcpus(void);
/* from version 2 on */
WEAK void qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(struct qemu_plugin_tb *, int, qemu_plugin_u64, uint64_t);
WEAK struct qemu_plugin_scoreboard *qemu_plugin_scoreboard_new(size_t);
WEAK uint64_t qemu_plugin_u64_sum(qemu_plugin_u64);

enum { COPIES_DATA = 3, LATEST = 6 }; /* versions; 7 gives callbacks other arguments */

EXPORT int qemu_plugin_version = 1;
static int version;

/* QEMU refuses a plugin of a version before its oldest, and reads this after constructors have run. */
__attribute__((constructor)) static void say_version(void) {
    if (!qemu_plugin_n_vcpus) qemu_plugin_version = 2;
}

/* In the order of edgecomp.targets.emulated.CLASSES. */
enum { INTEGER, BRANCH, LOAD, STORE, SIMD_LOAD, SIMD_STORE, SIMD_INTEGER, DOT_PRODUCT, FLOAT, OTHER, N_CLASSES };

/*
 * The encodings, after chapter C4.1 of the Arm Architecture Reference Manual for A-profile; the first row that fits
 * counts. In names of Advanced SIMD groups: [v] vector, [s] scalar. Swaps and other atomic operations are loads.
 */
static const struct {
    uint32_t mask, value;
    int kind;
} rows[] = {
    /* branches, exceptions, system */
    {0xfe000000, 0xd4000000, OTHER},
    {0x1c000000, 0x14000000, BRANCH},
    /* data processing on general registers */
    {0x1c000000, 0x10000000, INTEGER},
    {0x0e000000, 0x0a000000, INTEGER},
    /* loads and stores: of several vectors, exclusive and ordered, literal, pairs, one register */
    {0xbe000000, 0x0c000000, -1}, /* decided by bit 22 */
    {0x3fa07c00, 0x08a07c00, LOAD}, /* CAS */
    {0xbfa07c00, 0x08207c00, LOAD}, /* CASP */
    {0x3f000000, 0x08000000, -1},
    {0x3b000000, 0x18000000, LOAD}, /* literal */
    {0x3bc00000, 0x19000000, STORE}, /* STLUR */
    {0x3b000000, 0x19000000, LOAD}, /* LDAPUR */
    {0x3a000000, 0x28000000, -1},
    {0x3f200c00, 0x38200000, LOAD}, /* LDADD and its kin, SWP */
    {0x3e000000, 0x3c000000, -1},
    {0x3ec00000, 0x38000000, STORE},
    {0x3e000000, 0x38000000, LOAD},
    /* cryptography */
    {0xff3e0c00, 0x4e280800, OTHER}, /* AES */
    {0xff208c00, 0x5e000000, OTHER}, /* SHA1, SHA256 */
    {0xff3e0c00, 0x5e280800, OTHER},
    {0xff000000, 0xce000000, OTHER}, /* SHA3, SHA512, SM3, SM4 */
    /* dot products and matrix products of bytes */
    {0x9fe0fc00, 0x0e809400, DOT_PRODUCT}, /* SDOT, UDOT */
    {0xbfe0fc00, 0x0e809c00, DOT_PRODUCT}, /* USDOT */
    {0x9fe0f400, 0x0e80a400, DOT_PRODUCT}, /* SMMLA, UMMLA, USMMLA */
    {0x9fc0f400, 0x0f80e000, DOT_PRODUCT}, /* SDOT, UDOT by element */
    {0xbf40f400, 0x0f00f000, DOT_PRODUCT}, /* SUDOT, USDOT by element */
    /* real numbers */
    {0x7e000000, 0x1e000000, FLOAT}, /* scalar: arithmetic, conversions, comparisons, FMOV, FMADD */
    {0x9f20c400, 0x0e20c400, FLOAT}, /* three registers of one type [v] */
    {0xdf20c400, 0x5e20c400, FLOAT}, /* [s] */
    {0x9f60c400, 0x0e400400, FLOAT}, /* half precision [v] */
    {0xdf60c400, 0x5e400400, FLOAT}, /* [s] */
    {0x9f20c400, 0x0e00c400, FLOAT}, /* FCMLA, FCADD, BFDOT, BFMMLA */
    {0x9f3fcc00, 0x0e20c800, FLOAT}, /* two registers: opcodes 011xx, 11xxx, 1011x [v] */
    {0x9f3f8c00, 0x0e218800, FLOAT},
    {0x9f3fec00, 0x0e216800, FLOAT},
    {0xdf3fcc00, 0x5e20c800, FLOAT}, /* [s] */
    {0xdf3f8c00, 0x5e218800, FLOAT},
    {0xdf3fec00, 0x5e216800, FLOAT},
    {0x9f7e0c00, 0x0e780800, FLOAT}, /* half precision [v] */
    {0xdf7e0c00, 0x5e780800, FLOAT}, /* [s] */
    {0x9f3fcc00, 0x0e30c800, FLOAT}, /* maximum and minimum across lanes [v] */
    {0xdf3fcc00, 0x5e30c800, FLOAT}, /* pairwise [s] */
    {0x9ff8f400, 0x0f00f400, FLOAT}, /* FMOV of an immediate [v] */
    {0x9ff80400, 0x0f000400, SIMD_INTEGER}, /* MOVI and its kin [v] */
    {0x9f80fc00, 0x0f00e400, FLOAT}, /* SCVTF, UCVTF to fixed point [v] */
    {0x9f80fc00, 0x0f00fc00, FLOAT}, /* FCVTZS, FCVTZU */
    {0xdf80fc00, 0x5f00e400, FLOAT}, /* [s] */
    {0xdf80fc00, 0x5f00fc00, FLOAT},
    {0x8f00f400, 0x0f001000, FLOAT}, /* by element, vector and scalar: FMLA, FMLS, FMUL and FMULX */
    {0x8f00f400, 0x0f005000, FLOAT},
    {0x8f00f400, 0x0f009000, FLOAT},
    {0xbf00f400, 0x2f003000, FLOAT}, /* FCMLA */
    {0xbf00f400, 0x2f007000, FLOAT},
    {0xbfc0b400, 0x0f800000, FLOAT}, /* FMLAL, FMLSL, FMLAL2, FMLSL2 */
    {0xbfc0b400, 0x2f808000, FLOAT},
    {0xbf40f400, 0x0f40f000, FLOAT}, /* BFDOT, BFMLAL */
    {0x0e000000, 0x0e000000, SIMD_INTEGER},
};

/* "close" on 64-bit and on 32-bit Arm */
enum { CLOSE = 57, CLOSE_32 = 6 };

static int is_32_bit; /* all are OTHER */
static uint64_t counts[N_CLASSES];
static struct qemu_plugin_scoreboard *per_thread; /* in the place of counts, where that can be */
static FILE *out;

static int kind_of(uint32_t word) {
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        if ((word & rows[i].mask) == rows[i].value) {
            int kind = rows[i].kind;
            if (kind < 0) kind = word >> 22 & 1 ? LOAD : STORE;
            /* Bit 26 says that a register is a vector's. */
            if ((kind == LOAD || kind == STORE) && (word >> 26 & 1)) kind += SIMD_LOAD - LOAD;
            return kind;
        }
    return OTHER; /* SVE */
}

static qemu_plugin_u64 place_of(int kind) {
    return (qemu_plugin_u64){per_thread, (size_t)kind * sizeof *counts};
}

static void on_block(qemu_plugin_id_t id, struct qemu_plugin_tb *block) {
    uint64_t here[N_CLASSES] = {0};
    (void)id;
    if (is_32_bit) here[OTHER] = qemu_plugin_tb_n_insns(block);
    for (size_t i = 0, n = is_32_bit ? 0 : qemu_plugin_tb_n_insns(block); i < n; i++) {
        uint32_t word;
        uintptr_t found = qemu_plugin_insn_data(qemu_plugin_tb_get_insn(block, i), &word, sizeof word);
        if (version < COPIES_DATA) memcpy(&word, (const void *)found, sizeof word);
        here[kind_of(word)]++;
    }
    for (int kind = 0; kind < N_CLASSES; kind++) {
        if (!here[kind]) continue;
        if (per_thread)
            qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(block, INLINE_ADD_U64, place_of(kind), here[kind]);
        else
            qemu_plugin_register_vcpu_tb_exec_inline(block, INLINE_ADD_U64, &counts[kind], here[kind]);
    }
}

static void write_counts(void) {
    for (int kind = 0; kind < N_CLASSES; kind++) {
        uint64_t count = per_thread ? qemu_plugin_u64_sum(place_of(kind)) : counts[kind];
        fprintf(out, "%llu%c", (unsigned long long)count, kind + 1 < N_CLASSES ? ' ' : '\n');
    }
    fflush(out);
}

static void on_call(qemu_plugin_id_t id, unsigned vcpu, int64_t number, uint64_t a1, uint64_t a2, uint64_t a3,
                    uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8) {
    (void)id, (void)vcpu, (void)a2, (void)a3, (void)a4, (void)a5, (void)a6, (void)a7, (void)a8;
    if (number == (is_32_bit ? CLOSE_32 : CLOSE) && (int32_t)a1 == MARK) write_counts();
}

static void on_end(qemu_plugin_id_t id, void *none) {
    (void)id, (void)none;
    write_counts();
    fclose(out);
}

/* In the place of the C library's: QEMU passes the program's getrandom() on by it. */
EXPORT long syscall(long number, ...) {
    long a[6];
    va_list given;
    va_start(given, number);
    for (int i = 0; i < 6; i++) a[i] = va_arg(given, long);
    va_end(given);
    if (number == SYS_getrandom) {
        static uint64_t state = 1;
        unsigned char *to = (unsigned char *)a[0];
        for (long i = 0; i < a[1]; i++) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            to[i] = (unsigned char)(state >> 56);
        }
        return a[1];
    }
    long result;
    register long r10 __asm__("r10") = a[3], r8 __asm__("r8") = a[4], r9 __asm__("r9") = a[5];
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a[0]), "S"(a[1]), "d"(a[2]), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    if (result < 0 && result > -4096) {
        errno = (int)-result;
        return -1;
    }
    return result;
}

/* QEMU passes the program's questions for the time on by these, and reads cntvct_el0 from the first. */
EXPORT int clock_gettime(clockid_t clock, struct timespec *to) {
    static uint64_t asked;
    uint64_t us = __atomic_add_fetch(&asked, 1, __ATOMIC_RELAXED);
    /* 2024-01-01 for the time of day; the others begin when the machine or the program does */
    to->tv_sec = (time_t)((clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE ? 1704067200 : 1000) + us / 1000000);
    to->tv_nsec = (long)(us % 1000000 * 1000);
    return 0;
}

EXPORT int gettimeofday(struct timeval *restrict to, void *restrict zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    to->tv_sec = now.tv_sec;
    to->tv_usec = now.tv_nsec / 1000;
    return 0;
}

EXPORT time_t time(time_t *to) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (to) *to = now.tv_sec;
    return now.tv_sec;
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv) {
    is_32_bit = !strcmp(info->target_name, "arm");
    if ((!is_32_bit && strcmp(info->target_name, "aarch64")) || argc != 1 || strncmp(argv[0], "out=", 4)) return 1;
    version = info->version.cur;
    if (version > LATEST) {
        fprintf(stderr, "edgecomp_count: QEMU's plugin interface is version %d, expected at most %d\n", version, LATEST);
        return 1;
    }
    if (!(out = fopen(argv[0] + 4, "w"))) return 1;
    if (qemu_plugin_scoreboard_new) per_thread = qemu_plugin_scoreboard_new(sizeof counts);
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_block);
    qemu_plugin_register_vcpu_syscall_cb(id, on_call);
    qemu_plugin_register_atexit_cb(id, on_end, NULL);
    return 0;
}
