/* Uses of the library before main(), in exit handlers, and by other threads during exit(). */
#include "hostile.h"

static struct mmun *early;
static struct mmun_watch *early_watch;
static char *early_memory;

/* Opens handles before main() begins. */
__attribute__((constructor)) static void before_main(void)
{
	const struct mmun_options own = {sizeof(own), MMUN_SOURCE_OWN, MMUN_SOURCE_OWN};

	CHECK(mmun_open(&own, &early) == 0);
	early_memory = mapped();
	CHECK(mmun_watch(early, early_memory, LENGTH, &early_watch) == 0);
}

/* `run` has forked, so in this process the handles made before main() belong to the parent. */
static void what_was_made_before_main_is_the_parents(void)
{
	struct mmun_watch *none;

	CHECK(!mmun_watch_valid(early_watch));
	CHECK(mmun_watch(early, early_memory, LENGTH, &none) == -ESRCH && !none);
	mmun_unwatch(early_watch);
	mmun_close(early);
}

static struct mmun *late;
static struct mmun_watch *late_watch;
static char *late_memory;

static void at_the_end(void)
{
	change(late_memory);
	CHECK(!mmun_watch_valid(late_watch));
	mmun_unwatch(late_watch);
	mmun_close(late);
	everything();
}

static void handlers_of_exit(void)
{
	late = opened();
	late_memory = mapped();
	CHECK(mmun_watch(late, late_memory, LENGTH, &late_watch) == 0);
	CHECK(atexit(at_the_end) == 0);
	exit(0);
}

static atomic_ulong rounds;

static void *work(void *unused)
{
	for (;;) {
		everything();
		atomic_fetch_add(&rounds, 1);
	}
	return unused;
}

static void exit_while_threads_work(void)
{
	int i;

	for (i = 0; i < 4; i++)
		spawn(work, NULL);
	while (atomic_load(&rounds) < 4)
		sched_yield();
	exit(0);
}

static int never(struct mmu_notifier *notifier, const struct mmu_notifier_range *range)
{
	(void)notifier, (void)range;
	exit(0);
}

/* The process ends inside a callback, while the invalidation is open. */
static void exit_in_a_callback(void)
{
	static const struct mmu_notifier_ops ops = {.invalidate_range_start = never};
	static struct mmu_notifier notifier = {.ops = &ops};
	struct mmun *mmun = opened();

	CHECK(mmu_notifier_register(&notifier, mmun_current_mm()) == 0);
	change(mapped());
	mmun_close(mmun);
	CHECK(!"the callback has returned");
}

void ends(void)
{
	RUN(what_was_made_before_main_is_the_parents);
	RUN(handlers_of_exit);
	RUN(exit_while_threads_work);
	RUN(exit_in_a_callback);
}
