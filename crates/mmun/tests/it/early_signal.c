/* Preloaded into mmun: a signal arrives before there is a program. BEFORE_FORK=kernel: SIGINT from
 * the kernel, as from a terminal, just before the fork. BEFORE_FORK=sent: SIGTERM from a process,
 * to mmun alone. IN_MKDIR: the same SIGTERM while mmun makes a directory, which then fails. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

pid_t fork(void)
{
    pid_t (*real)(void) = (pid_t(*)(void))dlsym(RTLD_NEXT, "fork");
    const char *which = getenv("BEFORE_FORK");
    int ends[2];
    if (which && *which == 'k') {
        if (pipe(ends) || fcntl(ends[0], F_SETOWN, getpid()) || fcntl(ends[0], F_SETSIG, SIGINT) ||
            fcntl(ends[0], F_SETFL, O_ASYNC) || write(ends[1], "", 1) != 1)
            abort();
        close(ends[0]);
        close(ends[1]);
    } else if (which) {
        kill(getpid(), SIGTERM);
    }
    unsetenv("BEFORE_FORK");
    return real();
}

int mkdir(const char *path, mode_t mode)
{
    int (*real)(const char *, mode_t) = (int (*)(const char *, mode_t))dlsym(RTLD_NEXT, "mkdir");
    if (!getenv("IN_MKDIR"))
        return real(path, mode);
    kill(getpid(), SIGTERM);
    errno = EACCES;
    return -1;
}
