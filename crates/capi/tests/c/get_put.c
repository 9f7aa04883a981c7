/* Get, put, and the time of the free: S-01 to S-36 of the contract. */
#include "check.h"

SCENARIO(s_01_a_first_get_allocates_once)
{
	struct mm_struct *mm = mmun_mm_new();
	int before = allocs;
	struct probe *probe = got(mm, &ops, 1);

	CHECK(allocs == before + 1 && probe->mn.mm == mm && probe->mn.ops == &ops && mm_has_notifiers(mm));
	mmu_notifier_put(&probe->mn);
	CHECK(!mm_has_notifiers(mm));
	mmput(mm);
}

SCENARIO(s_02_a_second_get_finds_the_same)
{
	struct mm_struct *mm = mmun_mm_new();
	struct probe *probe = got(mm, &ops, 1);
	int before = allocs;

	CHECK(got(mm, &ops, 2) == probe && allocs == before);
	mmu_notifier_put(&probe->mn);
	event(mm, 1);
	CHECK(probe->count[START] == 1); /* S-20: the notifier is listed until the last put. */
	mmu_notifier_put(&probe->mn);
	mmu_notifier_synchronize();
	CHECK(allocs == frees);
	mmput(mm);
}

SCENARIO(s_03_s_04_the_key_is_the_table_and_the_address_space)
{
	struct mm_struct *mm = mmun_mm_new(), *mm2 = mmun_mm_new();
	const struct mmu_notifier_ops copy = ops;
	struct probe *one = got(mm, &ops, 1), *two = got(mm, &copy, 2), *three = got(mm2, &ops, 3);

	CHECK(one != two && one != three && two != three);
	mmu_notifier_put(&one->mn);
	mmu_notifier_put(&two->mn);
	mmu_notifier_put(&three->mn);
	mmu_notifier_synchronize(); /* Frees the notifier of `copy` before `copy` ends. */
	mmput(mm);
	mmput(mm2);
}

SCENARIO(s_05_an_error_of_alloc_comes_back_as_it_is)
{
	struct mm_struct *mm = mmun_mm_new();
	int before = frees;

	CHECK(PTR_ERR(mmu_notifier_get(&failing_ops, mm)) == -ENODEV);
	CHECK(PTR_ERR(mmu_notifier_get(&bare_ops, mm)) == -EINVAL);
	CHECK(PTR_ERR(mmu_notifier_get(NULL, mm)) == -EINVAL && PTR_ERR(mmu_notifier_get(&ops, NULL)) == -EINVAL);
	CHECK(frees == before && !mm_has_notifiers(mm));
	mmput(mm);
}

SCENARIO(s_10_a_full_count_is_an_error)
{
	struct mm_struct *mm = mmun_mm_new();
	struct probe *probe = got(mm, &ops, 1);
	/* 2^32 gets would take a minute. So the test writes the count directly, at its present
	 * offset. */
	unsigned int *users = (unsigned int *)(void *)((char *)probe->mn.mmun_private + 44);

	CHECK(*users == 1);
	*users = 0xffffffffu;
	CHECK(PTR_ERR(mmu_notifier_get(&ops, mm)) == -EOVERFLOW && *users == 0xffffffffu);
	mmu_notifier_put(&probe->mn);
	CHECK(got(mm, &ops, 2) == probe);
	*users = 1;
	mmu_notifier_put(&probe->mn);
	mmput(mm);
}

static struct probe *all_got[8];

static void *get_one(void *mm)
{
	static atomic_int turn;

	all_got[atomic_fetch_add(&turn, 1) % 8] = probe_of(mmu_notifier_get(&ops, mm));
	return NULL;
}

SCENARIO(s_11_s_28_many_getters_and_putters_one_object)
{
	struct mm_struct *mm = mmun_mm_new();
	pthread_t threads[8];
	int i, before = allocs;

	for (i = 0; i < 8; i++)
		threads[i] = spawn(get_one, mm);
	for (i = 0; i < 8; i++)
		join(threads[i]);
	CHECK(allocs == before + 1);
	for (i = 0; i < 8; i++)
		CHECK(all_got[i] == all_got[0]);
	for (i = 0; i < 8; i++) {
		CHECK(mm_has_notifiers(mm));
		mmu_notifier_put(&all_got[0]->mn);
	}
	mmu_notifier_synchronize();
	CHECK(allocs == frees);
	mmput(mm);
}

SCENARIO(s_13_get_on_an_ended_address_space)
{
	struct mm_struct *mm = mmun_mm_new();
	int before = allocs;
	struct probe *probe = probe_new(1, &ops);

	mmgrab(mm);
	mmput(mm);
	CHECK(!mmget_not_zero(mm));
	CHECK(PTR_ERR(mmu_notifier_get(&ops, mm)) == -ESRCH && allocs == before);
	CHECK(mmu_notifier_register(&probe->mn, mm) == -ESRCH);
	free(probe);
	mmdrop(mm);
}

static void get_under_the_lock(void)
{
	struct mm_struct *mm = mmun_mm_new();

	mmap_write_lock(mm);
	mmap_write_lock(mm);
}

SCENARIO(s_14_get_locked_under_the_lock)
{
	struct mm_struct *mm = mmun_mm_new();
	struct mmu_notifier *mn;

	CHECK(PTR_ERR(mmu_notifier_get_locked(&ops, mm)) == -EINVAL); /* The thread does not hold the lock. */
	mmap_write_lock(mm);
	CHECK(PTR_ERR(mmu_notifier_get(&ops, mm)) == -EDEADLK);
	mn = mmu_notifier_get_locked(&ops, mm);
	CHECK(!IS_ERR(mn));
	CHECK(mmu_notifier_get(&ops, mm) == mn); /* Needs no lock. */
	mmap_write_unlock(mm);
	mmu_notifier_put(mn);
	mmu_notifier_put(mn);
	mmput(mm);
	CHECK(aborts(get_under_the_lock));
}

SCENARIO(s_15_s_16_s_34_get_finds_what_was_registered_the_newest_first)
{
	struct mm_struct *mm = mmun_mm_new();
	struct probe *one = probe_new(1, &ops), *two = probe_new(2, &ops);
	int before = frees;

	CHECK(mmu_notifier_register(&one->mn, mm) == 0 && mmu_notifier_register(&two->mn, mm) == 0);
	CHECK(mmu_notifier_get(&ops, mm) == &two->mn);
	mmu_notifier_put(&two->mn);
	mmu_notifier_put(&two->mn);
	CHECK(mmu_notifier_get(&ops, mm) == &one->mn);
	mmu_notifier_put(&one->mn);
	mmu_notifier_put(&one->mn);
	mmu_notifier_synchronize();
	CHECK(frees == before + 2);
	allocs += 2;
	mmput(mm);
}

static struct mm_struct *inherited_mm;
static struct probe *inherited;

static void in_the_child(void)
{
	struct mm_struct *mine = mmun_mm_new();
	struct probe *probe;
	int before = inherited->count[START];

	event(inherited_mm, 1);
	CHECK(inherited->count[START] == before && !mm_has_notifiers(inherited_mm));
	CHECK(PTR_ERR(mmu_notifier_get(&ops, inherited_mm)) == -ESRCH && !mmget_not_zero(inherited_mm));
	mmu_notifier_put(&inherited->mn);
	mmu_notifier_unregister(&inherited->mn, inherited_mm);
	mmu_notifier_synchronize();
	CHECK(inherited->count[FREE] == 0);
	probe = got(mine, &ops, 5);
	event(mine, 1);
	CHECK(probe->count[START] == 1);
	mmu_notifier_put(&probe->mn);
	mmu_notifier_synchronize();
	mmput(mine);
	mmput(inherited_mm);
	CHECK(mmun_current_mm() != NULL);
}

SCENARIO(s_17_a_child_starts_without_subscribers)
{
	inherited_mm = mmun_mm_new();
	inherited = got(inherited_mm, &ops, 1);
	CHECK(child_succeeds(in_the_child));
	event(inherited_mm, 1);
	CHECK(inherited->count[START] == 1);
	mmu_notifier_put(&inherited->mn);
	mmput(inherited_mm);
}

static void *tell(void *mm)
{
	event(mm, 1);
	return NULL;
}

SCENARIO(s_21_s_22_s_26_s_35_a_put_under_a_walker)
{
	struct mm_struct *mm = mmun_mm_new();
	struct probe *old, *new;
	pthread_t walker;
	int before = frees;

	gate_reset();
	next_hook = stop_at_start;
	old = got(mm, &ops, 1);
	next_hook = NULL;
	walker = spawn(tell, mm);
	sem_wait(&gate.arrived);
	mmu_notifier_put(&old->mn); /* Returns although the walker is in the callback. */
	CHECK(frees == before && !mm_has_notifiers(mm));
	/* The next get does not find the notifier, and makes another notifier. Registering waits
	 * for the walker, so let the walker continue first. */
	sem_post(&gate.open);
	new = got(mm, &ops, 2);
	CHECK(new != old || frees == before + 1);
	join(walker);
	mmu_notifier_synchronize();
	CHECK(frees == before + 1);
	event(mm, 1);
	CHECK(new->count[START] == 1);
	mmu_notifier_put(&new->mn);
	mmput(mm);
}

static void put_inside(struct probe *probe, enum at at, const struct mmu_notifier_range *range)
{
	(void)range;
	if (at == START || at == RELEASE)
		mmu_notifier_put(&probe->mn);
}

SCENARIO(s_30_s_31_s_32_s_33_a_put_in_the_callback)
{
	struct mm_struct *mm = mmun_mm_new();
	struct probe *behind = got(mm, &other_ops, 1);
	int before = frees;

	next_hook = put_inside;
	(void)got(mm, &ops, 2);
	next_hook = NULL;
	forget();
	event(mm, 1);
	mmu_notifier_synchronize();
	CHECK(behind->count[START] == 1 && behind->count[END] == 1);
	CHECK(names(START) == 21 && names(END) == 1 && names(RELEASE) == 0 && frees == before + 1);
	mmu_notifier_put(&behind->mn);
	mmput(mm);
}

SCENARIO(s_29_a_surplus_put_is_a_warning)
{
	struct mm_struct *mm = mmun_mm_new();
	struct probe *probe = got(mm, &ops, 1);
	struct mmu_notifier_range range;
	int before = frees;

	mmu_notifier_range_init(&range, MMU_NOTIFY_CLEAR, 0, mm, PAGE, 2 * PAGE);
	mmu_notifier_invalidate_range_start(&range); /* Delays the free. */
	mmu_notifier_put(&probe->mn);
	mmu_notifier_put(&probe->mn);
	mmu_notifier_invalidate_range_end(&range);
	mmu_notifier_synchronize();
	CHECK(frees == before + 1);
	mmput(mm);
}

#define TURNS 20000
static atomic_bool stopping;

static void *get_and_put(void *mm)
{
	while (!stopping) {
		struct mmu_notifier *mn = mmu_notifier_get(&ops, mm);

		CHECK(!IS_ERR(mn) && probe_of(mn)->count[FREE] == 0);
		mmu_notifier_put(mn);
	}
	return NULL;
}

SCENARIO(s_27_gets_racing_last_puts)
{
	struct mm_struct *mm = mmun_mm_new();
	pthread_t threads[2];
	int i;

	stopping = false;
	threads[0] = spawn(get_and_put, mm);
	threads[1] = spawn(get_and_put, mm);
	for (i = 0; i < TURNS; i++)
		event(mm, 1);
	stopping = true;
	join(threads[0]);
	join(threads[1]);
	mmu_notifier_synchronize();
	CHECK(allocs == frees);
	mmput(mm);
}

SCENARIO(s_90_many_puts_under_a_stuck_reader)
{
	struct mm_struct *mm = mmun_mm_new();
	struct mmu_notifier_range range;
	struct probe *probes[1000];
	int i, before = frees;

	for (i = 0; i < 1000; i++) {
		probes[i] = probe_new(1, &ops);
		CHECK(mmu_notifier_register(&probes[i]->mn, mm) == 0);
	}
	mmu_notifier_range_init(&range, MMU_NOTIFY_CLEAR, 0, mm, PAGE, 2 * PAGE);
	mmu_notifier_invalidate_range_start(&range);
	for (i = 0; i < 1000; i++)
		mmu_notifier_put(&probes[i]->mn);
	CHECK(frees == before);
	mmu_notifier_invalidate_range_end(&range);
	mmu_notifier_synchronize();
	CHECK(frees == before + 1000);
	allocs += 1000;
	mmput(mm);
}

void get_put(void)
{
	RUN(s_01_a_first_get_allocates_once);
	RUN(s_02_a_second_get_finds_the_same);
	RUN(s_03_s_04_the_key_is_the_table_and_the_address_space);
	RUN(s_05_an_error_of_alloc_comes_back_as_it_is);
	RUN(s_10_a_full_count_is_an_error);
	RUN(s_11_s_28_many_getters_and_putters_one_object);
	RUN(s_13_get_on_an_ended_address_space);
	RUN(s_14_get_locked_under_the_lock);
	RUN(s_15_s_16_s_34_get_finds_what_was_registered_the_newest_first);
	RUN(s_17_a_child_starts_without_subscribers);
	RUN(s_21_s_22_s_26_s_35_a_put_under_a_walker);
	RUN(s_29_a_surplus_put_is_a_warning);
	RUN(s_30_s_31_s_32_s_33_a_put_in_the_callback);
	RUN(s_27_gets_racing_last_puts);
	RUN(s_90_many_puts_under_a_stuck_reader);
}
