/*
 * Programs that misuse the library, each in a process of its own. The argument names the source
 * (own, hook or kernel).
 *
 * Each program must end without a hang and without a crash, and no watch may be valid for changed
 * memory.
 */
#include "hostile.h"

static const char *const names[] = {"own", "hook", "kernel"};
static uint32_t source;

struct mmun *opened(void)
{
	const struct mmun_options options = {sizeof(options), source, source};
	struct mmun *mmun;

	CHECK(mmun_open(&options, &mmun) == 0);
	return mmun;
}

bool by(uint32_t which)
{
	return source == which;
}

char *mapped(void)
{
	char *memory = mmap(NULL, LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(memory != MAP_FAILED);
	memory[0] = 1;
	return memory;
}

/* Changes the memory with madvise(), which the hook and the kernel source see, inside an
 * invalidation of the program, which the source `own` sees. */
void change(char *memory)
{
	struct mmu_notifier_range range;
	const unsigned long start = (unsigned long)memory;

	mmu_notifier_range_init(&range, MMU_NOTIFY_CLEAR, MMU_NOTIFIER_RANGE_BLOCKABLE, mmun_current_mm(), start,
				start + LENGTH);
	mmu_notifier_invalidate_range_start(&range);
	CHECK(madvise(memory, LENGTH, MADV_DONTNEED) == 0);
	mmu_notifier_invalidate_range_end(&range);
	memory[0] = 1;
}

/* Checks that a watch is valid. With the kernel source, a watch may be invalid without a change, so
 * the check renews it and retries. */
void holds(struct mmun_watch *watch)
{
	int tries;

	for (tries = 0; !mmun_watch_valid(watch) && tries < 100; tries++)
		CHECK(by(MMUN_SOURCE_KERNEL) && mmun_watch_renew(watch) == 0);
	CHECK(tries < 100);
}

static int register_region(void *context, void *address, size_t length, void **handle)
{
	(void)context, (void)length;
	pthread_testcancel(); /* A cancellation point, as open() and read() are. */
	*handle = address;
	return 0;
}

static void deregister_region(void *context, void *address, size_t length, void *handle)
{
	(void)context, (void)length;
	pthread_testcancel();
	CHECK(handle == address);
}

struct mmun_regcache *cached(struct mmun *mmun)
{
	const struct mmun_registrar registrar = {sizeof(registrar), NULL, register_region, deregister_region, 0};
	struct mmun_regcache *cache;

	CHECK(mmun_regcache_open(mmun, &registrar, NULL, &cache) == 0);
	return cache;
}

static void count(void *context, const struct mmun_change *change)
{
	(void)change;
	atomic_fetch_add((atomic_ulong *)context, 1);
}

struct mmun_subscription *subscribed(struct mmun *mmun, atomic_ulong *changes)
{
	const struct mmun_ops ops = {sizeof(ops), count, count};
	struct mmun_subscription *subscription;

	CHECK(mmun_subscribe(mmun, &ops, changes, &subscription) == 0);
	return subscription;
}

/* Uses each kind of handle of mmun.h, and most of its functions. */
void everything(void)
{
	struct mmun *mmun = opened();
	struct mmun_status status = {.size = sizeof(status)};
	atomic_ulong changes = 0;
	struct mmun_subscription *subscription = subscribed(mmun, &changes);
	struct mmun_regcache *cache = cached(mmun);
	struct mmun_watch *watch;
	struct mmun_lease lease;
	char *memory = mapped();
	uint64_t seq;

	CHECK(mmun_status(mmun, &status) == 0 && status.sources == source);
	CHECK(mmun_watch(mmun, memory, LENGTH, &watch) == 0);
	holds(watch);
	CHECK(mmun_regcache_get(cache, memory, LENGTH, &lease) == 0);
	seq = mmun_fill_begin(mmun);
	CHECK(seq != 0);
	change(memory);
	CHECK(!mmun_watch_valid(watch) && !mmun_lease_valid(&lease) && mmun_fill_retry(mmun, seq));
	CHECK(mmun_settle(mmun) == 0 && atomic_load(&changes) >= 2);
	mmun_regcache_put(&lease);
	CHECK(mmun_watch_renew(watch) == 0);
	holds(watch);
	mmun_unwatch(watch);
	CHECK(mmun_regcache_close(cache) == 0 && mmun_unsubscribe(subscription) == 0);
	mmun_close(mmun);
	CHECK(munmap(memory, LENGTH) == 0);
}

pthread_t spawn(void *(*run)(void *), void *argument)
{
	pthread_t thread;

	CHECK(pthread_create(&thread, NULL, run, argument) == 0);
	return thread;
}

/* Runs `what` in a process of its own, which is killed after four minutes (an emulator is slow). */
void run(const char *name, void (*what)(void))
{
	int status;
	pid_t child = fork();

	CHECK(child >= 0);
	if (child == 0) {
		signal(SIGALRM, SIG_DFL);
		alarm(240);
		what();
		_exit(0);
	}
	CHECK(waitpid(child, &status, 0) == child);
	if (WIFEXITED(status) && WEXITSTATUS(status) == 77) {
		printf("skipped %s\n", name);
	} else if (status != 0) {
		fprintf(stderr, "%s over %s: status %x\n", name, names[source == MMUN_SOURCE_KERNEL ? 2 : source & 1],
			(unsigned)status);
		_exit(1);
	} else {
		printf("ok %s\n", name);
	}
	fflush(stdout);
}

int main(int argc, char **argv)
{
	CHECK(argc == 2);
	source = !strcmp(argv[1], "own")  ? MMUN_SOURCE_OWN
		 : !strcmp(argv[1], "hook") ? MMUN_SOURCE_HOOK
					    : MMUN_SOURCE_KERNEL;
	RUN(a_small_stack);
	descriptors();
	surroundings();
	threads();
	ends();
	return 0;
}
