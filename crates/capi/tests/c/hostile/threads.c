/* Threads with little stack, threads that end, threads that are cancelled, and forks among them. */
#include "hostile.h"

#include <limits.h>

static void *all(void *unused)
{
	everything();
	return unused;
}

/* A stack of 64 KiB is smaller than musl's default, and is what runtimes with small stacks use. The
 * first use of the library in a process needs the most. */
void a_small_stack(void)
{
	pthread_attr_t attributes;
	pthread_t thread;
	size_t size = 65536;

	if (size < (size_t)PTHREAD_STACK_MIN)
		size = (size_t)PTHREAD_STACK_MIN;
	CHECK(pthread_attr_init(&attributes) == 0 && pthread_attr_setstacksize(&attributes, size) == 0);
	CHECK(pthread_create(&thread, &attributes, all, NULL) == 0 && pthread_join(thread, NULL) == 0);
}

static struct mmun *shared;
static pthread_key_t key;

struct kept {
	struct mmun_watch *watch;
	struct mmun_regcache *cache;
	struct mmun_lease lease;
	char *memory;
};

/* Runs while the thread's TLS is destroyed. */
static void give_back(void *of_thread)
{
	struct kept *kept = of_thread;
	struct mmun_lease lease;

	change(kept->memory);
	CHECK(!mmun_watch_valid(kept->watch) && mmun_watch_renew(kept->watch) == 0);
	CHECK(mmun_regcache_get(kept->cache, kept->memory, LENGTH, &lease) == 0);
	mmun_regcache_put(&lease);
	mmun_regcache_put(&kept->lease);
	mmun_unwatch(kept->watch);
	CHECK(mmun_regcache_close(kept->cache) == 0);
	CHECK(munmap(kept->memory, LENGTH) == 0);
	free(kept);
}

static void *keep(void *unused)
{
	struct kept *kept = malloc(sizeof(*kept));

	CHECK(kept);
	kept->memory = mapped();
	kept->cache = cached(shared);
	CHECK(mmun_watch(shared, kept->memory, LENGTH, &kept->watch) == 0);
	CHECK(mmun_regcache_get(kept->cache, kept->memory, LENGTH, &kept->lease) == 0);
	CHECK(pthread_setspecific(key, kept) == 0);
	return unused;
}

static void destructors_of_threads(void)
{
	int i;

	shared = opened();
	CHECK(pthread_key_create(&key, give_back) == 0);
	for (i = 0; i < 4; i++)
		CHECK(pthread_join(spawn(keep, NULL), NULL) == 0);
	mmun_close(shared);
}

static atomic_bool done;

static void *work(void *argument)
{
	while (!atomic_load(&done))
		everything();
	return argument;
}

/* In the child, functions fail for a handle of the parent, and the child opens its own handles. */
static void forks_among_threads(void)
{
	pthread_t thread[2];
	char *memory = mapped();
	struct mmun_watch *watch, *none;
	int i, status;

	shared = opened();
	CHECK(mmun_watch(shared, memory, LENGTH, &watch) == 0);
	for (i = 0; i < 2; i++)
		thread[i] = spawn(work, NULL);
	for (i = 0; i < 10; i++) {
		pid_t child = fork();

		CHECK(child >= 0);
		if (child == 0) {
			alarm(240);
			CHECK(!mmun_watch_valid(watch));
			CHECK(mmun_watch(shared, memory, LENGTH, &none) == -ESRCH && !none);
			everything();
			mmun_unwatch(watch);
			mmun_close(shared);
			_exit(0);
		}
		CHECK(waitpid(child, &status, 0) == child && status == 0);
	}
	atomic_store(&done, true);
	for (i = 0; i < 2; i++)
		CHECK(pthread_join(thread[i], NULL) == 0);
	mmun_unwatch(watch);
	mmun_close(shared);
}

static atomic_ulong rounds;

static void *work_until_cancelled(void *unused)
{
	for (;;) {
		everything();
		atomic_fetch_add(&rounds, 1);
		pthread_testcancel();
	}
	return unused;
}

/* The thread ends at its own cancellation point, pthread_testcancel(). It must not end inside the
 * library, which cannot be unwound. */
static void a_thread_that_is_cancelled(void)
{
	void *result;
	int i;

	for (i = 0; i < 20; i++) {
		pthread_t thread = spawn(work_until_cancelled, NULL);

		while (atomic_load(&rounds) == 0)
			sched_yield();
		CHECK(pthread_cancel(thread) == 0 && pthread_join(thread, &result) == 0);
		CHECK(result == PTHREAD_CANCELED);
		atomic_store(&rounds, 0);
	}
}

void threads(void)
{
	RUN(destructors_of_threads);
	RUN(forks_among_threads);
	RUN(a_thread_that_is_cancelled);
}
