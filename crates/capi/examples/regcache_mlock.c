/*
 * A registration cache over mlock(): the buffers that a driver uses stay in memory.
 *
 * mlock() stands in for ibv_reg_mr() and similar functions: it is slow, it has a limit, and it
 * locks the pages that are mapped when it is called. The cache calls it once for each buffer, and
 * again only if the buffer's memory has changed.
 */
#include <mmun/mmun.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define LENGTH ((size_t)64 << 10)

static int lock_region(void *context, void *address, size_t length, void **handle)
{
	(void)context;
	*handle = address; /* A handle of your choice. */
	return mlock(address, length) == 0 ? 0 : -errno;
}

/* Makes only a system call, because it may run in the middle of free(). */
static void unlock_region(void *context, void *address, size_t length, void *handle)
{
	(void)context;
	(void)handle;
	munlock(address, length); /* Fails if the memory was unmapped. Then it is unlocked already. */
}

/* One transfer: the steps of a communication library for each message. */
static int transfer(const struct mmun_regcache *cache, void *buffer, size_t length)
{
	struct mmun_lease lease;
	int error = mmun_regcache_get(cache, buffer, length, &lease);

	if (error < 0) {
		fprintf(stderr, "%s: %s\n", mmun_strerror(error), mmun_last_error());
		return error;
	}
	memset(buffer, 7, length); /* The device uses lease.handle here. */
	mmun_regcache_put(&lease);
	return 0;
}

static void *map(void *where)
{
	int fixed = where ? MAP_FIXED : 0;

	return mmap(where, LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | fixed, -1, 0);
}

int main(void)
{
	const struct mmun_registrar registrar = {
		.size = sizeof(registrar),
		.register_region = lock_region,
		.deregister_region = unlock_region,
		.flags = MMUN_REGISTRAR_IN_CALLBACKS,
	};
	const struct mmun_regcache_options options = {.size = sizeof(options), .max_bytes = 4 << 20};
	struct mmun_regcache_stats stats = {.size = sizeof(stats)};
	struct mmun_status status = {.size = sizeof(status)};
	struct mmun_regcache *cache;
	struct mmun *mmun;
	void *buffer;

	if (mmun_open(NULL, &mmun) < 0) {
		fprintf(stderr, "SKIP %s\n", mmun_last_error());
		return 77;
	}
	mmun_status(mmun, &status);
	if (!status.complete)
		printf("some changes of memory can be missed: %s\n", status.no_kernel);
	if (mmun_regcache_open(mmun, &registrar, &options, &cache) < 0)
		return 1;

	buffer = map(NULL);
	for (int i = 0; i < 1000; i++)
		if (transfer(cache, buffer, LENGTH) < 0)
			return 1;

	/* Map other memory at the same address: the cache does not return the old registration. */
	munmap(buffer, LENGTH);
	if (map(buffer) != buffer || transfer(cache, buffer, LENGTH) < 0)
		return 1;

	mmun_regcache_stats(cache, &stats);
	printf("%llu transfers, %llu times mlock\n", (unsigned long long)(stats.hits + stats.misses),
	       (unsigned long long)stats.registered);
	if (stats.registered < 2 || stats.hits < 900 || mmun_regcache_close(cache) < 0)
		return 1;
	mmun_close(mmun);
	puts("ok");
	return 0;
}
