/* The first use of a library while other threads are in the middle of something.
 *
 * first_use inside LIBRARY FILE   forks while a thread is inside of the first use; the child has one
 *                                 of its own
 * first_use bound LIBRARY FILE    the same, later in the first use: libfabric has the monitor already
 * first_use loader LIBRARY FILE   forks while a thread holds the lock on the loader's list
 * first_use served LIBRARY FILE   the same, after a first use in the parent
 * first_use constructor LIBRARY FILE PLUGIN
 *                                 a first use in a thread, and one in the constructor of PLUGIN
 *
 * LIBRARY is "ucx" or "libfabric", FILE the stand-in for it. Prints "done", or is ended by SIGALRM.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *library;
static int held[2], go_on[2];

/* Exported: the plugin's constructor calls it. */
void first_use(void)
{
    void *preloaded = dlsym(RTLD_DEFAULT, strcmp(library, "ucx") ? "fi_getinfo" : "ucm_set_event_handler");
    if (!preloaded)
        abort();
    if (strcmp(library, "ucx")) {
        void *info;
        ((int (*)(unsigned, const char *, const char *, unsigned long, const void *, void **))preloaded)(0x1000d, NULL, NULL,
                                                                                                  0, NULL, &info);
        if (((int (*)(void))dlsym(RTLD_DEFAULT, "mmun_dropin_attach"))())
            _exit(3);
    } else {
        ((signed char (*)(int, int, void *, void *))preloaded)(1 << 17, 0, NULL, NULL);
    }
}

/* Reports that this thread is inside, and waits. */
static void hold(void)
{
    char byte = 0;
    if (write(held[1], &byte, 1) != 1 || read(go_on[0], &byte, 1) != 1)
        abort();
}

static void *use(void *unused)
{
    first_use();
    return unused;
}

static int in_list(struct dl_phdr_info *info, size_t size, void *data)
{
    (void)info, (void)size, (void)data;
    hold();
    return 1;
}

static void *look_at_list(void *unused)
{
    dl_iterate_phdr(in_list, NULL);
    return unused;
}

static void *load(void *plugin)
{
    if (!dlopen(plugin, RTLD_NOW))
        abort();
    return NULL;
}

int main(int count, char **words)
{
    char byte = 0;
    pthread_t thread, second;
    if (count < 4 || pipe(held) || pipe(go_on))
        return 2;
    library = words[2];
    void *file = dlopen(words[3], RTLD_NOW | RTLD_LOCAL);
    if (!file) {
        fprintf(stderr, "%s\n", dlerror());
        return 2;
    }
    int is_bound = !strcmp(words[1], "bound"), is_inside = is_bound || !strcmp(words[1], "inside");
    void (**hook)(void) = (void (**)(void))dlsym(file, is_bound ? "stand_in_bound" : "stand_in_held");
    alarm(60);
    if (!strcmp(words[1], "constructor")) {
        pthread_create(&thread, NULL, use, NULL);
        pthread_create(&second, NULL, load, words[4]);
        pthread_join(thread, NULL);
        pthread_join(second, NULL);
        puts("done");
        return 0;
    }
    if (!strcmp(words[1], "served"))
        first_use();
    if (is_inside)
        *hook = hold;
    pthread_create(&thread, NULL, is_inside ? use : look_at_list, NULL);
    if (read(held[0], &byte, 1) != 1)
        return 2;
    *hook = NULL;
    pid_t child = fork();
    if (child == 0) {
        alarm(20);
        first_use();
        _exit(0);
    }
    int status;
    waitpid(child, &status, 0);
    if (write(go_on[1], &byte, 1) != 1 || status) {
        fprintf(stderr, "the child: status %#x\n", status);
        return 1;
    }
    pthread_join(thread, NULL);
    puts("done");
    return 0;
}
