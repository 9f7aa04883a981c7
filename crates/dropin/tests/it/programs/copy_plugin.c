/* A plug-in of copies.c, linked with a copy of stand_in.c. */
#include <stddef.h>

extern int stand_in_gets, stand_in_made, stand_in_handlers;
signed char ucm_set_event_handler(int events, int priority, void *callback, void *argument);
signed char ucs_rcache_create(const void *params, const char *name, void *parent, void **cache);
signed char ucs_rcache_get(void *, long, long, long, long, long, long);
void ucs_rcache_destroy(void *cache);

/* Whether the calls for a cache have reached the copy of this plug-in. */
static int use_cache(const char *name)
{
    void *cache = NULL;
    int gets = stand_in_gets;
    ucs_rcache_create(NULL, name, NULL, &cache);
    int is_own = stand_in_made == 1;
    ucs_rcache_get(cache, 0, 0, 0, 0, 0, 0);
    is_own &= stand_in_gets == gets + 1;
    ucs_rcache_destroy(cache);
    return is_own & (stand_in_made == 0);
}

/* Whether all calls have reached the copy of this plug-in. */
int use(void)
{
    ucm_set_event_handler(1 << 17, 0, NULL, NULL);
    int is_own = stand_in_handlers == 1;
    is_own &= use_cache("test");
    is_own &= use_cache("ucp_import_rcache");
    return is_own;
}
