/* Waits that must end, waits that must not happen, and waits that no signal interrupts. Also
 * objects that are made and freed at an unlucky time. */
#include "check.h"

#include <signal.h>

static struct mmu_notifier_range kept_open;

static struct mmu_notifier *alloc_and_open(struct mm_struct *mm)
{
	mmu_notifier_range_init(&kept_open, MMU_NOTIFY_CLEAR, MMU_NOTIFIER_RANGE_BLOCKABLE, mm, PAGE, 2 * PAGE);
	mmu_notifier_invalidate_range_start(&kept_open);
	return &probe_new(1, &ops)->mn;
}

static int freed_at_once;

static void free_at_once(struct mmu_notifier *mn)
{
	freed_at_once++;
	free(probe_of(mn));
}

SCENARIO(s_06_what_cannot_be_registered_is_freed_at_once)
{
	static const struct mmu_notifier_ops opening = {.alloc_notifier = alloc_and_open, .free_notifier = free_at_once};
	struct mm_struct *mm = mmun_mm_new();

	CHECK(PTR_ERR(mmu_notifier_get(&opening, mm)) == -EDEADLK && freed_at_once == 1);
	CHECK(!mm_has_notifiers(mm));
	mmu_notifier_invalidate_range_end(&kept_open);
	mmput(mm);
}

struct waiter {
	struct mm_struct *mm;
	struct probe *probe;
	atomic_bool done;
	int result;
};

static void *get_one(void *argument)
{
	struct waiter *waiter = argument;

	waiter->probe = probe_of(mmu_notifier_get(&ops, waiter->mm));
	atomic_store(&waiter->done, true);
	return NULL;
}

static void *register_one(void *argument)
{
	struct waiter *waiter = argument;

	waiter->result = mmu_notifier_register(&waiter->probe->mn, waiter->mm);
	atomic_store(&waiter->done, true);
	return NULL;
}

static atomic_int interruptions;

static void interrupted(int number)
{
	(void)number;
	atomic_fetch_add(&interruptions, 1);
}

/* No function returns -EINTR: during signals, get and register continue to wait, and the notifiers
 * that exist are not changed. */
SCENARIO(s_07_s_08_s_09_s_68_nothing_interrupts_a_registrar)
{
	struct sigaction action = {.sa_handler = interrupted};
	struct mm_struct *mm = mmun_mm_new();
	struct probe *old = got(mm, &other_ops, 1);
	struct waiter waiter = {.mm = mm}, second = {.mm = mm, .probe = probe_new(3, &bare_ops)};
	struct mmu_notifier_range range;
	pthread_t getting, registering;
	int seen = atomic_load(&interruptions);

	CHECK(sigaction(SIGUSR1, &action, NULL) == 0);
	mmu_notifier_range_init(&range, MMU_NOTIFY_CLEAR, 0, mm, PAGE, 2 * PAGE);
	mmu_notifier_invalidate_range_start(&range);
	next_name = 2;
	getting = spawn(get_one, &waiter);
	registering = spawn(register_one, &second);
	while (atomic_load(&interruptions) < seen + 6) {
		CHECK(pthread_kill(getting, SIGUSR1) == 0 && pthread_kill(registering, SIGUSR1) == 0);
		sched_yield();
	}
	CHECK(!waiter.done && !second.done);
	mmu_notifier_invalidate_range_end(&range);
	join(getting);
	join(registering);
	CHECK(!IS_ERR(&waiter.probe->mn) && second.result == 0 && old->count[START] == 1 && old->count[END] == 1);
	event(mm, 1);
	CHECK(old->count[START] == 2 && waiter.probe->count[START] >= 1 && second.probe->count[FREE] == 0);
	mmu_notifier_put(&old->mn);
	mmu_notifier_put(&waiter.probe->mn);
	mmu_notifier_put(&second.probe->mn);
	mmput(mm);
}

/* While mmu_notifier_get() waits for an open invalidation, later invalidations already call the new
 * notifier. */
SCENARIO(s_12_a_callback_may_come_before_get_returns)
{
	struct mm_struct *mm = mmun_mm_new();
	struct waiter waiter = {.mm = mm};
	struct mmu_notifier_range range;
	pthread_t getting;

	mmu_notifier_range_init(&range, MMU_NOTIFY_CLEAR, 0, mm, PAGE, 2 * PAGE);
	mmu_notifier_invalidate_range_start(&range);
	forget();
	next_name = 4;
	getting = spawn(get_one, &waiter);
	while (names(START) == 0)
		event(mm, 1);
	CHECK(!waiter.done);
	mmu_notifier_invalidate_range_end(&range);
	join(getting);
	CHECK(waiter.probe->name == 4 && waiter.probe->count[END] >= 1);
	mmu_notifier_put(&waiter.probe->mn);
	mmput(mm);
}

SCENARIO(s_20_a_put_that_is_not_the_last_changes_nothing)
{
	struct mm_struct *mm = mmun_mm_new();
	struct probe *probe = got(mm, &ops, 1);
	int before = atomic_load(&frees);

	CHECK(got(mm, &ops, 2) == probe);
	mmu_notifier_put(&probe->mn);
	mmu_notifier_synchronize();
	event(mm, 1);
	CHECK(probe->count[START] == 1 && probe->count[END] == 1 && atomic_load(&frees) == before);
	mmu_notifier_put(&probe->mn);
	mmput(mm);
}

static void *one_event(void *mm)
{
	event(mm, 1);
	return NULL;
}

/* A callback of one address space hangs. Meanwhile, in another address space, a notifier that was
 * put is freed, and synchronize and unregister return. */
SCENARIO(s_23_s_82_b_45_no_wait_for_another_address_space)
{
	struct mm_struct *mm = mmun_mm_new(), *stuck = mmun_mm_new();
	struct probe *probe = got(mm, &ops, 1), *far, *registered = probe_new(3, &ops);
	int before = atomic_load(&frees);
	pthread_t walking;

	gate_reset();
	next_hook = stop_at_start;
	far = got(stuck, &ops, 2);
	next_hook = NULL;
	CHECK(mmu_notifier_register(&registered->mn, mm) == 0);
	walking = spawn(one_event, stuck);
	sem_wait(&gate.arrived);
	mmu_notifier_synchronize(); /* Nothing was put. */
	mmu_notifier_put(&probe->mn);
	mmu_notifier_synchronize();
	CHECK(atomic_load(&frees) == before + 1);
	mmu_notifier_unregister(&registered->mn, mm);
	sem_post(&gate.open);
	join(walking);
	mmu_notifier_put(&far->mn);
	free(registered);
	mmput(mm);
	mmput(stuck);
}

/* A subscriber with a lock of its own. As soon as a thread has unlocked it, the last put of another
 * thread may free the subscriber. */
struct locked {
	pthread_mutex_t lock;
	struct mmu_notifier mn;
	int users;
};

static atomic_int locked_frees;

static struct mmu_notifier *alloc_locked(struct mm_struct *mm)
{
	struct locked *locked = calloc(1, sizeof(*locked));

	(void)mm;
	CHECK(locked && pthread_mutex_init(&locked->lock, NULL) == 0);
	return &locked->mn;
}

static void free_locked(struct mmu_notifier *mn)
{
	struct locked *locked = container_of(mn, struct locked, mn);

	CHECK(pthread_mutex_destroy(&locked->lock) == 0);
	memset(locked, 0xee, sizeof(*locked));
	free(locked);
	atomic_fetch_add(&locked_frees, 1);
}

static const struct mmu_notifier_ops locked_ops = {.alloc_notifier = alloc_locked, .free_notifier = free_locked};

static void *unlock_and_put(void *argument)
{
	struct locked *locked = argument;

	pthread_mutex_lock(&locked->lock);
	locked->users--;
	pthread_mutex_unlock(&locked->lock);
	mmu_notifier_put(&locked->mn);
	return NULL;
}

SCENARIO(s_36_unlock_then_put)
{
	struct mm_struct *mm = mmun_mm_new();
	int round, i;

	for (round = 0; round < 50; round++) {
		pthread_t thread[3];
		struct locked *locked = NULL;

		for (i = 0; i < 3; i++)
			locked = container_of(mmu_notifier_get(&locked_ops, mm), struct locked, mn);
		locked->users = 3;
		for (i = 0; i < 3; i++)
			thread[i] = spawn(unlock_and_put, locked);
		for (i = 0; i < 3; i++)
			join(thread[i]);
	}
	mmu_notifier_synchronize();
	CHECK(atomic_load(&locked_frees) == 50);
	mmput(mm);
}

static void *unregister(void *argument)
{
	struct probe *probe = argument;

	mmu_notifier_unregister(&probe->mn, probe->mn.mm);
	return NULL;
}

/* As long as release runs, a change of the address space still calls the subscriber. */
SCENARIO(s_50_no_subscriber_is_delisted_before_its_release_has_returned)
{
	struct mm_struct *mm = mmun_mm_new();
	struct probe *probe = probe_new(1, &ops);
	pthread_t unregistering;

	gate_reset();
	probe->hook = stop_at_release;
	CHECK(mmu_notifier_register(&probe->mn, mm) == 0);
	unregistering = spawn(unregister, probe);
	sem_wait(&gate.arrived);
	event(mm, 1);
	CHECK(probe->count[START] == 1 && probe->count[END] == 1);
	sem_post(&gate.open);
	join(unregistering);
	event(mm, 1);
	CHECK(probe->count[START] == 1);
	free(probe);
	mmput(mm);
}

/* A subscriber holds a handle of its address space. */
SCENARIO(s_52_a_subscriber_keeps_its_address_space)
{
	struct mm_struct *mm = mmun_mm_new();
	struct probe *probe = got(mm, &ops, 1);

	mmput(mm); /* This program's only handle. */
	CHECK(probe->mn.mm == mm && !mmget_not_zero(probe->mn.mm) && !mm_has_notifiers(probe->mn.mm));
	event(probe->mn.mm, 1);
	CHECK(probe->count[RELEASE] == 1 && probe->count[START] == 0);
	mmu_notifier_put(&probe->mn);
}

static atomic_bool enough;

static void *events_without_end(void *mm)
{
	while (!atomic_load(&enough))
		event(mm, 1);
	return NULL;
}

SCENARIO(s_83_synchronize_ends_though_readers_never_do)
{
	struct mm_struct *mm = mmun_mm_new();
	int before = atomic_load(&frees), i;
	pthread_t reading[2];

	atomic_store(&enough, false);
	for (i = 0; i < 2; i++)
		reading[i] = spawn(events_without_end, mm);
	for (i = 0; i < 20; i++)
		mmu_notifier_put(&got(mm, &ops, 1)->mn);
	mmu_notifier_synchronize();
	CHECK(atomic_load(&frees) == before + 20);
	atomic_store(&enough, true);
	for (i = 0; i < 2; i++)
		join(reading[i]);
	mmput(mm);
}

static void *put_one(void *mn)
{
	mmu_notifier_put(mn);
	return NULL;
}

/* Another thread makes the last put inside two nested invalidations. The end of the inner one must
 * not free the notifier. */
SCENARIO(s_84_a_nested_reader_is_waited_for)
{
	struct mm_struct *mm = mmun_mm_new();
	struct probe *probe = got(mm, &ops, 1);
	int before = atomic_load(&frees);
	struct mmu_notifier_range outer, inner;

	mmu_notifier_range_init(&outer, MMU_NOTIFY_CLEAR, 0, mm, PAGE, 2 * PAGE);
	mmu_notifier_range_init(&inner, MMU_NOTIFY_CLEAR, 0, mm, PAGE, 2 * PAGE);
	mmu_notifier_invalidate_range_start(&outer);
	mmu_notifier_invalidate_range_start(&inner);
	join(spawn(put_one, &probe->mn));
	mmu_notifier_invalidate_range_end(&inner);
	event(mm, 1);
	CHECK(atomic_load(&frees) == before && probe->count[START] == 2);
	mmu_notifier_invalidate_range_end(&outer);
	mmu_notifier_synchronize();
	CHECK(atomic_load(&frees) == before + 1);
	mmput(mm);
}

static struct probe *to_put;

static void put_another(struct probe *probe, enum at at, const struct mmu_notifier_range *range)
{
	(void)probe, (void)range;
	if (at == START)
		mmu_notifier_put(&to_put->mn);
}

/* One subscriber accepts. Then the subscriber that refuses puts the first one, which therefore gets
 * no end. */
SCENARIO(b_05_a_put_between_acceptance_and_undoing)
{
	struct mm_struct *mm = mmun_mm_new();
	struct probe *refusing, *accepting;
	struct mmu_notifier_range range;
	int before = atomic_load(&frees);

	next_hook = put_another;
	refusing = got(mm, &ops, 1); /* The older subscriber is called last. */
	next_hook = NULL;
	refusing->refuse = -EAGAIN;
	accepting = to_put = got(mm, &other_ops, 2);
	CHECK(accepting != refusing);
	forget();
	mmu_notifier_range_init(&range, MMU_NOTIFY_CLEAR, 0, mm, PAGE, 2 * PAGE);
	CHECK(mmu_notifier_invalidate_range_start_nonblock(&range) == -EAGAIN);
	CHECK(names(START) == 21 && names(END) == 0);
	mmu_notifier_synchronize();
	CHECK(atomic_load(&frees) == before + 1);
	refusing->hook = NULL;
	mmu_notifier_put(&refusing->mn);
	mmput(mm);
}

/* After synchronize, the library calls no function of the driver, so the driver's table may be
 * freed. */
SCENARIO(b_46_a_driver_that_is_unloaded)
{
	struct mm_struct *mm = mmun_mm_new();
	struct mmu_notifier_ops *table = malloc(sizeof(*table));
	struct probe *probe;

	CHECK(table);
	*table = ops;
	probe = got(mm, table, 1);
	event(mm, 1);
	CHECK(probe->count[START] == 1);
	mmu_notifier_put(&probe->mn);
	mmu_notifier_synchronize();
	memset(table, 0xee, sizeof(*table));
	free(table);
	event(mm, 1);
	mmput(mm);
}

void waits(void)
{
	RUN(s_06_what_cannot_be_registered_is_freed_at_once);
	RUN(s_07_s_08_s_09_s_68_nothing_interrupts_a_registrar);
	RUN(s_12_a_callback_may_come_before_get_returns);
	RUN(s_20_a_put_that_is_not_the_last_changes_nothing);
	RUN(s_23_s_82_b_45_no_wait_for_another_address_space);
	RUN(s_36_unlock_then_put);
	RUN(s_50_no_subscriber_is_delisted_before_its_release_has_returned);
	RUN(s_52_a_subscriber_keeps_its_address_space);
	RUN(s_83_synchronize_ends_though_readers_never_do);
	RUN(s_84_a_nested_reader_is_waited_for);
	RUN(b_05_a_put_between_acceptance_and_undoing);
	RUN(b_46_a_driver_that_is_unloaded);
}
