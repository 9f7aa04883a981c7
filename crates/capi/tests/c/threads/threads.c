/* 32 threads of get, put, watch and invalidations. The argument is the duration in milliseconds. */
#include <mmun/mmu_notifier.h>
#include <mmun/mmun.h>

#define WHY mmun_last_error()
#include "../checked.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define THREADS 32
#define KEYS 3
#define ALIVE 0x616c697665ul
#define PAGE 4096ul

struct object {
	atomic_ulong alive;
	atomic_long inside; /* The number of starts minus the number of ends. */
	struct mmu_notifier mn;
};

static atomic_long made, freed, rounds, touched;
static atomic_bool done;
static struct mmun *mmun;

static struct object *of(struct mmu_notifier *mn)
{
	struct object *object = container_of(mn, struct object, mn);

	CHECK(atomic_load_explicit(&object->alive, memory_order_relaxed) == ALIVE);
	return object;
}

static struct mmu_notifier *alloc(struct mm_struct *mm)
{
	struct object *object = calloc(1, sizeof(*object));

	CHECK(object && mm);
	object->alive = ALIVE;
	made++;
	return &object->mn;
}

static void free_notifier(struct mmu_notifier *mn)
{
	struct object *object = of(mn);

	object->alive = 0;
	free(object);
	freed++;
}

static int start(struct mmu_notifier *mn, const struct mmu_notifier_range *range)
{
	CHECK(range->mm == mn->mm);
	of(mn)->inside++;
	return 0;
}

static void end(struct mmu_notifier *mn, const struct mmu_notifier_range *range)
{
	CHECK(range->mm == mn->mm);
	of(mn)->inside--;
}

#define OPS                                                                                          \
	{                                                                                            \
		.invalidate_range_start = start, .invalidate_range_end = end, .alloc_notifier = alloc,       \
		.free_notifier = free_notifier                                                       \
	}
static const struct mmu_notifier_ops ops[KEYS] = {OPS, OPS, OPS};

static void *work(void *argument)
{
	unsigned long random = (unsigned long)(uintptr_t)argument * 2654435761ul + 1;
	const unsigned long mine = (0x100000ul + (unsigned long)(uintptr_t)argument) * PAGE;
	struct mm_struct *mm = mmun_current_mm();
	struct mmun_watch *watch = NULL;

	while (!done) {
		struct mmu_notifier_range range;
		struct mmu_notifier *mn;

		random ^= random << 13;
		random ^= random >> 7;
		random ^= random << 17;
		mn = mmu_notifier_get(&ops[random % KEYS], mm);
		CHECK(!IS_ERR(mn));
		if (!watch)
			CHECK(mmun_watch(mmun, (void *)mine, PAGE, &watch) == 0);
		CHECK(mmun_watch_valid(watch)); /* Only this thread changes its page. */
		mmu_notifier_range_init(&range, MMU_NOTIFY_CLEAR, MMU_NOTIFIER_RANGE_BLOCKABLE, mm,
					random & 64 ? mine : mine + THREADS * PAGE,
					(random & 64 ? mine : mine + THREADS * PAGE) + PAGE);
		mmu_notifier_invalidate_range_start(&range);
		if (random & 128)
			mmu_notifier_put(mn);
		mmu_notifier_invalidate_range_end(&range);
		if (!(random & 128)) {
			of(mn);
			mmu_notifier_put(mn);
		}
		CHECK(mmun_watch_valid(watch) == !(random & 64));
		if (random & 64) {
			touched++;
			if (random & 256) {
				CHECK(mmun_watch_renew(watch) == 0);
			} else {
				mmun_unwatch(watch);
				watch = NULL;
			}
		}
		rounds++;
	}
	mmun_unwatch(watch);
	return NULL;
}

int main(int argc, char **argv)
{
	const struct mmun_options options = {sizeof(options), MMUN_SOURCE_OWN, MMUN_SOURCE_OWN};
	const long milliseconds = argc > 1 ? atol(argv[1]) : 1000;
	struct timespec time = {milliseconds / 1000, milliseconds % 1000 * 1000000};
	pthread_t threads[THREADS];

	CHECK(mmun_open(&options, &mmun) == 0);
	for (uintptr_t i = 0; i < THREADS; i++)
		CHECK(pthread_create(&threads[i], NULL, work, (void *)i) == 0);
	nanosleep(&time, NULL);
	done = true;
	for (int i = 0; i < THREADS; i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
	mmu_notifier_synchronize();
	CHECK(made == freed && made > 0 && touched > 0);
	mmun_close(mmun);
	printf("%ld rounds, %ld objects\nok\n", (long)rounds, (long)made);
	return 0;
}
