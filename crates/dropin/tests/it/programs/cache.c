/* A real registration cache: tests which registrations become stale, what it costs, and whether it
 * survives.
 *
 * cache stale            each operation changes a registered page; prints "OPERATION right|stale",
 *                        then "N stale of M"
 * cache patcher ORDER [2]
 *                        the same with Open MPI's memory patcher, loaded "first" or "last", for all
 *                        operations or each second one: "OPERATION right|stale told|-"; "told"
 *                        means that Open MPI's own hook was called
 * cache speed [2] prints nanoseconds, one "NAME NS" a line, the minimum of many bursts; with 2,
 *                        a second thread sleeps meanwhile
 * cache threads SECONDS  five threads map, register, look up and unmap: "N rounds"
 * cache cycles N         N starts and stops of the cache while five threads map and unmap
 * cache again N          N times maps, registers, looks up, unmaps, at one address: prints how many
 *                        look-ups found the registration
 * cache close            closes all descriptors but the standard ones and the device's, then does
 *                        what `stale` does, in this process
 * cache forks N          N forks while five threads register, look up and unmap
 * cache children N       the same, and each child looks up: prints how many children hang
 * cache middle           a fork, then close_range, while five threads map and unmap
 * cache inherited, domains
 *                        registrations of several buffers, or in two caches, then a fork: the child
 *                        must find none of them
 * cache during           a registration while another thread is inside of madvise: "right|stale"
 * cache under N          N registrations while the kernel removes the pages for another thread, which
 *                        has made the call by an instruction: "right|stale"
 * cache fork             a registration, then a fork: the child has to register anew; both continue
 */
#define _GNU_SOURCE
#ifdef WITH_UCX
#include "ucx_cache.h"
#else
#include "libfabric_cache.h"
#endif
#include <linux/falloc.h>
#include <linux/userfaultfd.h>
#include <fcntl.h>
#include <malloc.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <time.h>

#ifdef __aarch64__
/* A kernel there has pages of 4, 16 or 64 KiB. */
enum { PAGE = 65536, LENGTH = 16 * PAGE };
#else
enum { PAGE = 4096, LENGTH = 16 * PAGE };
#endif

/* Looks a range up without a transfer. Returns its slot, which may be free again by then, or -1. */
static long cache_get(void *start, size_t length)
{
    registration *held;
    long slot = cache_hold(start, length, &held);
    if (slot >= 0)
        cache_put(held);
    return slot;
}

static char *map(void)
{
    char *at = mmap(NULL, LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED)
        device_die("mmap");
    memset(at, 1, LENGTH);
    return at;
}

static int file;

static char *map_file(void)
{
    file = memfd_create("buffer", 0);
    if (file < 0 || ftruncate(file, LENGTH))
        device_die("memfd");
    char *at = mmap(NULL, LENGTH, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (at == MAP_FAILED)
        device_die("mmap");
    memset(at, 1, LENGTH);
    return at;
}

static char *large(void)
{
    char *at = malloc(1 << 25);
    memset(at, 1, 1 << 25);
    return at + (-(uintptr_t)at & (PAGE - 1)) + PAGE;
}

static void *whole;
static char *large_to_free(void)
{
    whole = malloc(1 << 25);
    memset(whole, 1, 1 << 25);
    return (char *)whole + (-(uintptr_t)whole & (PAGE - 1)) + PAGE;
}

static void raw(long number, long a, long b, long c)
{
#ifdef __aarch64__
    register long x8 __asm__("x8") = number;
    register long x0 __asm__("x0") = a;
    register long x1 __asm__("x1") = b;
    register long x2 __asm__("x2") = c;
    __asm__ volatile("svc #0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2) : "memory");
#else
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
#endif
}

static void by_child(void (*act)(char *), char *at)
{
    pid_t child = fork();
    if (child == 0) {
        act(at);
        _exit(0);
    }
    waitpid(child, NULL, 0);
}

static void unmap(char *at) { munmap(at, LENGTH); }
static void unmap_raw(char *at) { raw(SYS_munmap, (long)at, LENGTH, 0); }
static void unmap_by_number(char *at) { syscall(SYS_munmap, at, LENGTH); }
static void map_over(char *at)
{
    mmap(at, LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
}
static void move(char *at) { mremap(at, LENGTH, LENGTH, MREMAP_MAYMOVE | MREMAP_FIXED, map()); }
static void move_over(char *at) { mremap(map(), LENGTH, LENGTH, MREMAP_MAYMOVE | MREMAP_FIXED, at); }
static void shrink(char *at) { mremap(at, LENGTH, PAGE, 0); }
static void discard(char *at) { madvise(at, LENGTH, MADV_DONTNEED); }
static void discard_raw(char *at) { raw(SYS_madvise, (long)at, LENGTH, MADV_DONTNEED); }
static void discard_by_number(char *at) { syscall(SYS_madvise, at, LENGTH, MADV_DONTNEED); }
static void discard_locked(char *at) { madvise(at, LENGTH, 24 /* DONTNEED_LOCKED */); }
static void remove_pages(char *at) { madvise(at, LENGTH, MADV_REMOVE); }
static void truncate_file(char *at)
{
    (void)at;
    if (ftruncate(file, 0) || ftruncate(file, LENGTH))
        device_die("ftruncate");
}
static void punch(char *at)
{
    (void)at;
    fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, LENGTH);
}
static void truncate_by_child(char *at) { by_child(truncate_file, at); }
static void punch_by_child(char *at) { by_child(punch, at); }
static void release(char *at)
{
    (void)at;
    free(whole);
}

static const struct {
    const char *name;
    char *(*make)(void);
    void (*change)(char *);
} operations[] = {
    { "munmap", map, unmap },
    { "munmap by instruction", map, unmap_raw },
    { "munmap by syscall(2)", map, unmap_by_number },
    { "mmap over it", map, map_over },
    { "mremap away", map, move },
    { "mremap over it", map, move_over },
    { "mremap to a page", map, shrink },
    { "DONTNEED", map, discard },
    { "DONTNEED in the heap", large, discard },
    { "DONTNEED by instruction", map, discard_raw },
    { "DONTNEED_LOCKED", map, discard_locked },
    { "REMOVE", map_file, remove_pages },
    { "ftruncate", map_file, truncate_file },
    { "PUNCH_HOLE", map_file, punch },
    { "ftruncate in another process", map_file, truncate_by_child },
    { "PUNCH_HOLE in another process", map_file, punch_by_child },
    { "free", large_to_free, release },
};

static void *hooked;
static int was_told;

/* Open MPI calls this hook for a range that is released. */
static void released(void *start, size_t length, void *data, _Bool from_allocator)
{
    (void)data, (void)from_allocator;
    was_told |= (char *)start <= (char *)hooked && (char *)hooked < (char *)start + length;
}

/* Open MPI's transports do this if they use a registration cache: its component "patcher" then
 * overwrites the beginnings of libc's functions. */
static void open_mpi(void)
{
    int count = 0;
    char **words = NULL;
    void *library = dlopen("libopen-pal.so.40", RTLD_NOW | RTLD_GLOBAL);
    if (!library) {
        fprintf(stderr, "%s\n", dlerror());
        exit(3);
    }
    int (*init)(int *, char ***) = (int (*)(int *, char ***))dlsym(library, "opal_init");
    int (*open)(void *, int) = (int (*)(void *, int))dlsym(library, "mca_base_framework_open");
    int (*hook)(void (*)(void *, size_t, void *, _Bool), void *) =
        (int (*)(void (*)(void *, size_t, void *, _Bool), void *))dlsym(library, "opal_mem_hooks_register_release");
    void *memory = dlsym(library, "opal_memory_base_framework");
    if (!init || !open || !hook || !memory || init(&count, &words) || open(memory, 0) || hook(released, NULL)) {
        fprintf(stderr, "Open MPI has no memory hooks\n");
        exit(3);
    }
}

/* Returns whether a transfer through the cache misses the page. */
static int misses(char *page)
{
    char bytes[DEVICE_BYTES];
    /* A transfer holds its registration. Without the hold, a change that is reported late
     * would deregister the registration during the transfer. */
    registration *held;
    memset(page, 0, DEVICE_BYTES);
    long slot = cache_hold(page, PAGE, &held);
    if (slot < 0)
        return 0;
    int error = device_write(slot, page);
    cache_put(held);
    if (error)
        return 1;
    memset(bytes, 0x5a, sizeof bytes);
    return memcmp(page, bytes, sizeof bytes) != 0;
}

static int is_stale(char *(*make)(void), void (*change)(char *))
{
    char *at = make();
    char *page = at + 2 * PAGE;
    long slot = -2;
    for (int tries = 0; tries < 8; tries++) {
        long now = cache_get(page, PAGE);
        if (now >= 0 && now == slot)
            break;
        slot = now;
    }
    if (cache_get(page, PAGE) != slot || slot < 0) {
        fprintf(stderr, "the cache does not find what it has registered: %ld\n", slot);
        exit(2);
    }
    hooked = page;
    was_told = 0;
    change(at);
    mmap(page, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    return misses(page);
}

/* The exit status of a child of `stale`: this, plus a bit for stale and one for told. */
enum { RAN = 4 };

static int stale(const char *patcher, int step)
{
    int count = 0, all = (int)(sizeof operations / sizeof *operations);
    for (int i = 0; i < all; i += step) {
        fflush(stdout);
        pid_t child = fork();
        if (child == 0) {
            /* A program of Open MPI loads Open MPI's libraries at its start. */
            if (*patcher)
                dlopen("libopen-pal.so.40", RTLD_NOW | RTLD_GLOBAL);
            if (!strcmp(patcher, "first"))
                open_mpi();
            device_open();
            cache_open();
            if (!strcmp(patcher, "last"))
                open_mpi();
            int result = is_stale(operations[i].make, operations[i].change);
            _exit(RAN | result | was_told << 1);
        }
        int status;
        waitpid(child, &status, 0);
        if (!WIFEXITED(status) || !(WEXITSTATUS(status) & RAN)) {
            fprintf(stderr, "%s: status %#x\n", operations[i].name, status);
            return 2;
        }
        int result = WEXITSTATUS(status) & 1;
        count += result;
        printf("%-32s%s", operations[i].name, result ? "stale" : "right");
        puts(*patcher ? WEXITSTATUS(status) & 2 ? " told" : " -" : "");
    }
    printf("%d stale of %d\n", count, (all + step - 1) / step);
    return 0;
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e9 + (double)time.tv_nsec;
}

/* The minimum of many short bursts, which excludes the time of other programs. */
static void least(const char *name, int bursts, double (*measure)(void))
{
    double best = 1e18;
    for (int i = 0; i < bursts; i++) {
        double time = measure();
        best = time < best ? time : best;
    }
    printf("%s %.1f\n", name, best);
}

static char *regions[1000];
static int used;

static double hit(void)
{
    enum { ROUNDS = 1000 };
    double begin = now();
    for (int i = 0; i < ROUNDS; i++)
        if (cache_get(regions[i % used], PAGE) < 0)
            exit(2);
    return (now() - begin) / ROUNDS;
}

static double cycle(void)
{
    enum { ROUNDS = 20 };
    double begin = now();
    for (int i = 0; i < ROUNDS; i++) {
        char *at = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        *at = 1;
        cache_get(at, PAGE);
        cache_get(at, PAGE);
        munmap(at, PAGE);
    }
    return (now() - begin) / ROUNDS;
}

static double unmapping(void)
{
    enum { ROUNDS = 20 };
    double spent = 0;
    for (int i = 0; i < ROUNDS; i++) {
        char *at = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        *at = 1;
        double begin = now();
        munmap(at, PAGE);
        spent += now() - begin;
    }
    return spent / ROUNDS;
}

static void *sleep_on(void *unused)
{
    pause();
    return unused;
}

static int speed(int threads)
{
    pthread_t second;
    if (threads > 1 && pthread_create(&second, NULL, sleep_on, NULL))
        device_die("pthread_create");
    device.is_off = 1;
    double begin = now();
    cache_open();
    printf("first_use %.0f\n", now() - begin);
    least("munmap", 500, unmapping);
    for (used = 1; used <= 1000; used *= 1000) {
        for (int i = 0; i < used; i++) {
            regions[i] = map();
            cache_get(regions[i], PAGE);
        }
        least(used == 1 ? "hit_1" : "hit_1000", 2000, hit);
    }
    least("cycle", 500, cycle);
    return 0;
}

static atomic_int is_over;
static atomic_ulong rounds;

static void *register_and_unmap(void *unused)
{
    (void)unused;
    while (!is_over) {
        char *at = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        *at = 1;
        cache_get(at, PAGE);
        cache_get(at, PAGE);
        munmap(at, PAGE);
        rounds++;
    }
    return NULL;
}

static void *map_and_unmap(void *unused)
{
    (void)unused;
    while (!is_over) {
        char *at = map();
        munmap(at, LENGTH);
        free(malloc(300000));
        rounds++;
    }
    return NULL;
}

static void five(void *(*work)(void *), pthread_t *threads)
{
    for (int i = 0; i < 5; i++)
        if (pthread_create(&threads[i], NULL, work, NULL))
            device_die("pthread_create");
}

static void join(pthread_t *threads)
{
    is_over = 1;
    for (int i = 0; i < 5; i++)
        pthread_join(threads[i], NULL);
}

static int throughput(double seconds)
{
    pthread_t threads[5];
    device.is_off = 1;
    cache_open();
    double end = now() + seconds * 1e9;
    five(register_and_unmap, threads);
    while (now() < end)
        usleep(1000);
    join(threads);
    printf("%lu rounds\n", rounds);
    return 0;
}

static int cycles(int count)
{
    pthread_t threads[5];
    device.is_off = 1;
    five(map_and_unmap, threads);
    cache_open();
    for (int i = 0; i < count; i++) {
        char *at = map();
        cache_get(at, LENGTH);
        munmap(at, LENGTH);
        cache_stop();
        unsigned long before = rounds;
        while (rounds - before < 3)
            ;
        cache_start();
    }
    join(threads);
    printf("%d cycles\n", count);
    return 0;
}

/* Closes all descriptors but the standard ones and the device's. */
static void close_all(void)
{
    /* The ring's own descriptors stay, as those of a network card would. */
    unsigned low = (unsigned)(device.ring < device.source ? device.ring : device.source);
    unsigned high = (unsigned)(device.ring < device.source ? device.source : device.ring);
    syscall(SYS_close_range, 3, low - 1, 0);
    if (high - low > 1)
        syscall(SYS_close_range, low + 1, high - 1, 0);
    syscall(SYS_close_range, high + 1, ~0U, 0);
}

static int after_close(void)
{
    device_open();
    cache_open();
    close_all();
    int count = 0;
    for (size_t i = 0; i < sizeof operations / sizeof *operations; i++)
        count += is_stale(operations[i].make, operations[i].change);
    printf("%d stale of %d\n", count, (int)(sizeof operations / sizeof *operations));
    return 0;
}

static int again(int count)
{
    int found = 0;
    device.is_off = 1;
    cache_open();
    char *at = map();
    for (int i = 0; i < count; i++) {
        long slot = cache_get(at, LENGTH);
        found += slot >= 0 && cache_get(at, LENGTH) == slot;
        munmap(at, LENGTH);
        if (mmap(at, LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != at)
            device_die("mmap");
        *at = 1;
    }
    printf("%d found\n", found);
    return 0;
}

static void *discard_it(void *at)
{
    discard(at);
    return NULL;
}

/* The kernel tells a userfaultfd of a discard before the discard, and waits until the message is
 * read. */
static int during(void)
{
    pthread_t thread;
    struct uffd_msg message;
    device_open();
    cache_open();
    char *at = map();
    int faults = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_EVENT_REMOVE };
    struct uffdio_register range = { .range = { (uintptr_t)at, LENGTH }, .mode = UFFDIO_REGISTER_MODE_MISSING };
    struct pollfd waits = { faults, POLLIN, 0 };
    if (faults < 0 || ioctl(faults, UFFDIO_API, &api) || ioctl(faults, UFFDIO_REGISTER, &range))
        device_die("userfaultfd");
    if (pthread_create(&thread, NULL, discard_it, at) || poll(&waits, 1, -1) != 1)
        device_die("the second thread");
    if (cache_get(at, PAGE) < 0 || read(faults, &message, sizeof message) != sizeof message)
        device_die("the registration");
    pthread_join(thread, NULL);
    if (ioctl(faults, UFFDIO_UNREGISTER, &range.range))
        device_die("UFFDIO_UNREGISTER");
    puts(misses(at) ? "stale" : "right");
    return 0;
}

enum { LARGE = 1 << 29 };

static int is_there(char *page)
{
    unsigned char there[PAGE / 4096]; /* the kernel's pages can be smaller than PAGE */
    if (mincore(page, PAGE, there))
        device_die("mincore");
    return there[0] & 1;
}

static void *discard_all(void *at)
{
    raw(SYS_madvise, (long)at, LARGE, MADV_DONTNEED);
    return NULL;
}

/* The kernel removes the pages of a range in the order of their addresses. */
static int under(int count)
{
    device_open();
    cache_open();
    for (int tries = 0, hits = 0; hits < count; tries++) {
        pthread_t thread;
        char *at = mmap(NULL, LARGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (at == MAP_FAILED || madvise(at, LARGE, MADV_NOHUGEPAGE))
            device_die("mmap");
        for (char *page = at; page < at + LARGE; page += PAGE)
            *page = 1;
        char *last = at + LARGE - PAGE;
        if (pthread_create(&thread, NULL, discard_all, at))
            device_die("pthread_create");
        while (is_there(at))
            ;
        hits += is_there(last);
        if (cache_get(last, PAGE) < 0)
            device_die("the registration");
        pthread_join(thread, NULL);
        int is_stale = misses(last);
        munmap(at, LARGE);
        if (is_stale) {
            puts("stale");
            return 0;
        }
        if (tries == 100) {
            fprintf(stderr, "only %d registrations came during a change\n", hits);
            return 2;
        }
    }
    puts("right");
    return 0;
}

static int forked(void)
{
    device_open();
    cache_open();
    char *at = map();
    cache_get(at, LENGTH);
    long before = cache_get(at, LENGTH);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        /* The child's memory is a copy: the parent's registrations are of other pages. */
        memset(at, 2, LENGTH);
        long slot = cache_get(at, LENGTH);
        printf("child %s\n", slot >= 0 && slot == before ? "stale" : "right");
        munmap(at, LENGTH);
        fflush(stdout);
        _exit(0);
    }
    int status;
    waitpid(child, &status, 0);
    printf("parent %s\n", is_stale(map, unmap_by_number) ? "stale" : "right");
    return status != 0;
}

/* The child registers one of the parent's buffers anew, and looks the others up afterwards. */
static int inherited(void)
{
    char *at[3];
    long before[3];
    device.is_off = 1;
    cache_open();
    for (int i = 0; i < 3; i++) {
        at[i] = map();
        cache_get(at[i], LENGTH);
        before[i] = cache_get(at[i], LENGTH);
    }
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        for (int i = 0; i < 3; i++) {
            long slot = cache_get(at[i], LENGTH);
            printf("child %s\n", slot >= 0 && slot == before[i] ? "stale" : "right");
        }
        fflush(stdout);
        _exit(0);
    }
    int status;
    waitpid(child, &status, 0);
    return status != 0;
}

/* Two caches have registered one buffer. The child registers it anew in the first one, and then
 * asks the second one. */
static int domains(void)
{
    long before[2];
    device.is_off = 1;
    cache_open();
    chosen = 1;
    cache_start();
    char *at = map();
    for (chosen = 0; chosen < 2; chosen++) {
        cache_get(at, LENGTH);
        before[chosen] = cache_get(at, LENGTH);
    }
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        for (chosen = 0; chosen < 2; chosen++)
            printf("child %s\n", cache_get(at, LENGTH) == before[chosen] ? "stale" : "right");
        /* The child's own registrations are found later. */
        for (chosen = 0; chosen < 2; chosen++)
            for (long slot = -1, last = -2; slot != last; last = slot, slot = cache_get(at, LENGTH))
                usleep(100);
        puts("child found");
        fflush(stdout);
        _exit(0);
    }
    int status;
    waitpid(child, &status, 0);
    return status != 0;
}

/* Forks while five threads register, look up and unmap. The children make no look-up, because a
 * thread may have held the cache's lock at the fork. */
static int forks(int count)
{
    pthread_t threads[5];
    device.is_off = 1;
    cache_open();
    char *at = map();
    cache_get(at, LENGTH);
    five(register_and_unmap, threads);
    for (int i = 0; i < count; i++) {
        int status;
        pid_t child = fork();
        if (child == 0)
            _exit(0);
        if (waitpid(child, &status, 0) != child || status)
            return 1;
    }
    join(threads);
    puts("all ended");
    return 0;
}

/* Returns whether a child ends within 20 seconds; ends it otherwise. */
static int ends(pid_t child)
{
    int status;
    for (double end = now() + 20e9; now() < end; usleep(200))
        if (waitpid(child, &status, WNOHANG) == child)
            return status == 0;
    fprintf(stderr, "child %d hangs\n", child);
    if (getenv("KEEP"))
        pause();
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
    return 0;
}

static int children(int count)
{
    pthread_t threads[5];
    int hung = 0;
    device.is_off = 1;
    cache_open();
    char *at = map();
    cache_get(at, LENGTH);
    five(register_and_unmap, threads);
    for (int i = 0; i < count; i++) {
        pid_t child = fork();
        if (child == 0)
            _exit(cache_get(at, LENGTH) < 0);
        hung += !ends(child);
    }
    join(threads);
    printf("%d hung\n", hung);
    return 0;
}

static int middle(void)
{
    pthread_t threads[5];
    device_open();
    device.is_off = 1;
    five(map_and_unmap, threads);
    cache_open();
    char *at = map();
    cache_get(at, LENGTH);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        /* The child makes no look-up: another thread may have held the cache's lock at the fork. */
        munmap(at, LENGTH);
        at = map();
        free(malloc(300000));
        _exit(at[LENGTH - 1] != 1);
    }
    int status;
    waitpid(child, &status, 0);
    printf("child %s\n", status == 0 ? "right" : "wrong");
    close_all();
    for (int i = 0; i < 200; i++) {
        at = map();
        if (cache_get(at, LENGTH) < 0)
            return 1;
        munmap(at, LENGTH);
    }
    join(threads);
    puts("parent right");
    return status != 0;
}

int main(int count, char **words)
{
    const char *what = count > 1 ? words[1] : "";
    const char *number = count > 2 ? words[2] : "1";
    if (!strcmp(what, "stale"))
        return stale("", 1);
    if (!strcmp(what, "patcher"))
        return stale(number, count > 3 ? atoi(words[3]) : 1);
    if (!strcmp(what, "middle"))
        return middle();
    if (!strcmp(what, "forks"))
        return forks(atoi(number));
    if (!strcmp(what, "children"))
        return children(atoi(number));
    if (!strcmp(what, "speed"))
        return speed(atoi(number));
    if (!strcmp(what, "threads"))
        return throughput(atof(number));
    if (!strcmp(what, "cycles"))
        return cycles(atoi(number));
    if (!strcmp(what, "again"))
        return again(atoi(number));
    if (!strcmp(what, "close"))
        return after_close();
    if (!strcmp(what, "during"))
        return during();
    if (!strcmp(what, "under"))
        return under(atoi(number));
    if (!strcmp(what, "fork"))
        return forked();
    if (!strcmp(what, "inherited"))
        return inherited();
    if (!strcmp(what, "domains"))
        return domains();
    fprintf(stderr, "cache stale|patcher first|last|speed|middle|forks N|children N|threads SECONDS|cycles N|again N|close|during|under N|fork|inherited|domains\n");
    return 2;
}
