/* Tests the promises of mmun/mmun.h from C. The argument is own, hook, kernel or both. */
#include <mmun/mmu_notifier.h>
#include <mmun/mmun.h>

#define WHY mmun_last_error()
#include "../checked.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

#define RUN(name)                                                                                    \
	do {                                                                                         \
		name();                                                                              \
		printf("ok %s\n", #name);                                                            \
		fflush(stdout);                                                                      \
	} while (0)

#define PAGE ((size_t)sysconf(_SC_PAGESIZE))
/* Ranges are rounded to multiples of this size, whatever the size of the kernel's pages. */
#define GRANULE ((size_t)4096)

static uint32_t source;
static struct mmun *mmun;

static struct mmun *open_source(void)
{
	struct mmun_options options = {sizeof(options), source, source};
	struct mmun *opened;

	CHECK(mmun_open(&options, &opened) == 0);
	return opened;
}

static char *map(size_t pages)
{
	char *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(memory != MAP_FAILED);
	memset(memory, 1, pages * PAGE);
	return memory;
}

/* Unmaps in a way that the source sees. */
static void unmap(void *memory, size_t pages)
{
	struct mmu_notifier_range range;

	if (source == MMUN_SOURCE_OWN) {
		mmu_notifier_range_init(&range, MMU_NOTIFY_UNMAP, MMU_NOTIFIER_RANGE_BLOCKABLE, mmun_current_mm(),
					(unsigned long)memory, (unsigned long)memory + pages * PAGE);
		mmu_notifier_invalidate_range_start(&range);
	}
	CHECK(munmap(memory, pages * PAGE) == 0);
	if (source == MMUN_SOURCE_OWN)
		mmu_notifier_invalidate_range_end(&range);
}

/* Forks as a program does that calls clone() itself: libc runs no handler of pthread_atfork(). */
static pid_t raw_fork(void)
{
	return (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
}

/* Returns whether `f` succeeds in a child made by `make`. */
static bool child_succeeds(pid_t (*make)(void), void (*f)(void))
{
	pid_t child = make();
	int status;

	if (child == 0) {
		alarm(20);
		f();
		_exit(0);
	}
	CHECK(child > 0 && waitpid(child, &status, 0) == child);
	return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

static bool aborts(void (*f)(void))
{
	pid_t child = fork();
	int status;

	if (child == 0) {
		close(2);
		f();
		_exit(0);
	}
	CHECK(child > 0 && waitpid(child, &status, 0) == child);
	return WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT;
}

/* -- sources
 * ------------------------------------------------------------------------------------- */

static void status_says_what_runs(void)
{
	struct mmun_status status = {.size = sizeof(status)};

	CHECK(mmun_status(mmun, &status) == 0);
	CHECK(status.size == sizeof(status) && status.sources == source && !status.inherited);
	CHECK(status.complete == !!(source & MMUN_SOURCE_KERNEL));
	CHECK(status.watches == 0 && status.subscriptions == 0 && status.caches == 0);
	CHECK(strlen(status.no_hook) == 0 && strlen(status.no_kernel) == 0);
}

static void versions_and_errors_are_told(void)
{
	CHECK(mmun_abi_version() == MMUN_ABI_VERSION);
	CHECK(strcmp(mmun_strerror(0), "success") == 0);
	for (int error = -200; error < 200; error++)
		CHECK(strlen(mmun_strerror(error)) > 0);
	CHECK(strlen(mmun_strerror(-2147483647 - 1)) > 0);
	CHECK(mmun_open(NULL, NULL) == -EINVAL);
	CHECK(strstr(mmun_last_error(), "null") != NULL);
}

static void options_are_checked(void)
{
	struct {
		struct mmun_options options;
		uint64_t unknown;
	} future = {{sizeof(future), source, source}, 0};
	struct mmun_options none = {sizeof(none), 1u << 30, 0};
	struct mmun_options small = {8, source, source};
	struct mmun *opened = mmun;

	CHECK(mmun_open(&none, &opened) == -EINVAL && opened == NULL);
	opened = mmun;
	CHECK(mmun_open(&small, &opened) == -EINVAL && opened == NULL);
	CHECK(mmun_open(&future.options, &opened) == 0);
	mmun_close(opened);
	future.unknown = 1;
	opened = mmun;
	CHECK(mmun_open(&future.options, &opened) == -E2BIG && opened == NULL);
	CHECK(mmun_open((struct mmun_options *)((char *)&future + 1), &opened) == -EINVAL);
	CHECK(mmun_open(&none, (struct mmun **)((char *)&opened + 1)) == -EINVAL);
	mmun_close(NULL);
}

/* The caller's variable for the result may overlap the options. */
static void arguments_may_overlap(void)
{
	union {
		struct mmun_options options;
		struct mmun *opened;
	} both = {{sizeof(both.options), source, source}};

	CHECK(mmun_open(&both.options, &both.opened) == 0);
	mmun_close(both.opened);
}

/* -- watches
 * ------------------------------------------------------------------------------------- */

static void a_watch_is_valid_until_its_memory_changes(void)
{
	char *memory = map(3), *other = map(1);
	struct mmun_watch *watch, *beside;

	CHECK(mmun_watch(mmun, memory + PAGE + 10, 100, &watch) == 0);
	CHECK(mmun_watch(mmun, other, PAGE, &beside) == 0);
	CHECK(mmun_watch_valid(watch) && mmun_watch_valid(beside));
	unmap(memory, 3);
	CHECK(!mmun_watch_valid(watch));
	CHECK(mmun_watch_valid(beside));
	CHECK(mmun_watch_renew(watch) == 0);
	CHECK(mmun_watch_valid(watch));
	mmun_unwatch(watch);
	mmun_unwatch(beside);
	unmap(other, 1);
}

static void bad_watches_are_refused(void)
{
	struct mmun_watch *watch = (struct mmun_watch *)&source;

	CHECK(mmun_watch(mmun, &source, 0, &watch) == -EINVAL && watch == NULL);
	CHECK(mmun_watch(mmun, &source, SIZE_MAX, &watch) == -EINVAL);
	CHECK(mmun_watch(NULL, &source, 1, &watch) == -EINVAL);
	CHECK(mmun_watch(mmun, &source, 1, NULL) == -EINVAL);
	CHECK(!mmun_watch_valid(NULL));
	CHECK(mmun_watch_renew(NULL) == -EINVAL);
	mmun_unwatch(NULL);
}

static void handles_keep_what_they_need(void)
{
	struct mmun *opened = open_source();
	char *memory = map(1);
	struct mmun_watch *watch;

	CHECK(mmun_watch(opened, memory, PAGE, &watch) == 0);
	mmun_close(opened);
	CHECK(mmun_watch_valid(watch));
	unmap(memory, 1);
	CHECK(!mmun_watch_valid(watch));
	mmun_unwatch(watch);
}

/* -- subscriptions
 * ------------------------------------------------------------------------------- */

struct seen {
	uintptr_t address;
	atomic_int starts, ends;
	atomic_uint cause;
	struct mmun_subscription *subscription;
	struct mmun_watch *watch;
	int unsubscribed;
	uint64_t seq;
	int opened, watched, renewed;
};

static void note_start(void *context, const struct mmun_change *change)
{
	struct seen *seen = context;

	if (change->size < sizeof(*change) || change->start > seen->address || change->end <= seen->address)
		return;
	seen->cause = change->cause;
	if (seen->subscription && seen->starts == 0) {
		struct mmun_subscription *another;
		struct mmun_watch *watch;
		const struct mmun_ops ops = {sizeof(ops), NULL, NULL};

		seen->unsubscribed = mmun_unsubscribe(seen->subscription);
		seen->seq = mmun_fill_begin(mmun);
		seen->opened = mmun_subscribe(mmun, &ops, NULL, &another);
		seen->watched = mmun_watch(mmun, context, 1, &watch);
		seen->renewed = mmun_watch_renew(seen->watch);
	}
	seen->starts++;
}

static void note_end(void *context, const struct mmun_change *change)
{
	struct seen *seen = context;

	if (change->start <= seen->address && seen->address < change->end)
		seen->ends++;
}

static const struct mmun_ops ops = {sizeof(ops), note_start, note_end};

static void a_subscriber_hears_each_change(void)
{
	char *memory = map(1);
	struct seen seen = {.address = (uintptr_t)memory};
	struct mmun_status status = {.size = sizeof(status)};

	CHECK(mmun_subscribe(mmun, &ops, &seen, &seen.subscription) == 0);
	CHECK(mmun_status(mmun, &status) == 0 && status.subscriptions == 1);
	struct mmun_subscription *subscription = seen.subscription;

	seen.subscription = NULL;
	unmap(memory, 1);
	CHECK(mmun_settle(mmun) == 0);
	CHECK(seen.starts >= 1 && seen.starts == seen.ends);
	/* With both sources, the hook calls first, and the kernel source afterwards. `cause` is of
	 * the last callback. */
	CHECK(seen.cause == (source & MMUN_SOURCE_KERNEL ? MMUN_CAUSE_KERNEL : MMUN_CAUSE_CALLER));
	CHECK(mmun_unsubscribe(subscription) == 0);
	int heard = seen.starts;

	memory = map(1);
	seen.address = (uintptr_t)memory;
	unmap(memory, 1);
	CHECK(mmun_settle(mmun) == 0 && seen.starts == heard);
	CHECK(mmun_status(mmun, &status) == 0 && status.subscriptions == 0);
}

static void a_callback_that_would_wait_for_itself_is_refused(void)
{
	char *memory = map(1);
	struct seen seen = {.address = (uintptr_t)memory};

	CHECK(mmun_watch(mmun, &seen, 1, &seen.watch) == 0);
	CHECK(mmun_subscribe(mmun, &ops, &seen, &seen.subscription) == 0);
	unmap(memory, 1);
	CHECK(mmun_settle(mmun) == 0);
	CHECK(seen.starts >= 1 && seen.unsubscribed == -EDEADLK && seen.seq == 0 && seen.opened == -EDEADLK);
	CHECK(seen.watched == -EDEADLK && seen.renewed == -EDEADLK);
	CHECK(mmun_unsubscribe(seen.subscription) == 0);
	mmun_unwatch(seen.watch);
}

static void bad_subscriptions_are_refused(void)
{
	struct mmun_subscription *subscription;
	const struct mmun_ops nothing = {sizeof(nothing), NULL, NULL};

	CHECK(mmun_subscribe(mmun, NULL, NULL, &subscription) == -EINVAL);
	CHECK(mmun_subscribe(NULL, &nothing, NULL, &subscription) == -EINVAL && subscription == NULL);
	CHECK(mmun_subscribe(mmun, &nothing, NULL, NULL) == -EINVAL);
	CHECK(mmun_unsubscribe(NULL) == -EINVAL);
	CHECK(mmun_settle(NULL) == -EINVAL);
	CHECK(mmun_subscribe(mmun, &nothing, NULL, &subscription) == 0);
	unmap(map(1), 1);
	CHECK(mmun_unsubscribe(subscription) == 0);
}

/* Begins a fill that nothing has collided with so far. The kernel and the library's own threads
 * can change memory of the process at any time, so it may take several attempts. */
static uint64_t begin_alone(void)
{
	for (int tries = 0; tries < 1000; tries++) {
		uint64_t seq = mmun_fill_begin(mmun);

		CHECK(seq != 0);
		if (!mmun_fill_retry(mmun, seq))
			return seq;
	}
	CHECK(0);
	return 0;
}

static void a_fill_that_collides_is_repeated(void)
{
	char *memory = map(1);
	struct mmun_watch *watch;

	CHECK(mmun_watch(mmun, memory, PAGE, &watch) == 0);
	uint64_t seq = begin_alone();

	unmap(memory, 1);
	CHECK(mmun_fill_retry(mmun, seq));
	seq = begin_alone();
	CHECK(mmun_fill_begin(NULL) == 0 && mmun_fill_retry(NULL, seq) && mmun_fill_retry(mmun, 0));
	mmun_unwatch(watch);
}

/* The program announces changes of its own on the same address space. */
static void a_fill_that_collides_with_an_own_invalidation_is_repeated(void)
{
	char *memory = map(1);
	struct mmu_notifier_range range;
	uint64_t seq;

	mmu_notifier_range_init(&range, MMU_NOTIFY_CLEAR, 0, mmun_current_mm(), (unsigned long)memory,
				(unsigned long)memory + PAGE);
	seq = mmun_fill_begin(mmun);
	CHECK(seq != 0);
	mmu_notifier_invalidate_range_start(&range);
	mmu_notifier_invalidate_range_end(&range);
	CHECK(mmun_fill_retry(mmun, seq));
	unmap(memory, 1);
}

/* -- the registration cache
 * ---------------------------------------------------------------------- */

struct device {
	atomic_long registered, deregistered;
	int refuse;
	int refusals;
};

static int register_region(void *context, void *address, size_t length, void **handle)
{
	struct device *device = context;

	CHECK(((uintptr_t)address | length) % GRANULE == 0 && length > 0);
	if (device->refuse && device->refusals-- > 0)
		return device->refuse;
	*handle = (void *)(uintptr_t)++device->registered;
	return 0;
}

static void deregister_region(void *context, void *address, size_t length, void *handle)
{
	struct device *device = context;

	CHECK(address && length && handle);
	device->deregistered++;
}

static struct mmun_regcache *cache_of(struct device *device, const struct mmun_regcache_options *options)
{
	const struct mmun_registrar registrar = {
		sizeof(registrar), device, register_region, deregister_region, MMUN_REGISTRAR_IN_CALLBACKS};
	struct mmun_regcache *cache;

	CHECK(mmun_regcache_open(mmun, &registrar, options, &cache) == 0);
	return cache;
}

static void a_cache_hits_and_serves_nothing_stale(void)
{
	struct device device = {0};
	struct mmun_regcache *cache = cache_of(&device, NULL);
	struct mmun_regcache_stats stats = {.size = sizeof(stats)};
	struct mmun_lease first, second;
	char *memory = map(4);
	void *address;
	size_t length;

	CHECK(mmun_regcache_get(cache, memory + 10, 2 * PAGE, &first) == 0);
	CHECK(mmun_regcache_get(cache, memory + PAGE, 10, &second) == 0);
	CHECK(first.handle == second.handle && device.registered == 1);
	CHECK(mmun_lease_range(&first, &address, &length) == 0 && address == memory && length == 2 * PAGE + GRANULE);
	CHECK(mmun_lease_valid(&first));
	mmun_regcache_put(&second);
	CHECK(!mmun_lease_valid(&second));
	unmap(memory, 4);
	CHECK(!mmun_lease_valid(&first));
	CHECK(device.deregistered == 0);
	mmun_regcache_put(&first);
	CHECK(device.deregistered == 1);
	CHECK(mmap(memory, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == memory);
	CHECK(mmun_regcache_get(cache, memory, PAGE, &first) == 0);
	CHECK(device.registered == 2 && first.handle == (void *)2);
	mmun_regcache_put(&first);
	CHECK(mmun_regcache_stats(cache, &stats) == 0);
	CHECK(stats.hits == 1 && stats.misses == 2 && stats.registered == 2 && stats.deregistered == 1);
	CHECK(stats.regions == 1 && stats.bytes == PAGE && stats.live_regions == 1);
	CHECK(mmun_regcache_flush(cache) == 1 && device.deregistered == 2);
	CHECK(mmun_regcache_close(cache) == 0);
	unmap(memory, 4);
}

static void a_cache_ends_after_its_leases(void)
{
	struct device device = {0};
	struct mmun_regcache *cache = cache_of(&device, NULL);
	struct mmun_lease lease;
	char *memory = map(1);

	CHECK(mmun_regcache_get(cache, memory, PAGE, &lease) == 0);
	CHECK(mmun_regcache_close(cache) == -EBUSY);
	mmun_regcache_put(&lease);
	mmun_regcache_reap(cache);
	struct mm_struct *other = mmun_mm_new();
	struct mmu_notifier_range range;
	mmu_notifier_range_init(&range, MMU_NOTIFY_UNMAP, 0, other, 0x1000, 0x2000);
	mmu_notifier_invalidate_range_start(&range);
	CHECK(mmun_regcache_close(cache) == -EDEADLK);
	mmu_notifier_invalidate_range_end(&range);
	mmput(other);
	CHECK(mmun_regcache_close(cache) == 0);
	CHECK(device.registered == device.deregistered);
	unmap(memory, 1);
}

static void errors_of_the_registrar_go_through(void)
{
	struct device device = {.refuse = -EPERM, .refusals = 1};
	const struct mmun_regcache_options options = {sizeof(options), MMUN_MERGE_NEVER, 2, 3 * PAGE, 0};
	struct mmun_regcache *cache = cache_of(&device, &options);
	struct mmun_lease leases[3];
	char *memory = map(8);

	CHECK(mmun_regcache_get(cache, memory, PAGE, &leases[0]) == -EPERM && leases[0].handle == NULL);
	CHECK(strstr(mmun_last_error(), "not permitted") != NULL);
	device.refuse = 77; /* Not an error number. */
	device.refusals = 1;
	CHECK(mmun_regcache_get(cache, memory, PAGE, &leases[0]) == -EIO);
	CHECK(mmun_regcache_get(cache, memory, PAGE, &leases[0]) == 0);
	device.refuse = -ENOMEM; /* The cache evicts, and tries once more. */
	device.refusals = 1;
	CHECK(mmun_regcache_get(cache, memory + 2 * PAGE, PAGE, &leases[1]) == -ENOMEM);
	CHECK(mmun_regcache_get(cache, memory + 2 * PAGE, PAGE, &leases[1]) == 0);
	CHECK(mmun_regcache_get(cache, memory + 4 * PAGE, PAGE, &leases[2]) == -ENOSPC);
	CHECK(mmun_regcache_get(cache, memory, 8 * PAGE, &leases[2]) == -EFBIG);
	mmun_regcache_put(&leases[0]);
	mmun_regcache_put(&leases[1]);
	CHECK(mmun_regcache_close(cache) == 0);
	unmap(memory, 8);
}

static void bad_caches_are_refused(void)
{
	struct device device = {0};
	struct mmun_registrar registrar = {sizeof(registrar), &device, register_region, NULL, 0};
	struct mmun_regcache_options options = {sizeof(options), 3, 0, 0, 0};
	struct mmun_regcache *cache = NULL;
	struct mmun_lease lease;
	void *address;
	size_t length;

	CHECK(mmun_regcache_open(mmun, &registrar, NULL, &cache) == -EINVAL && cache == NULL);
	registrar.deregister_region = deregister_region;
	registrar.flags = 2;
	CHECK(mmun_regcache_open(mmun, &registrar, NULL, &cache) == -EINVAL);
	registrar.flags = 0;
	CHECK(mmun_regcache_open(mmun, &registrar, &options, &cache) == -EINVAL);
	CHECK(mmun_regcache_open(NULL, &registrar, NULL, &cache) == -EINVAL);
	CHECK(mmun_regcache_open(mmun, NULL, NULL, &cache) == -EINVAL);
	CHECK(mmun_regcache_open(mmun, &registrar, NULL, NULL) == -EINVAL);
	options.merge = MMUN_MERGE_ADJACENT;
	CHECK(mmun_regcache_open(mmun, &registrar, &options, &cache) == 0);
	memset(&lease, 0xee, sizeof(lease));
	CHECK(mmun_regcache_get(NULL, &device, 1, &lease) == -EINVAL);
	CHECK(lease.handle == NULL && !mmun_lease_valid(&lease));
	CHECK(mmun_regcache_get(cache, &device, 1, NULL) == -EINVAL);
	CHECK(mmun_regcache_get(cache, &device, 1, (struct mmun_lease *)((char *)&lease + 4)) == -EINVAL);
	CHECK(mmun_regcache_get(cache, &device, 0, &lease) == -EINVAL && !mmun_lease_valid(&lease));
	CHECK(mmun_regcache_get(cache, &device, SIZE_MAX, &lease) == -EINVAL);
	CHECK(mmun_regcache_get(cache, (void *)(UINTPTR_MAX - 10), 11, &lease) == -EINVAL);
	CHECK(!mmun_lease_valid(NULL) && mmun_lease_range(&lease, &address, &length) == -EINVAL);
	CHECK(mmun_regcache_flush(NULL) == 0 && mmun_regcache_stats(NULL, NULL) == -EINVAL);
	CHECK(mmun_regcache_stats(cache, NULL) == -EINVAL);
	mmun_regcache_reap(NULL);
	CHECK(mmun_regcache_close(cache) == 0 && mmun_regcache_close(NULL) == 0);
	CHECK(device.registered == 0);
}

static struct mmun_lease twice;

static void put_twice(void)
{
	mmun_regcache_put(&twice);
	mmun_regcache_put(&twice);
}

static void put_nothing(void)
{
	mmun_regcache_put(NULL);
}

static void a_lease_that_is_put_twice_ends_the_process(void)
{
	struct device device = {0};
	struct mmun_regcache *cache = cache_of(&device, NULL);
	char *memory = map(1);

	CHECK(mmun_regcache_get(cache, memory, PAGE, &twice) == 0);
	CHECK(aborts(put_twice));
	CHECK(aborts(put_nothing));
	mmun_regcache_put(&twice);
	CHECK(mmun_regcache_close(cache) == 0);
	unmap(memory, 1);
}

/* -- after a fork
 * -------------------------------------------------------------------------------- */

static struct {
	char *memory;
	struct mmun_watch *watch;
	struct mmun_subscription *subscription;
	struct mmun_regcache *cache;
	struct mmun_lease lease;
	struct seen seen;
	struct device device;
	uint64_t seq;
} parent;

static void the_child(void)
{
	struct mmun_status status = {.size = sizeof(status)};
	struct mmun_regcache_stats stats = {.size = sizeof(stats)};
	struct mmun_watch *watch;
	struct mmun_subscription *subscription;
	struct mmun_regcache *cache;
	struct mmun_lease lease;
	const struct mmun_registrar registrar = {sizeof(registrar), &parent.device, register_region, deregister_region, 0};

	CHECK(mmun_status(mmun, &status) == 0 && status.inherited && status.sources == 0 && !status.complete);
	CHECK(!mmun_watch_valid(parent.watch));
	CHECK(mmun_watch_renew(parent.watch) == -ESRCH);
	CHECK(mmun_watch(mmun, parent.memory, PAGE, &watch) == -ESRCH);
	CHECK(mmun_subscribe(mmun, &ops, &parent.seen, &subscription) == -ESRCH);
	CHECK(mmun_settle(mmun) == -ESRCH);
	CHECK(mmun_fill_begin(mmun) == 0 && mmun_fill_retry(mmun, parent.seq));
	CHECK(mmun_regcache_open(mmun, &registrar, NULL, &cache) == -ESRCH);
	CHECK(mmun_regcache_get(parent.cache, parent.memory, PAGE, &lease) == -ESRCH);
	CHECK(!mmun_lease_valid(&parent.lease));
	CHECK(mmun_regcache_flush(parent.cache) == 0);
	CHECK(mmun_regcache_stats(parent.cache, &stats) == 0);
	mmun_regcache_reap(parent.cache);
	mmun_regcache_put(&parent.lease);
	CHECK(mmun_regcache_close(parent.cache) == 0);
	CHECK(mmun_unsubscribe(parent.subscription) == 0);
	mmun_unwatch(parent.watch);
	mmun_close(mmun);
	CHECK(parent.device.deregistered == 0);

	/* The child opens its own handles. */
	mmun = open_source();
	a_watch_is_valid_until_its_memory_changes();
	a_subscriber_hears_each_change();
	a_fill_that_collides_is_repeated();
	a_cache_hits_and_serves_nothing_stale();
	mmun_close(mmun);
}

static void the_child_of_a_fork_is_answered(void)
{
	parent.memory = map(1);
	parent.seen.address = (uintptr_t)parent.memory;
	CHECK(mmun_watch(mmun, parent.memory, PAGE, &parent.watch) == 0);
	CHECK(mmun_subscribe(mmun, &ops, &parent.seen, &parent.subscription) == 0);
	parent.cache = cache_of(&parent.device, NULL);
	CHECK(mmun_regcache_get(parent.cache, parent.memory, PAGE, &parent.lease) == 0);
	parent.seq = mmun_fill_begin(mmun);
	CHECK(child_succeeds(fork, the_child));
	CHECK(child_succeeds(raw_fork, the_child));
	mmun_regcache_put(&parent.lease);
	CHECK(mmun_regcache_close(parent.cache) == 0);
	CHECK(mmun_unsubscribe(parent.subscription) == 0);
	mmun_unwatch(parent.watch);
	unmap(parent.memory, 1);
}

/* -- threads
 * ------------------------------------------------------------------------------------- */

static struct mmun_regcache *shared;

/* From Linux 7.0 on the kernel can skip the source's program for a change. The source reports that
 * within a second; the limit is far longer. */
static int can_be_skipped(void)
{
	struct utsname name;

	return uname(&name) == 0 && atoi(name.release) >= 7;
}

static int is_over(struct mmun_watch *watch, struct mmun_lease *lease)
{
	int patience = can_be_skipped() ? 10000 : 0;

	while (mmun_watch_valid(watch) || mmun_lease_valid(lease)) {
		if (patience-- == 0)
			return 0;
		usleep(1000);
	}
	return 1;
}

static void *use(void *argument)
{
	(void)argument;
	for (int round = 0; round < 100; round++) {
		struct seen seen = {0};
		struct mmun_subscription *subscription;
		struct mmun_watch *watch;
		struct mmun_lease lease;
		char *memory = map(2);

		CHECK(mmun_watch(mmun, memory, PAGE, &watch) == 0);
		CHECK(mmun_regcache_get(shared, memory, PAGE, &lease) == 0);
		if (round % 10 == 0) {
			CHECK(mmun_subscribe(mmun, &ops, &seen, &subscription) == 0);
			CHECK(mmun_fill_begin(mmun) != 0);
		}
		unmap(memory, 2);
		CHECK(is_over(watch, &lease));
		if (round % 10 == 0)
			CHECK(mmun_unsubscribe(subscription) == 0);
		mmun_regcache_put(&lease);
		mmun_unwatch(watch);
	}
	return NULL;
}

static void threads_use_one_handle(void)
{
	struct device device = {0};
	pthread_t threads[8];

	shared = cache_of(&device, NULL);
	for (int i = 0; i < 8; i++)
		CHECK(pthread_create(&threads[i], NULL, use, NULL) == 0);
	for (int i = 0; i < 8; i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
	CHECK(mmun_regcache_close(shared) == 0);
	CHECK(device.registered == device.deregistered);
}

int main(int argc, char **argv)
{
	CHECK(argc == 2);
	source = !strcmp(argv[1], "kernel") ? MMUN_SOURCE_KERNEL :
		 !strcmp(argv[1], "hook")   ? MMUN_SOURCE_HOOK :
		 !strcmp(argv[1], "both")   ? MMUN_SOURCE_HOOK | MMUN_SOURCE_KERNEL :
					      MMUN_SOURCE_OWN;
	mmun = open_source();
	RUN(status_says_what_runs);
	RUN(versions_and_errors_are_told);
	RUN(options_are_checked);
	RUN(arguments_may_overlap);
	RUN(a_watch_is_valid_until_its_memory_changes);
	RUN(bad_watches_are_refused);
	RUN(handles_keep_what_they_need);
	RUN(a_subscriber_hears_each_change);
	RUN(a_callback_that_would_wait_for_itself_is_refused);
	RUN(bad_subscriptions_are_refused);
	RUN(a_fill_that_collides_is_repeated);
	RUN(a_fill_that_collides_with_an_own_invalidation_is_repeated);
	RUN(a_cache_hits_and_serves_nothing_stale);
	RUN(a_cache_ends_after_its_leases);
	RUN(errors_of_the_registrar_go_through);
	RUN(bad_caches_are_refused);
	RUN(a_lease_that_is_put_twice_ends_the_process);
	RUN(the_child_of_a_fork_is_answered);
	RUN(threads_use_one_handle);
	mmun_close(mmun);
	return 0;
}
