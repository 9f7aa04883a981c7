/* libfabric's own registration cache, which its providers for network cards use, from the
 * libfabric.a of Debian 12 (1.17) or 13 (2.1). libfabric does not export it, so this file declares
 * its structures by their layout. */
#include "device.h"
#include <dlfcn.h>
#include <pthread.h>
#include <stddef.h>
#include <rdma/fabric.h>
#include <rdma/fi_domain.h>
#include <rdma/providers/fi_prov.h>

#define IS_2 (FI_MAJOR_VERSION >= 2)

struct mr_info {
    struct iovec iov;
    enum fi_hmem_iface iface;
    uint64_t device;
#if IS_2
    uint64_t flags;
    uint64_t peer;
#endif
    void *address;
    uint8_t handle[64];
};

struct mr_entry {
    struct mr_info info;
    void *node;
    int use_cnt;
    void *list[2];
    uint64_t hmem[8]; /* as large as its largest variant */
    long slot; /* ours */
};

struct mr_cache {
    void *domain;
#if IS_2
    const void *provider;
#endif
    void *monitors[6];
    void *notify[6][2];
    size_t entry_data_size;
    void *tree[8];
    void *lru[2], *dead[2];
    pthread_mutex_t lock;
    size_t counts[IS_2 ? 10 : 8];
    void *pool;
    int (*add_region)(struct mr_cache *, struct mr_entry *);
    void (*delete_region)(struct mr_cache *, struct mr_entry *);
};

extern void *default_monitor;
int ofi_mr_cache_init(void *domain, void **monitors, struct mr_cache *cache);
void ofi_mr_cache_cleanup(struct mr_cache *cache);
int ofi_mr_cache_search(struct mr_cache *cache, struct mr_info *info, struct mr_entry **entry);
void ofi_mr_cache_delete(struct mr_cache *cache, struct mr_entry *entry);

static int add_region(struct mr_cache *cache, struct mr_entry *entry)
{
    (void)cache;
    entry->slot = device_register(entry->info.iov.iov_base, entry->info.iov.iov_len);
    return entry->slot < 0 ? -FI_ENOMEM : 0;
}

static void delete_region(struct mr_cache *cache, struct mr_entry *entry)
{
    (void)cache;
    device_deregister(entry->slot);
}

/* The functions below use caches[chosen]. */
static struct mr_cache caches[2];
static int chosen;

/* A domain. The cache uses only its provider, for the log, and a counter. */
static struct fi_provider provider = { .version = FI_VERSION(1, 0), .fi_version = FI_VERSION(1, 17), .name = "test" };
static void *domain[128];

static void cache_start(void)
{
    struct mr_cache *cache = &caches[chosen];
    void *monitors[6] = { default_monitor };
    memset(cache, 0, sizeof *cache);
    cache->entry_data_size = sizeof(struct mr_entry) - offsetof(struct mr_entry, hmem);
    cache->add_region = add_region;
    cache->delete_region = delete_region;
    int error = ofi_mr_cache_init(domain, monitors, cache);
    if (error) {
        fprintf(stderr, "ofi_mr_cache_init: %d\n", error);
        exit(2);
    }
}

static void cache_stop(void) { ofi_mr_cache_cleanup(&caches[chosen]); }

static void cache_open(void)
{
    struct fi_info *info = NULL, *hints = fi_allocinfo();
    for (size_t at = 0; at < sizeof domain / sizeof *domain; at++)
        domain[at] = &provider;
    hints->fabric_attr->prov_name = strdup("udp");
    /* Initialises libfabric. The program has it statically linked, so the drop-in cannot interpose
     * this call. */
    fi_getinfo(FI_VERSION(1, 17), NULL, NULL, 0, hints, &info);
    int (*attach)(void) = (int (*)(void))dlsym(RTLD_DEFAULT, "mmun_dropin_attach");
    if (attach && attach()) {
        fprintf(stderr, "mmun_dropin_attach refused\n");
        exit(2);
    }
    cache_start();
}

typedef struct mr_entry registration;

/* Returns the slot of a range's registration, which is held until cache_put; or -1. */
static long cache_hold(void *start, size_t length, registration **held)
{
    struct mr_info info = { .iov = { start, length } };
    return ofi_mr_cache_search(&caches[chosen], &info, held) ? -1 : (*held)->slot;
}

static void cache_put(registration *held) { ofi_mr_cache_delete(&caches[chosen], held); }
