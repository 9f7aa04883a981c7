/* Loads the drop-in, and then uses a cache for the first time, while five threads map, unmap and
 * fork.
 *
 * loading DROP-IN PROGRAM WORD...
 *
 * PROGRAM is a shared library with a function `main`, which is called with the WORDs. With
 * -DWITHIN, cache.c is a part of this program instead, and PROGRAM has no effect. */
#define _GNU_SOURCE
#ifdef WITHIN
#define main within
#include "cache.c"
#undef main
#endif
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BLOCK = 1 << 16, THREADS = 5 };

static atomic_int is_loaded;
static atomic_uint turns[THREADS];

static void *churn(void *own)
{
    atomic_uint *turn = own;
    while (!is_loaded) {
        char *at = mmap(NULL, BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (at == MAP_FAILED)
            abort();
        *at = 1;
        munmap(at, BLOCK);
        free(malloc(300000));
        if (++*turn % 16)
            continue;
        int status;
        pid_t child = fork();
        if (child == 0)
            _exit(0);
        if (child < 0 || waitpid(child, &status, 0) != child || status)
            abort();
    }
    return NULL;
}

static void *load(const char *file)
{
    void *library = dlopen(file, RTLD_NOW | RTLD_GLOBAL);
    if (!library) {
        fprintf(stderr, "%s\n", dlerror());
        exit(2);
    }
    return library;
}

int main(int count, char **words)
{
    pthread_t threads[THREADS];
    if (count < 4)
        return 2;
    alarm(100);
    for (int i = 0; i < THREADS; i++)
        if (pthread_create(&threads[i], NULL, churn, &turns[i]))
            return 2;
    for (int i = 0; i < THREADS; i++)
        while (turns[i] == 0)
            ;
    load(words[1]);
#ifdef WITHIN
    int result = within(count - 2, words + 2);
#else
    int (*program)(int, char **) = (int (*)(int, char **))dlsym(load(words[2]), "main");
    int result = program(count - 2, words + 2);
#endif
    is_loaded = 1;
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    return result;
}
