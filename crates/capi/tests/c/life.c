/* Exit, register and unregister, synchronize: S-40 to S-89 of the contract. */
#include "check.h"

static void *put_mm(void *mm)
{
	mmput(mm);
	return NULL;
}

SCENARIO(s_40_s_42_s_43_s_45_exit_releases_newest_first)
{
	struct mm_struct *mm = mmun_mm_new();
	struct probe *one = got(mm, &ops, 1), *two = probe_new(2, &ops), *quiet = got(mm, &other_ops, 3);
	int before = frees;

	CHECK(mmu_notifier_register(&two->mn, mm) == 0);
	mmgrab(mm);
	forget();
	mmput(mm);
	CHECK(names(RELEASE) == 21 && !mm_has_notifiers(mm));
	event(mm, 1);
	CHECK(names(START) == 0);
	mmu_notifier_put(&one->mn);
	mmu_notifier_put(&two->mn);
	mmu_notifier_put(&quiet->mn);
	mmu_notifier_synchronize();
	CHECK(frees == before + 3 && names(RELEASE) == 21);
	allocs++;
	mmdrop(mm);
}

SCENARIO(s_41_s_44_s_53_exit_waits_for_release_and_events_go_on)
{
	struct mm_struct *mm = mmun_mm_new(), *mm2 = mmun_mm_new();
	struct probe *probe, *far = got(mm2, &ops, 9);
	pthread_t exiting;

	gate_reset();
	next_hook = stop_at_release;
	probe = got(mm, &ops, 1);
	next_hook = NULL;
	mmgrab(mm);
	exiting = spawn(put_mm, mm);
	sem_wait(&gate.arrived);
	CHECK(mm_has_notifiers(mm)); /* Exit delists a notifier only when release has returned. */
	event(mm, 1);
	CHECK(probe->count[START] == 1 && far->count[RELEASE] == 0);
	sem_post(&gate.open);
	join(exiting);
	CHECK(!mm_has_notifiers(mm));
	mmu_notifier_put(&probe->mn);
	mmu_notifier_put(&far->mn);
	mmdrop(mm);
	mmput(mm2);
}

static void put_in_release(struct probe *probe, enum at at, const struct mmu_notifier_range *range)
{
	(void)range;
	if (at == RELEASE)
		mmu_notifier_put(&probe->mn);
}

SCENARIO(s_46_a_put_in_release)
{
	struct mm_struct *mm = mmun_mm_new();
	int before = frees;

	next_hook = put_in_release;
	(void)got(mm, &ops, 1);
	next_hook = NULL;
	mmput(mm);
	mmu_notifier_synchronize();
	CHECK(frees == before + 1);
}

static void *unregister(void *argument)
{
	struct probe *probe = argument;

	mmu_notifier_unregister(&probe->mn, probe->mn.mm);
	return NULL;
}

SCENARIO(s_48_s_49_s_51_unregister_and_exit)
{
	struct mm_struct *mm = mmun_mm_new();
	struct probe *probe = probe_new(1, &ops);
	pthread_t unregistering, exiting;

	gate_reset();
	probe->hook = stop_at_release;
	CHECK(mmu_notifier_register(&probe->mn, mm) == 0);
	mmgrab(mm);
	unregistering = spawn(unregister, probe);
	sem_wait(&gate.arrived);
	exiting = spawn(put_mm, mm);
	sem_wait(&gate.arrived); /* release runs twice at once. */
	CHECK(probe->count[RELEASE] == 2);
	sem_post(&gate.open);
	sem_post(&gate.open);
	join(unregistering);
	join(exiting);
	mmdrop(mm);
	/* Exit first: no second release. */
	mm = mmun_mm_new();
	memset(probe, 0, sizeof(*probe));
	probe->mn.ops = &ops;
	CHECK(mmu_notifier_register(&probe->mn, mm) == 0);
	mmgrab(mm);
	mmput(mm);
	mmu_notifier_unregister(&probe->mn, mm);
	CHECK(probe->count[RELEASE] == 1 && probe->count[FREE] == 0);
	mmdrop(mm);
	free(probe);
}

SCENARIO(s_60_s_70_register_unregister_and_again)
{
	struct mm_struct *mm = mmun_mm_new();
	struct probe *probe = probe_new(1, &ops);
	int i;

	for (i = 1; i <= 3; i++) {
		CHECK(mmu_notifier_register(&probe->mn, mm) == 0);
		event(mm, 1);
		CHECK(probe->count[START] == i && probe->count[END] == i);
		mmu_notifier_unregister(&probe->mn, mm);
		event(mm, 1);
		CHECK(probe->count[RELEASE] == i && probe->count[START] == i && probe->count[FREE] == 0);
	}
	mmap_write_lock(mm);
	CHECK(__mmu_notifier_register(&probe->mn, mm) == 0);
	mmap_write_unlock(mm);
	mmu_notifier_unregister(&probe->mn, mm);
	CHECK(__mmu_notifier_register(&probe->mn, mm) == -EINVAL);
	free(probe);
	mmput(mm);
}

static atomic_bool left;

static void *tell_and_leave(void *mm)
{
	event(mm, 1);
	return NULL;
}

static void leave(struct probe *probe, enum at at, const struct mmu_notifier_range *range)
{
	stop_at_start(probe, at, range);
	if (at == END)
		left = true;
}

SCENARIO(s_61_unregister_waits_for_a_walker)
{
	struct mm_struct *mm = mmun_mm_new();
	struct probe *probe = probe_new(1, &ops), *second = probe_new(2, &other_ops);
	pthread_t walker, unregistering;

	gate_reset();
	left = false;
	second->hook = leave;
	CHECK(mmu_notifier_register(&second->mn, mm) == 0 && mmu_notifier_register(&probe->mn, mm) == 0);
	walker = spawn(tell_and_leave, mm);
	sem_wait(&gate.arrived);
	unregistering = spawn(unregister, probe);
	AWAIT(probe->count[RELEASE] == 1);
	sem_post(&gate.open);
	join(unregistering);
	CHECK(left); /* unregister has waited for the end of the whole invalidation. */
	join(walker);
	mmu_notifier_unregister(&second->mn, mm);
	free(probe);
	free(second);
	mmput(mm);
}

static void unregister_inside(struct probe *probe, enum at at, const struct mmu_notifier_range *range)
{
	if (at == START)
		mmu_notifier_unregister(&probe->mn, range->mm);
}

static void synchronize_inside(struct probe *probe, enum at at, const struct mmu_notifier_range *range)
{
	(void)probe, (void)range;
	if (at == START || at == FREE)
		mmu_notifier_synchronize();
}

static void dies_in_unregister(void)
{
	struct mm_struct *mm = mmun_mm_new();
	struct probe *probe = probe_new(1, &ops);

	probe->hook = unregister_inside;
	CHECK(mmu_notifier_register(&probe->mn, mm) == 0);
	event(mm, 1);
}

static void dies_in_synchronize(void)
{
	struct mm_struct *mm = mmun_mm_new();

	next_hook = synchronize_inside;
	(void)got(mm, &ops, 1);
	event(mm, 1);
}

static void dies_in_synchronize_when_freed(void)
{
	struct mm_struct *mm = mmun_mm_new();

	next_hook = synchronize_inside;
	mmu_notifier_put(&got(mm, &ops, 1)->mn);
	mmu_notifier_synchronize();
}

static void dies_of_null(void)
{
	mmu_notifier_put(NULL);
}

SCENARIO(s_62_s_87_waits_for_oneself_end_the_process)
{
	CHECK(aborts(dies_in_unregister) && aborts(dies_in_synchronize) && aborts(dies_in_synchronize_when_freed));
	CHECK(aborts(dies_of_null));
}

SCENARIO(s_65_a_failed_register_leaves_the_object_as_it_was)
{
	struct mm_struct *mm = mmun_mm_new(), *before = mmun_mm_new();
	struct probe *probe = probe_new(1, &ops);
	struct mmu_notifier_range range;

	probe->mn.mm = before;
	mmu_notifier_range_init(&range, MMU_NOTIFY_CLEAR, 0, mm, PAGE, 2 * PAGE);
	mmu_notifier_invalidate_range_start(&range);
	CHECK(mmu_notifier_register(&probe->mn, mm) == -EDEADLK && probe->mn.mm == before);
	CHECK(PTR_ERR(mmu_notifier_get(&ops, mm)) == -EDEADLK);
	mmu_notifier_invalidate_range_end(&range);
	CHECK(mmu_notifier_register(&probe->mn, mm) == 0);
	mmu_notifier_unregister(&probe->mn, mm);
	free(probe);
	mmput(mm);
	mmput(before);
}

static atomic_bool ended;

static void *register_one(void *argument)
{
	struct probe *probe = argument;
	struct mm_struct *mm = probe->mn.mm;

	CHECK(mmu_notifier_register(&probe->mn, mm) == 0);
	CHECK(ended);
	return NULL;
}

SCENARIO(s_66_s_67_s_69_a_registrar_waits_for_open_brackets_which_nest)
{
	struct mm_struct *mm = mmun_mm_new();
	struct probe *probe = probe_new(1, &ops);
	struct mmu_notifier_range range;
	pthread_t registering;

	ended = false;
	mmu_notifier_range_init(&range, MMU_NOTIFY_CLEAR, 0, mm, PAGE, 2 * PAGE);
	mmu_notifier_invalidate_range_start(&range);
	probe->mn.mm = mm;
	registering = spawn(register_one, probe);
	AWAIT(mm_has_notifiers(mm));
	event(mm, 2); /* A nested invalidation, while the registering thread waits. */
	CHECK(probe->count[START] == probe->count[END]);
	ended = true;
	mmu_notifier_invalidate_range_end(&range);
	join(registering);
	CHECK(probe->count[START] == probe->count[END]);
	mmu_notifier_unregister(&probe->mn, mm);
	free(probe);
	mmput(mm);
}

static struct mm_struct *shared_mm;

static void *get_event_put(void *table)
{
	struct mmu_notifier *mn = mmu_notifier_get(table, shared_mm);

	event(shared_mm, 1);
	mmu_notifier_put(mn);
	return NULL;
}

SCENARIO(s_80_synchronize_waits_for_puts_of_other_threads)
{
	struct mmu_notifier_ops tables[8];
	pthread_t threads[8];
	int i, before = frees;

	shared_mm = mmun_mm_new();
	for (i = 0; i < 8; i++) {
		tables[i] = ops;
		threads[i] = spawn(get_event_put, &tables[i]);
	}
	for (i = 0; i < 8; i++)
		join(threads[i]);
	mmu_notifier_synchronize();
	CHECK(frees == before + 8);
	mmput(shared_mm);
}

static void *synchronize(void *done)
{
	mmu_notifier_synchronize();
	CHECK(frees == *(int *)done);
	return NULL;
}

SCENARIO(s_81_synchronize_waits_for_a_slow_free)
{
	struct mm_struct *mm = mmun_mm_new();
	int wanted = frees + 1;
	pthread_t waiting;

	gate_reset();
	next_hook = stop_at_free;
	mmu_notifier_put(&got(mm, &ops, 1)->mn);
	next_hook = NULL;
	sem_wait(&gate.arrived);
	waiting = spawn(synchronize, &wanted);
	sem_post(&gate.open);
	join(waiting);
	mmput(mm);
}

static struct mmu_notifier *kept;

static void put_another(struct probe *probe, enum at at, const struct mmu_notifier_range *range)
{
	(void)probe, (void)range;
	if (at == FREE)
		mmu_notifier_put(kept);
}

SCENARIO(s_88_a_free_that_puts)
{
	struct mm_struct *mm = mmun_mm_new();
	int before = frees;
	struct probe *probe;

	kept = &got(mm, &other_ops, 1)->mn;
	next_hook = put_another;
	probe = got(mm, &ops, 2);
	next_hook = NULL;
	mmu_notifier_put(&probe->mn);
	mmu_notifier_synchronize();
	mmu_notifier_synchronize();
	CHECK(frees == before + 2);
	mmput(mm);
}

#define EXITS 2000

SCENARIO(s_24_s_47_puts_racing_exit)
{
	int i, before = frees;

	for (i = 0; i < EXITS; i++) {
		struct mm_struct *mm = mmun_mm_new();
		struct probe *probe = got(mm, &ops, 1);
		pthread_t exiting = spawn(put_mm, mm);

		mmu_notifier_put(&probe->mn);
		join(exiting);
	}
	mmu_notifier_synchronize();
	CHECK(frees == before + EXITS);
}

void life(void)
{
	RUN(s_40_s_42_s_43_s_45_exit_releases_newest_first);
	RUN(s_41_s_44_s_53_exit_waits_for_release_and_events_go_on);
	RUN(s_46_a_put_in_release);
	RUN(s_48_s_49_s_51_unregister_and_exit);
	RUN(s_60_s_70_register_unregister_and_again);
	RUN(s_61_unregister_waits_for_a_walker);
	RUN(s_62_s_87_waits_for_oneself_end_the_process);
	RUN(s_65_a_failed_register_leaves_the_object_as_it_was);
	RUN(s_66_s_67_s_69_a_registrar_waits_for_open_brackets_which_nest);
	RUN(s_80_synchronize_waits_for_puts_of_other_threads);
	RUN(s_81_synchronize_waits_for_a_slow_free);
	RUN(s_88_a_free_that_puts);
	RUN(s_24_s_47_puts_racing_exit);
}
