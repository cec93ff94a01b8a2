/* Loaded with LD_PRELOAD: counts the calls that create, write, rename or remove a file below a folder, and at a chosen
 * one kills the process or, from there on, answers that the disk is full.
 *
 * A killed write has written half of its bytes. Writes through a memory map are no calls and are not counted. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, FULL };
static char below[4096];
static size_t below_length;
static int mode = COUNT;
static atomic_long seen, at = -1;

void injector_arm(const char *folder, long number, int what) {
    strncpy(below, folder, sizeof below - 1);
    below_length = strlen(below);
    mode = what;
    at = number;
    seen = 0;
}

long injector_seen(void) { return seen; }

static int inside(int directory, const char *path) {
    char full[8192], base[4096];
    if (!below_length || !path) return 0;
    if (path[0] == '/') return strncmp(path, below, below_length) == 0;
    if (directory == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) return 0;
    } else {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
        ssize_t length = readlink(link, base, sizeof base - 1);
        if (length < 0) return 0;
        base[length] = 0;
    }
    snprintf(full, sizeof full, "%s/%s", base, path);
    return strncmp(full, below, below_length) == 0;
}

static int inside_fd(int file) {
    int kept = errno, found = inside(file, "");
    errno = kept;
    return found;
}

/* 0: go on, 1: this call is the one to die in, 2: the disk is full. Removing and renaming work on a full disk. */
static int event(int makes) {
    long number = atomic_fetch_add(&seen, 1);
    if (mode == KILL && number == at) return 1;
    if (mode == FULL && number >= at && makes) return 2;
    return 0;
}

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define GATE(counted, makes, failed) \
    if (counted) { int what = event(makes); if (what == 1) die(); if (what == 2) { errno = ENOSPC; return failed; } }

#define OPENER(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); va_list rest; va_start(rest, flags); mode_t bits = va_arg(rest, mode_t); va_end(rest); \
        GATE((flags & (O_CREAT | O_TRUNC)) && inside(AT_FDCWD, path), 1, -1) \
        return real(path, flags, bits); }
OPENER(open)
OPENER(open64)

#define OPENER_AT(name) \
    int name(int directory, const char *path, int flags, ...) { \
        REAL(name); va_list rest; va_start(rest, flags); mode_t bits = va_arg(rest, mode_t); va_end(rest); \
        GATE((flags & (O_CREAT | O_TRUNC)) && inside(directory, path), 1, -1) \
        return real(directory, path, flags, bits); }
OPENER_AT(openat)
OPENER_AT(openat64)

#define STREAM(name) \
    FILE *name(const char *path, const char *how) { \
        REAL(name); GATE((how[0] == 'w' || how[0] == 'a') && inside(AT_FDCWD, path), 1, NULL) return real(path, how); }
STREAM(fopen)
STREAM(fopen64)

ssize_t write(int file, const void *data, size_t size) {
    REAL(write);
    if (inside_fd(file)) {
        int what = event(1);
        if (what == 1) { (void)!real(file, data, size / 2); die(); }
        if (what == 2) { errno = ENOSPC; return -1; }
    }
    return real(file, data, size);
}

size_t fwrite(const void *data, size_t size, size_t count, FILE *stream) {
    REAL(fwrite);
    if (inside_fd(fileno(stream))) {
        int what = event(1);
        if (what == 1) { real(data, size, count / 2, stream); fflush(stream); die(); }
        if (what == 2) { errno = ENOSPC; return 0; }
    }
    return real(data, size, count, stream);
}

#define ON_FD(type, name, args, call, failed) \
    type name args { REAL(name); GATE(inside_fd(file), 1, failed) return real call; }
ON_FD(ssize_t, pwrite, (int file, const void *data, size_t size, off_t place), (file, data, size, place), -1)
ON_FD(ssize_t, pwrite64, (int file, const void *data, size_t size, off64_t place), (file, data, size, place), -1)
ON_FD(ssize_t, writev, (int file, const struct iovec *parts, int count), (file, parts, count), -1)
ON_FD(ssize_t, sendfile, (int file, int from, off_t *place, size_t count), (file, from, place, count), -1)
ON_FD(ssize_t, sendfile64, (int file, int from, off64_t *place, size_t count), (file, from, place, count), -1)
ON_FD(int, ftruncate, (int file, off_t size), (file, size), -1)
ON_FD(int, ftruncate64, (int file, off64_t size), (file, size), -1)
ON_FD(int, posix_fallocate, (int file, off_t place, off_t size), (file, place, size), ENOSPC)
ON_FD(int, posix_fallocate64, (int file, off64_t place, off64_t size), (file, place, size), ENOSPC)

ssize_t copy_file_range(int from, off64_t *there, int file, off64_t *here, size_t size, unsigned flags) {
    REAL(copy_file_range);
    GATE(inside_fd(file), 1, -1)
    return real(from, there, file, here, size, flags);
}

#define ON_PATH(name, makes, args, call) \
    int name args { REAL(name); GATE(inside(AT_FDCWD, path), makes, -1) return real call; }
ON_PATH(mkdir, 1, (const char *path, mode_t bits), (path, bits))
ON_PATH(rmdir, 0, (const char *path), (path))
ON_PATH(unlink, 0, (const char *path), (path))
ON_PATH(remove, 0, (const char *path), (path))
ON_PATH(truncate, 0, (const char *path, off_t size), (path, size))

int mkdirat(int directory, const char *path, mode_t bits) {
    REAL(mkdirat);
    GATE(inside(directory, path), 1, -1)
    return real(directory, path, bits);
}
int unlinkat(int directory, const char *path, int flags) {
    REAL(unlinkat);
    GATE(inside(directory, path), 0, -1)
    return real(directory, path, flags);
}
int rename(const char *from, const char *path) {
    REAL(rename);
    GATE(inside(AT_FDCWD, path), 0, -1)
    return real(from, path);
}
int renameat(int source, const char *from, int directory, const char *path) {
    REAL(renameat);
    GATE(inside(directory, path), 0, -1)
    return real(source, from, directory, path);
}
int symlink(const char *target, const char *path) {
    REAL(symlink);
    GATE(inside(AT_FDCWD, path), 1, -1)
    return real(target, path);
}
int link(const char *target, const char *path) {
    REAL(link);
    GATE(inside(AT_FDCWD, path), 1, -1)
    return real(target, path);
}
