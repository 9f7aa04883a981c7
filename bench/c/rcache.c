/* The registration cache of UCX, with registrations that do nothing, for the comparison. */
#include <string.h>
#include <ucs/memory/rcache.h>

static ucs_status_t reg(void *context, ucs_rcache_t *rcache, void *arg, ucs_rcache_region_t *region, uint16_t flags)
{
    return UCS_OK;
}

static void dereg(void *context, ucs_rcache_t *rcache, ucs_rcache_region_t *region)
{
}

static void dump(void *context, ucs_rcache_t *rcache, ucs_rcache_region_t *region, char *buf, size_t max)
{
    buf[0] = 0;
}

void *rcache_new(void)
{
    static const ucs_rcache_ops_t ops = { .mem_reg = reg, .mem_dereg = dereg, .dump_region = dump };
    ucs_rcache_params_t params;
    ucs_rcache_t *rcache;

    memset(&params, 0, sizeof params);
    params.region_struct_size = sizeof(ucs_rcache_region_t);
    params.alignment = UCS_RCACHE_MIN_ALIGNMENT;
    params.max_alignment = 4096;
    params.ops = &ops;
    params.max_regions = (unsigned long)-1;
    params.max_size = (size_t)-1;
    params.max_unreleased = (size_t)-1;
    return ucs_rcache_create(&params, "bench", NULL, &rcache) == UCS_OK ? rcache : NULL;
}

int rcache_hit(void *rcache, void *address, size_t length)
{
    ucs_rcache_region_t *region;

    if (ucs_rcache_get(rcache, address, length, 3, NULL, &region) != UCS_OK)
        return 0;
    ucs_rcache_region_put(rcache, region);
    return 1;
}

void rcache_free(void *rcache)
{
    ucs_rcache_destroy(rcache);
}
