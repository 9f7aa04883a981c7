/* Descriptors that are closed, missing, reused, or inherited. */
#include "hostile.h"

static void close_from(unsigned first)
{
	int fd;

	if (syscall(SYS_close_range, first, ~0u, 0) != 0)
		for (fd = (int)first; fd < 65536; fd++)
			close(fd);
}

/* Closes all descriptors from 3 on, as a daemon does. Afterwards a watch may be invalid without a
 * change, but must not be valid for changed memory. The library must not close files that the
 * program then opens with the same descriptor numbers. */
static void all_are_closed(void)
{
	struct mmun *mmun = opened();
	atomic_ulong changes = 0;
	struct mmun_subscription *subscription = subscribed(mmun, &changes);
	struct mmun_regcache *cache = cached(mmun);
	struct mmun_watch *watch, *late;
	struct mmun_lease lease, again;
	char *memory = mapped();
	int fd, taken[64], i;

	CHECK(mmun_watch(mmun, memory, LENGTH, &watch) == 0);
	CHECK(mmun_regcache_get(cache, memory, LENGTH, &lease) == 0);
	close_from(3);
	for (i = 0; i < 64; i++)
		CHECK((taken[i] = open("/dev/null", O_RDONLY)) >= 3);
	change(memory);
	CHECK(!mmun_watch_valid(watch) && !mmun_lease_valid(&lease));
	if (mmun_watch(mmun, memory, LENGTH, &late) == 0) {
		if (!by(MMUN_SOURCE_KERNEL))
			CHECK(mmun_watch_valid(late));
		change(memory);
		CHECK(!mmun_watch_valid(late));
		mmun_unwatch(late);
	} else {
		CHECK(by(MMUN_SOURCE_KERNEL) && mmun_last_error()[0]);
	}
	if (mmun_regcache_get(cache, memory, LENGTH, &again) == 0) {
		change(memory);
		CHECK(!mmun_lease_valid(&again));
		mmun_regcache_put(&again);
	}
	mmun_regcache_put(&lease);
	mmun_unwatch(watch);
	CHECK(mmun_unsubscribe(subscription) == 0 && mmun_regcache_close(cache) == 0);
	mmun_close(mmun);
	for (i = 0; i < 64; i++)
		CHECK(fcntl(taken[i], F_GETFD) >= 0);
	fd = open("/dev/null", O_RDONLY);
	CHECK(fd >= 0);
}

/* Even if descriptors 0, 1 and 2 are closed, the library must not use these numbers: the program
 * may still write to its standard output. */
static void the_standard_ones_are_closed(void)
{
	int saved = fcntl(2, F_DUPFD_CLOEXEC, 100), fd, taken = 0;
	struct mmun *mmun;

	for (fd = 0; fd < 3; fd++)
		close(fd);
	mmun = opened();
	for (fd = 0; fd < 3; fd++)
		taken += fcntl(fd, F_GETFD) >= 0;
	CHECK(dup2(saved, 2) == 2);
	CHECK(taken == 0);
	mmun_close(mmun);
	everything();
}

/* The limit forbids new descriptors: a source that needs descriptors reports that, and the other
 * sources work. */
static void none_can_be_had(void)
{
	const struct rlimit none = {0, 0};
	struct mmun *mmun;
	const struct mmun_options own = {sizeof(own), MMUN_SOURCE_OWN, MMUN_SOURCE_OWN};
	const struct mmun_options which = {sizeof(which), MMUN_SOURCE_KERNEL, MMUN_SOURCE_KERNEL};

	CHECK(setrlimit(RLIMIT_NOFILE, &none) == 0);
	CHECK(mmun_open(&own, &mmun) == 0);
	mmun_close(mmun);
	if (by(MMUN_SOURCE_KERNEL))
		CHECK(mmun_open(&which, &mmun) < 0 && !mmun && mmun_last_error()[0]);
	else if (by(MMUN_SOURCE_OWN))
		everything();
}

/* After execve(), the new program has no descriptor of the library: each one is close-on-exec. */
static void none_is_passed_on(void)
{
	bool before[1024];
	struct mmun *mmun;
	int fd;

	for (fd = 0; fd < 1024; fd++)
		before[fd] = fcntl(fd, F_GETFD) >= 0;
	mmun = opened();
	for (fd = 0; fd < 1024; fd++)
		CHECK(before[fd] || fcntl(fd, F_GETFD) < 0 || (fcntl(fd, F_GETFD) & FD_CLOEXEC));
	mmun_close(mmun);
}

/* The library closes every descriptor that it opens. */
static void none_is_left(void)
{
	int first, last, i;

	everything();
	first = open("/dev/null", O_RDONLY);
	close(first);
	for (i = 0; i < 10; i++)
		everything();
	last = open("/dev/null", O_RDONLY);
	CHECK(first >= 0 && last == first);
}

void descriptors(void)
{
	RUN(all_are_closed);
	RUN(the_standard_ones_are_closed);
	RUN(none_can_be_had);
	RUN(none_is_passed_on);
	RUN(none_is_left);
}
