/* One use of a library, and how the process ends.
 *
 * once LIBRARY FILE [HOW]...
 *
 * LIBRARY is "ucx" or "libfabric", FILE the stand-in for it. Prints "done". Each HOW is one of:
 *   mdwe    before the use, refuses code that is written to: the hook source cannot run then
 *   small   before the use, allows files of 10 bytes only
 *   gone    before the use, makes standard error a pipe without a reader
 *   past    the use does not go through the preloaded library
 *   unused  there is no use
 *   exec    after the use, executes this program in its own place, without a further word
 *   fork    after the use, forks a child that lowers its limit of open files and calls _exit(7)
 *   serve   the child of "fork" looks a region up before that
 *   late    after the use, changes memory, and looks up in a cache's page table. Prints
 *           "REPORTS by STRANGERS, WORD after REPORTS, WORD": the reports to UCX before the
 *           look-ups, those that another thread made, and the results of two look-ups
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef PR_SET_MDWE
#define PR_SET_MDWE 65
#endif

static char **how;

static int has(const char *word)
{
    for (char **at = how; *at; at++)
        if (!strcmp(*at, word))
            return 1;
    return 0;
}

static void *function(void *file, const char *name)
{
    void *found = dlsym(has("past") ? file : RTLD_DEFAULT, name);
    if (!found)
        abort();
    return found;
}

static void use(int is_ucx, void *file)
{
    void *info;
    if (is_ucx)
        ((signed char (*)(int, int, void *, void *))function(file, "ucm_set_event_handler"))(1 << 17, 0, NULL, NULL);
    else
        ((int (*)(unsigned, const char *, const char *, unsigned long, const void *, void **))function(
            file, "fi_getinfo"))(0x1000d, NULL, NULL, 0, NULL, &info);
}

static void look_up(void *file)
{
    ((signed char (*)(long, long, long, long, long, long, long))function(file, "ucs_rcache_get"))(0, 0, 0, 0, 0, 0, 0);
}

static void late(void *file)
{
    void *cache;
    ((signed char (*)(const void *, const char *, void *, void **))function(file, "ucs_rcache_create"))(
        NULL, "test", NULL, &cache);
    void *(*find)(const void *, unsigned long) =
        (void *(*)(const void *, unsigned long))function(file, "ucs_pgtable_lookup");
    const void *table = (char *)cache + 72;
    find(table, 0);
    int *reports = function(file, "stand_in_reports"), *strangers = function(file, "stand_in_strangers");
    int before = __atomic_load_n(reports, __ATOMIC_RELAXED);
    /* The source's own thread takes some of these changes in. From 1.17 on it also reports them. */
    const char *minor = getenv("STAND_IN_UCX");
    int is_told = minor && atoi(minor) >= 17;
    for (int round = 0; is_told ? __atomic_load_n(reports, __ATOMIC_RELAXED) == before : round < 100; round++) {
        char *at = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        *at = 1;
        munmap(at, 65536);
        usleep(1000);
    }
    printf("%d by %d, ", __atomic_load_n(reports, __ATOMIC_RELAXED) - before,
           __atomic_load_n(strangers, __ATOMIC_RELAXED));
    const char *first = find(table, 0) ? "found" : "null";
    int more = __atomic_load_n(reports, __ATOMIC_RELAXED) > before;
    printf("%s after %s, %s\n", first, more ? "reports" : "none", find(table, 0) ? "found" : "null");
}

int main(int count, char **words)
{
    if (count < 3)
        return 2;
    how = words + 3;
    int is_ucx = !strcmp(words[1], "ucx");
    void *file = dlopen(words[2], RTLD_NOW | RTLD_GLOBAL);
    if (!file) {
        fprintf(stderr, "%s\n", dlerror());
        return 2;
    }
    signal(SIGXFSZ, SIG_DFL);
    signal(SIGPIPE, SIG_DFL);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    if (has("mdwe") && prctl(PR_SET_MDWE, 1, 0, 0, 0)) {
        puts("no mdwe");
        return 0;
    }
    struct rlimit little = { 10, 10 };
    if (has("small") && setrlimit(RLIMIT_FSIZE, &little))
        return 2;
    int ends[2];
    if (has("gone") && (pipe(ends) || close(ends[0]) || dup2(ends[1], 2) != 2))
        return 2;
    if (!has("unused"))
        use(is_ucx, file);
    if (has("exec")) {
        words[3] = NULL;
        execv("/proc/self/exe", words);
        return 2;
    }
    if (has("fork")) {
        if (is_ucx)
            look_up(file);
        pid_t child = fork();
        if (child == 0) {
            struct rlimit few = { 0, 0 };
            setrlimit(RLIMIT_NOFILE, &few);
            if (has("serve"))
                look_up(file);
            _exit(7);
        }
        int status = 0;
        waitpid(child, &status, 0);
        printf("child %d\n", WIFEXITED(status) ? WEXITSTATUS(status) : -1);
    }
    if (has("late"))
        late(file);
    puts("done");
    return 0;
}
