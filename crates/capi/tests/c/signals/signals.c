/*
 * mmun_watch_valid() in a signal handler, while the interrupted thread is inside the other
 * functions. The arguments are the source (own, hook or kernel) and the number of signals.
 *
 * If mmun_watch_valid() took a lock that the interrupted thread holds, the handler would hang. Then
 * alarm() ends the program.
 */
#define _GNU_SOURCE
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
#include <unistd.h>

#define PAGE ((size_t)sysconf(_SC_PAGESIZE))

static bool by_kernel;
static struct mmun *mmun;
static struct mmun_watch *kept, *touched;
static pthread_t interrupted;
static atomic_bool done;
static atomic_long handled, valid;
static __thread volatile sig_atomic_t in_handler __attribute__((tls_model("initial-exec")));

void *__libc_malloc(size_t size);
void __libc_free(void *memory);

/* Replaces malloc() and free() of the program and of the library. */
void *malloc(size_t size)
{
	if (in_handler)
		abort();
	return __libc_malloc(size);
}

void free(void *memory)
{
	if (in_handler)
		abort();
	__libc_free(memory);
}

static void ask(int number)
{
	const int before = errno;
	bool is_valid;

	(void)number;
	in_handler = 1;
	is_valid = mmun_watch_valid(kept);
	CHECK(is_valid || by_kernel); /* With the kernel source, it may be false without a change. */
	CHECK(!mmun_watch_valid(touched));
	CHECK(!mmun_watch_valid(NULL));
	in_handler = 0;
	CHECK(errno == before);
	atomic_fetch_add(&valid, is_valid);
}

static void handler(int number)
{
	ask(number);
	atomic_fetch_add(&handled, 1);
}

static void *interrupt(void *signals)
{
	/* Send the next signal only when the previous signal has been handled, because pending
	 * signals of the same number are merged. */
	for (long sent = 0; sent < *(long *)signals; sent++) {
		alarm(120); /* A limit for each signal: a busy machine takes minutes for thousands of them. */
		CHECK(pthread_kill(interrupted, SIGUSR1) == 0);
		while (atomic_load(&handled) <= sent)
			sched_yield();
	}
	atomic_store(&done, true);
	return NULL;
}

static char *map(void)
{
	char *memory = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(memory != MAP_FAILED);
	memory[0] = 1;
	return memory;
}

static void unmap(char *memory)
{
	struct mmu_notifier_range range;

	mmu_notifier_range_init(&range, MMU_NOTIFY_UNMAP, MMU_NOTIFIER_RANGE_BLOCKABLE, mmun_current_mm(),
				(unsigned long)memory, (unsigned long)memory + PAGE);
	mmu_notifier_invalidate_range_start(&range);
	CHECK(munmap(memory, PAGE) == 0);
	mmu_notifier_invalidate_range_end(&range);
}

/* Raises a signal inside a callback, and so inside an invalidation. */
static void changed(void *context, const struct mmun_change *change)
{
	(void)change;
	if (pthread_equal(pthread_self(), interrupted) && !*(bool *)context) {
		*(bool *)context = true;
		CHECK(raise(SIGUSR2) == 0);
	}
}

static int reg(void *context, void *address, size_t length, void **handle)
{
	(void)context;
	(void)length;
	*handle = address;
	return 0;
}

static void dereg(void *context, void *address, size_t length, void *handle)
{
	(void)context;
	(void)address;
	(void)length;
	(void)handle;
}

/* Uses each kind of handle, so that signals interrupt functions that hold the library's locks. */
static void use_everything(struct mmun_regcache *cache)
{
	const struct mmun_ops ops = {sizeof(ops), changed, changed};
	struct mmun_subscription *subscription;
	bool raised = false;
	struct mmun_watch *watch;
	struct mmun_lease lease;
	char *memory = map();

	CHECK(mmun_subscribe(mmun, &ops, &raised, &subscription) == 0);
	CHECK(mmun_watch(mmun, memory, PAGE, &watch) == 0);
	CHECK(mmun_watch_renew(watch) == 0);
	CHECK(mmun_regcache_get(cache, memory, PAGE, &lease) == 0);
	mmun_regcache_put(&lease);
	unmap(memory);
	CHECK(!mmun_watch_valid(watch));
	mmun_unwatch(watch);
	CHECK(mmun_settle(mmun) == 0);
	CHECK(mmun_unsubscribe(subscription) == 0);
	CHECK(raised || by_kernel); /* Callbacks of the kernel source may run in its own thread. */
}

int main(int argc, char **argv)
{
	const struct mmun_registrar registrar = {sizeof(registrar), NULL, reg, dereg, 0};
	struct mmun_options options = {sizeof(options), MMUN_SOURCE_OWN, MMUN_SOURCE_OWN};
	struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART};
	struct mmun_regcache *cache;
	pthread_t thread;
	char *memory;
	long signals;

	CHECK(argc == 3);
	signals = atol(argv[2]);
	by_kernel = !strcmp(argv[1], "kernel");
	if (by_kernel)
		options.sources = options.required = MMUN_SOURCE_KERNEL;
	else if (!strcmp(argv[1], "hook"))
		options.sources = options.required = MMUN_SOURCE_HOOK;
	alarm(120);
	interrupted = pthread_self();
	CHECK(mmun_open(&options, &mmun) == 0);
	CHECK(mmun_regcache_open(mmun, &registrar, NULL, &cache) == 0);
	/*
	 * Without access, because the kernel changes other memory by itself: to merge pages into huge
	 * ones, and to learn which node of the machine uses them. The kernel source reports that.
	 */
	memory = map();
	CHECK(mprotect(memory, PAGE, PROT_NONE) == 0);
	CHECK(mmun_watch(mmun, memory, PAGE, &kept) == 0);
	memory = map();
	CHECK(mmun_watch(mmun, memory, PAGE, &touched) == 0);
	unmap(memory);
	CHECK(mmun_watch_valid(kept) && !mmun_watch_valid(touched));

	CHECK(sigaction(SIGUSR1, &action, NULL) == 0);
	action.sa_handler = ask; /* For the signal that `changed` raises in a callback. */
	CHECK(sigaction(SIGUSR2, &action, NULL) == 0);
	CHECK(pthread_create(&thread, NULL, interrupt, &signals) == 0);
	while (!atomic_load(&done))
		use_everything(cache);
	CHECK(pthread_join(thread, NULL) == 0);
	CHECK(atomic_load(&handled) == signals && atomic_load(&valid) > 0);
	CHECK(mmun_watch_valid(kept));
	printf("ok %ld signals\n", signals);
	return 0;
}
