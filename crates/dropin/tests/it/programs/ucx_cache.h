/* UCX's own registration cache. From 1.14 on it is that of UCP (libucp), which this file reaches
 * through UCX's public interface. In 1.12 and 1.13 it is that of the transports for network cards
 * (libucs). The version is that of the libraries at run time. */
#include "device.h"
#include <dlfcn.h>
#include <limits.h>
#include <ucp/api/ucp.h>

static int is_ucp;
/* The functions below use the cache of this number. */
static int chosen;

/* --- 1.14 and later: a context whose only transport is "self", which caches registrations --- */

static ucp_context_h contexts[2];

/* The slot of the last registration that begins at an address, by a hash of the address, in each
 * context. A cache holds at most one registration of an address, the last one made. */
static atomic_long slots[2][1 << 16];

static atomic_long *slot_of(const void *start) { return &slots[chosen][((uintptr_t)start >> 12) % (1 << 16)]; }

/* libucp calls these functions of libuct, and finds them here. */
int8_t uct_md_mem_reg_v2(void *md, void *start, size_t length, const void *params, void **memory)
{
    long slot = device_register(start, length);
    (void)md, (void)params;
    *slot_of(start) = slot;
    *memory = (void *)(slot + 1);
    return slot < 0 ? UCS_ERR_IO_ERROR : UCS_OK;
}

/* Up to 1.15. */
int8_t uct_md_mem_dereg(void *md, void *memory)
{
    (void)md;
    device_deregister((long)memory - 1);
    return UCS_OK;
}

/* From 1.16 on. */
struct dereg_params {
    uint64_t mask;
    unsigned flags;
    void *memory;
};
int8_t uct_md_mem_dereg_v2(void *md, const struct dereg_params *params)
{
    return uct_md_mem_dereg(md, params->memory);
}

static ucs_status_t context_start(void)
{
    ucp_params_t params = { .field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_MT_WORKERS_SHARED,
                            .features = UCP_FEATURE_RMA,
                            .mt_workers_shared = 1 };
    ucp_config_t *config;
    ucs_status_t status = ucp_config_read(NULL, NULL, &config);
    if (status == UCS_OK)
        status = ucp_config_modify(config, "TLS", "self");
    if (status == UCS_OK)
        status = ucp_config_modify(config, "RCACHE_ENABLE", "y");
    if (status == UCS_OK) {
        status = ucp_init(&params, config, &contexts[chosen]);
        ucp_config_release(config);
    }
    return status;
}

/* --- 1.12 and 1.13: declared by their layout, because later headers differ --- */

struct region {
    size_t start, end, own[60]; /* at least as large as the cache's own part */
    long slot;
};

struct rcache_ops {
    int8_t (*reg)(void *, void *, void *, struct region *, uint16_t);
    void (*dereg)(void *, void *, struct region *);
    void (*dump)(void *, void *, struct region *, char *, size_t);
};

struct rcache_params {
    size_t region, alignment, max_alignment;
    int events, priority;
    const struct rcache_ops *ops;
    void *context;
    int flags;
    size_t max_regions, max_size, max_unreleased;
};

int8_t ucs_rcache_create(const struct rcache_params *, const char *, void *, void **);
int8_t ucs_rcache_get(void *, void *, size_t, int, void *, struct region **);
void ucs_rcache_region_put(void *, struct region *);
void ucs_rcache_destroy(void *);

static void *rcaches[2];

static int8_t reg(void *unused, void *cache, void *arg, struct region *region, uint16_t flags)
{
    (void)unused, (void)cache, (void)arg, (void)flags;
    region->slot = device_register((void *)region->start, region->end - region->start);
    return region->slot < 0 ? UCS_ERR_IO_ERROR : UCS_OK;
}

static void dereg(void *unused, void *cache, struct region *region)
{
    (void)unused, (void)cache;
    device_deregister(region->slot);
}

static void dump(void *unused, void *cache, struct region *region, char *text, size_t length)
{
    (void)unused, (void)cache, (void)region;
    snprintf(text, length, "-");
}

static ucs_status_t rcache_start(void)
{
    static const struct rcache_ops ops = { reg, dereg, dump };
    struct rcache_params params = { .region = sizeof(struct region),
                                    .alignment = 16,
                                    .max_alignment = 4096,
                                    .events = 1 << 17, /* memory was unmapped */
                                    .priority = 1000,
                                    .ops = &ops,
                                    .max_regions = SIZE_MAX,
                                    .max_size = SIZE_MAX,
                                    .max_unreleased = SIZE_MAX };
    return ucs_rcache_create(&params, "test", NULL, &rcaches[chosen]);
}

/* --- either --- */

static void cache_start(void)
{
    unsigned major, minor, release;
    ucp_get_version(&major, &minor, &release);
    is_ucp = minor >= 14;
    ucs_status_t status = is_ucp ? context_start() : rcache_start();
    if (status != UCS_OK) {
        fprintf(stderr, "UCX's cache: %d\n", status);
        exit(2);
    }
}

static void cache_stop(void)
{
    if (is_ucp)
        ucp_cleanup(contexts[chosen]);
    else
        ucs_rcache_destroy(rcaches[chosen]);
}

static void cache_open(void) { cache_start(); }

typedef void registration;

/* Returns the slot of a range's registration, which is held until cache_put; or -1. */
static long cache_hold(void *start, size_t length, registration **held)
{
    if (!is_ucp) {
        struct region *region;
        if (ucs_rcache_get(rcaches[chosen], start, length, PROT_READ | PROT_WRITE, NULL, &region) != UCS_OK)
            return -1;
        *held = region;
        return region->slot;
    }
    ucp_mem_map_params_t params = { .field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH,
                                    .address = start,
                                    .length = length };
    ucp_mem_h memory;
    if (ucp_mem_map(contexts[chosen], &params, &memory) != UCS_OK)
        return -1;
    *held = memory;
    return *slot_of(start);
}

static void cache_put(registration *held)
{
    if (is_ucp)
        ucp_mem_unmap(contexts[chosen], held);
    else
        ucs_rcache_region_put(rcaches[chosen], held);
}
