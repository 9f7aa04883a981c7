/* A plug-in of copies.c, linked with a copy of stand_in.c. */
#include <stddef.h>

extern int stand_in_gets, stand_in_made, stand_in_handlers;
signed char ucm_set_event_handler(int events, int priority, void *callback, void *argument);
signed char ucs_rcache_create(const void *params, const char *name, void *parent, void **cache);
signed char ucs_rcache_get(void *, long, long, long, long, long, long);
void ucs_rcache_destroy(void *cache);

/* Whether all calls have reached the copy of this plug-in. */
int use(void)
{
    void *cache = NULL;
    ucm_set_event_handler(1 << 17, 0, NULL, NULL);
    int is_own = stand_in_handlers == 1;
    ucs_rcache_create(NULL, "test", NULL, &cache);
    is_own &= stand_in_made == 1;
    ucs_rcache_get(cache, 0, 0, 0, 0, 0, 0);
    is_own &= stand_in_gets == 1;
    ucs_rcache_destroy(cache);
    is_own &= stand_in_made == 0;
    return is_own;
}
