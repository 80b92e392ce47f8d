/* The n-th system call that writes, creates, flushes or renames below a folder fails, as on a full or failing disk.

   Preloaded into the test process (LD_PRELOAD); test_storage.py arms it by ctypes in a forked child. What libc calls
   inside itself (fwrite, fprintf) does not pass through here; the tests on a small file system meet that. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITE = 1, CREATE = 2, FLUSH = 4 };

static char below[PATH_MAX];
static long first, calls, failed;
static int code, kinds, sticky;

/* From now on: the `nth` call of these kinds below `folder` fails, and all after it if `stay`. 0 only counts. */
void storage_fault_arm(const char *folder, long nth, int error, int which, int stay) {
  snprintf(below, sizeof below, "%s/", folder);
  first = nth, code = error, kinds = which, sticky = stay, calls = failed = 0;
}

long storage_fault_calls(void) { return calls; }
long storage_fault_failed(void) { return failed; }

static int hit(int kind, const char *path) {
  char absolute[PATH_MAX];
  if (!(kinds & kind) || !path) return 0;
  if (path[0] != '/') {
    if (!getcwd(absolute, sizeof absolute)) return 0;
    size_t used = strlen(absolute);
    snprintf(absolute + used, sizeof absolute - used, "/%s", path);
    path = absolute;
  }
  if (strncmp(path, below, strlen(below))) return 0;
  long number = __atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED);
  if (!first || number < first || (number > first && !sticky)) return 0;
  __atomic_add_fetch(&failed, 1, __ATOMIC_RELAXED);
  errno = code;
  return 1;
}

static int hit_fd(int kind, int fd) {
  char link[64], path[PATH_MAX];
  if (!(kinds & kind)) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return hit(kind, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define OVER_FD(kind, type, name, parameters, arguments)                                                                \
  type name parameters {                                                                                               \
    static type(*real) parameters;                                                                                     \
    if (!real) real = REAL(name);                                                                                      \
    return hit_fd(kind, fd) ? -1 : real arguments;                                                                     \
  }

OVER_FD(WRITE, ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size))
OVER_FD(WRITE, ssize_t, writev, (int fd, const struct iovec *parts, int count), (fd, parts, count))
OVER_FD(WRITE, ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
OVER_FD(WRITE, ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
OVER_FD(WRITE, ssize_t, sendfile, (int fd, int from, off_t *at, size_t size), (fd, from, at, size))
OVER_FD(WRITE, ssize_t, sendfile64, (int fd, int from, off64_t *at, size_t size), (fd, from, at, size))
OVER_FD(WRITE, int, ftruncate, (int fd, off_t size), (fd, size))
OVER_FD(WRITE, int, ftruncate64, (int fd, off64_t size), (fd, size))
OVER_FD(FLUSH, int, fsync, (int fd), (fd))
OVER_FD(FLUSH, int, fdatasync, (int fd), (fd))

#define OVER_OPEN(name)                                                                                                \
  int name(const char *path, int flags, ...) {                                                                         \
    static __typeof__(&name) real;                                                                                     \
    va_list rest;                                                                                                      \
    va_start(rest, flags);                                                                                             \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                                            \
    va_end(rest);                                                                                                      \
    if (!real) real = REAL(name);                                                                                      \
    return (flags & O_ACCMODE) != O_RDONLY && hit(CREATE, path) ? -1 : real(path, flags, mode);                        \
  }

OVER_OPEN(open)
OVER_OPEN(open64)

#define OVER_FOPEN(name)                                                                                               \
  FILE *name(const char *path, const char *mode) {                                                                     \
    static __typeof__(&name) real;                                                                                     \
    if (!real) real = REAL(name);                                                                                      \
    return strpbrk(mode, "wa+") && hit(CREATE, path) ? NULL : real(path, mode);                                        \
  }

OVER_FOPEN(fopen)
OVER_FOPEN(fopen64)

int mkdir(const char *path, mode_t mode) {
  static __typeof__(&mkdir) real;
  struct stat found;
  if (!real) real = REAL(mkdir);
  return stat(path, &found) && hit(CREATE, path) ? -1 : real(path, mode);
}

int rename(const char *from, const char *to) {
  static __typeof__(&rename) real;
  if (!real) real = REAL(rename);
  return hit(CREATE, to) ? -1 : real(from, to);
}
