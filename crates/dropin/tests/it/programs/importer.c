/* A program that imports a memory monitor of its own: "first", before its first use of libfabric,
 * or "second", after that. Prints "imported" or "busy", and opens a domain. */
#include <errno.h>
#include <rdma/fabric.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_ext.h>
#include <stdio.h>
#include <string.h>

static int start(struct fid_mem_monitor *monitor) { return (void)monitor, 0; }
static void stop(struct fid_mem_monitor *monitor) { (void)monitor; }
static int subscribe(struct fid_mem_monitor *monitor, const void *at, size_t length)
{
    return (void)monitor, (void)at, (void)length, 0;
}
static void unsubscribe(struct fid_mem_monitor *monitor, const void *at, size_t length)
{
    (void)monitor, (void)at, (void)length;
}
static bool valid(struct fid_mem_monitor *monitor, const void *at, size_t length)
{
    return (void)monitor, (void)at, (void)length, true;
}

static struct fi_ops_mem_monitor operations = { sizeof operations, start, stop, subscribe, unsubscribe, valid };
static struct fid_mem_monitor own = { .fid = { .fclass = FI_CLASS_MEM_MONITOR }, .export_ops = &operations };

static void import(void)
{
    struct fid *cache;
    int error = fi_open(FI_VERSION(1, 13), "mr_cache", NULL, 0, 0, &cache, NULL);
    if (!error) {
        error = cache->ops->bind(cache, &own.fid, 0);
        cache->ops->close(cache);
    }
    puts(error == 0 ? "imported" : error == -FI_EBUSY ? "busy" : fi_strerror(-error));
}

int main(int count, char **words)
{
    struct fi_info *info = NULL, *hints = fi_allocinfo();
    struct fid_fabric *fabric;
    struct fid_domain *domain;
    int is_first = count > 1 && !strcmp(words[1], "first");
    hints->fabric_attr->prov_name = strdup("udp");
    /* `fi_open` initialises libfabric as well. */
    if (is_first)
        import();
    if (fi_getinfo(FI_VERSION(1, 13), NULL, NULL, 0, hints, &info)) {
        puts("no provider");
        return 3;
    }
    if (!is_first)
        import();
    if (fi_fabric(info->fabric_attr, &fabric, NULL) || fi_domain(fabric, info, &domain, NULL))
        return 1;
    puts("a domain");
    return 0;
}
