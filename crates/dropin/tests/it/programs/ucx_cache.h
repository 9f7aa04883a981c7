/* UCX's own registration cache, which its transports for network cards use (libucs, Debian 12:
 * 1.13). */
#include "device.h"
#include <dlfcn.h>
#include <limits.h>
#include <ucm/api/ucm.h>
#include <ucs/memory/rcache.h>

struct region {
    ucs_rcache_region_t super;
    long slot;
};

/* The functions below use caches[chosen]. */
static ucs_rcache_t *caches[2];
static int chosen;

static ucs_status_t reg(void *context, ucs_rcache_t *cache, void *arg, ucs_rcache_region_t *super, uint16_t flags)
{
    struct region *region = (struct region *)super;
    (void)context, (void)cache, (void)arg, (void)flags;
    region->slot = device_register((void *)super->super.start, super->super.end - super->super.start);
    return region->slot < 0 ? UCS_ERR_IO_ERROR : UCS_OK;
}

static void dereg(void *context, ucs_rcache_t *cache, ucs_rcache_region_t *super)
{
    (void)context, (void)cache;
    device_deregister(((struct region *)super)->slot);
}

static void dump(void *context, ucs_rcache_t *cache, ucs_rcache_region_t *region, char *text, size_t length)
{
    (void)context, (void)cache, (void)region;
    snprintf(text, length, "-");
}

static void cache_start(void)
{
    static ucs_rcache_ops_t ops = { reg, dereg, dump };
    ucs_rcache_params_t params = { .region_struct_size = sizeof(struct region),
                                   .alignment = UCS_RCACHE_MIN_ALIGNMENT,
                                   .max_alignment = 4096,
                                   .ucm_events = UCM_EVENT_VM_UNMAPPED,
                                   .ucm_event_priority = 1000,
                                   .ops = &ops,
                                   .max_regions = ULONG_MAX,
                                   .max_size = SIZE_MAX,
                                   .max_unreleased = SIZE_MAX };
    ucs_status_t status = ucs_rcache_create(&params, "test", NULL, &caches[chosen]);
    if (status != UCS_OK) {
        fprintf(stderr, "ucs_rcache_create: %d\n", status);
        exit(2);
    }
}

static void cache_stop(void) { ucs_rcache_destroy(caches[chosen]); }
static void cache_open(void) { cache_start(); }

typedef ucs_rcache_region_t registration;

/* Returns the slot of a range's registration, which is held until cache_put; or -1. */
static long cache_hold(void *start, size_t length, registration **held)
{
    if (ucs_rcache_get(caches[chosen], start, length, PROT_READ | PROT_WRITE, NULL, held) != UCS_OK)
        return -1;
    return ((struct region *)*held)->slot;
}

static void cache_put(registration *held) { ucs_rcache_region_put(caches[chosen], held); }
