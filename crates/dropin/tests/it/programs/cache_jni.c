/* The native part of Cache.java. */
#define main cache_main
#include "cache.c"

/* How many operations leave a registration stale, in this process. */
int Java_Cache_stale(void *environment, void *class)
{
    (void)environment, (void)class;
    int count = 0;
    device_open();
    cache_open();
    for (size_t i = 0; i < sizeof operations / sizeof *operations; i++)
        count += is_stale(operations[i].make, operations[i].change);
    return count;
}
