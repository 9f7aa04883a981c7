/* Stand-ins for the functions of libfabric and UCX that the drop-in calls. A test can hold a thread
 * inside of them while the program forks. The real functions, which cache.c tests, take locks of
 * their own, so a fork inside of them would hang for another reason. */
#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

void (*stand_in_held)(void), (*stand_in_bound)(void);

static void hold(void)
{
    if (stand_in_held)
        stand_in_held();
}

/* Later than `hold`: after a monitor was imported, in the subscription for UCX. */
static void hold_later(void)
{
    if (stand_in_bound)
        stand_in_bound();
}

struct fid {
    size_t class;
    void *context;
    void *operations;
};

static int close_it(struct fid *fid) { return (void)fid, 0; }

struct monitor {
    struct fid fid;
    void *export_operations;
    const void *import_operations;
};

static int bind_it(struct fid *fid, struct fid *other, uint64_t flags)
{
    static const struct { size_t size; void *notify; } operations = { sizeof operations, NULL };
    static int is_imported;
    (void)fid, (void)flags;
    if (is_imported)
        return -EBUSY;
    is_imported = 1;
    ((struct monitor *)other)->import_operations = &operations;
    hold_later();
    return 0;
}

int fi_open(uint32_t version, const char *name, void *attribute, size_t length, uint64_t flags, struct fid **fid,
            void *context)
{
    static struct { size_t size; int (*close)(struct fid *); int (*bind)(struct fid *, struct fid *, uint64_t); }
        operations = { sizeof operations, close_it, bind_it };
    static struct fid cache = { 0, NULL, &operations };
    (void)version, (void)name, (void)attribute, (void)length, (void)flags, (void)context;
    hold();
    *fid = &cache;
    return 0;
}

int fi_getinfo(uint32_t version, const char *node, const char *service, uint64_t flags, const void *hints, void **info)
{
    (void)version, (void)node, (void)service, (void)flags, (void)hints, (void)info;
    return 0;
}

int stand_in_gets, stand_in_made, stand_in_handlers;

signed char ucm_set_event_handler(int events, int priority, void *callback, void *argument)
{
    hold_later();
    stand_in_handlers++;
    return (void)events, (void)priority, (void)callback, (void)argument, 0;
}
void ucm_set_external_event(int events)
{
    (void)events;
    hold();
}

/* The reports to UCX, and how many of them the first thread did not make. */
int stand_in_reports, stand_in_strangers;

void ucm_vm_munmap(void *start, size_t length)
{
    (void)start, (void)length;
    __atomic_fetch_add(&stand_in_reports, 1, __ATOMIC_RELAXED);
    if (syscall(SYS_gettid) != getpid())
        __atomic_fetch_add(&stand_in_strangers, 1, __ATOMIC_RELAXED);
}

/* The version is that of the environment: a minor number. */
void ucp_get_version(unsigned *major, unsigned *minor, unsigned *release)
{
    const char *set = getenv("STAND_IN_UCX");
    *major = 1;
    *minor = set ? (unsigned)atoi(set) : 13;
    *release = 0;
}

signed char ucs_rcache_create(const void *params, const char *name, void *parent, void **cache)
{
    static char whole[264];
    (void)params, (void)name, (void)parent;
    *cache = whole;
    stand_in_made++;
    return 0;
}
void ucs_rcache_destroy(void *cache)
{
    (void)cache;
    stand_in_made--;
}
void *ucs_pgtable_lookup(const void *table, unsigned long address)
{
    (void)address;
    return (void *)table;
}
signed char ucs_rcache_get(long a, long b, long c, long d, long e, long f, long g)
{
    stand_in_gets++;
    return (void)a, (void)b, (void)c, (void)d, (void)e, (void)f, (void)g, 0;
}
