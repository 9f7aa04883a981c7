/* Preloaded into mmun: a signal arrives just before its fork. BEFORE_FORK=kernel: SIGINT from the
 * kernel, as from a terminal. BEFORE_FORK=sent: SIGTERM from a process, to mmun alone. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
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
