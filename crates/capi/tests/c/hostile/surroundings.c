/* Signals, and processes that lack /proc, /dev or room for files. */
#include "hostile.h"

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/prctl.h>

static atomic_ulong handled;

static void on_signal(int number)
{
	(void)number;
	atomic_fetch_add(&handled, 1);
}

static pthread_t interrupted;
static atomic_bool done;

static void *interrupt(void *unused)
{
	while (!atomic_load(&done)) {
		CHECK(pthread_kill(interrupted, SIGUSR1) == 0);
		sched_yield();
	}
	return unused;
}

/* Without SA_RESTART a signal can interrupt every system call. */
static void signals_come_all_the_time(void)
{
	struct sigaction action;
	pthread_t thread;
	int i;

	memset(&action, 0, sizeof(action));
	action.sa_handler = on_signal;
	CHECK(sigaction(SIGUSR1, &action, NULL) == 0);
	interrupted = pthread_self();
	thread = spawn(interrupt, NULL);
	while (atomic_load(&handled) == 0)
		sched_yield();
	for (i = 0; i < 20; i++)
		everything();
	atomic_store(&done, true);
	CHECK(pthread_join(thread, NULL) == 0);
}

/* A thread of the library must not handle the program's signals. */
static void signals_are_for_the_threads_of_the_program(void)
{
	sigset_t all, old;
	struct mmun *mmun;
	const struct timespec none = {0, 0};

	mmun = opened();
	everything();
	CHECK(sigfillset(&all) == 0 && pthread_sigmask(SIG_SETMASK, &all, &old) == 0);
	signal(SIGUSR2, on_signal);
	CHECK(kill(getpid(), SIGUSR2) == 0);
	everything();
	/* Still pending: no thread of the library has handled it. */
	CHECK(atomic_load(&handled) == 0 && sigtimedwait(&all, NULL, &none) == SIGUSR2);
	mmun_close(mmun);
}

static void all_signals_are_blocked(void)
{
	sigset_t all;

	CHECK(sigfillset(&all) == 0 && pthread_sigmask(SIG_SETMASK, &all, NULL) == 0);
	everything();
}

static void without_environment(void)
{
	CHECK(clearenv() == 0);
	everything();
}

/* The root folder is empty: no /proc, no /dev. A source that needs these folders reports that. */
static void without_files(void)
{
	char folder[] = "/tmp/mmun-empty-XXXXXX";
	struct mmun *mmun;
	const struct mmun_options any = {sizeof(any), 0, 0};
	const struct mmun_options own = {sizeof(own), MMUN_SOURCE_OWN, MMUN_SOURCE_OWN};
	int code;

	if (geteuid() != 0)
		SKIP;
	CHECK(mkdtemp(folder));
	if (chdir(folder) != 0 || rmdir(folder) != 0 || chroot(".") != 0)
		SKIP;
	code = mmun_open(&any, &mmun);
	if (code == 0) {
		struct mmun_status status = {.size = sizeof(status)};

		CHECK(mmun_status(mmun, &status) == 0 && status.sources && status.no_kernel[0]);
		mmun_close(mmun);
	} else {
		CHECK(code == -EOPNOTSUPP && mmun_last_error()[0]);
	}
	CHECK(mmun_open(&own, &mmun) == 0);
	mmun_close(mmun);
	if (by(MMUN_SOURCE_OWN))
		everything();
}

/* The file-size limit is 0: no file can grow. */
static void without_room_for_files(void)
{
	const struct rlimit none = {0, 0};

	signal(SIGXFSZ, SIG_IGN);
	CHECK(setrlimit(RLIMIT_FSIZE, &none) == 0);
	everything();
}

/* The kernel refuses new threads and processes, as it does at the limits RLIMIT_NPROC and
 * pids.max. */
static void without_threads(void)
{
	struct sock_filter program[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clone, 1, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clone3, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EAGAIN),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	const struct sock_fprog filter = {sizeof(program) / sizeof(program[0]), program};
	const struct mmun_options own = {sizeof(own), MMUN_SOURCE_OWN, MMUN_SOURCE_OWN};
	const struct mmun_options kernel = {sizeof(kernel), MMUN_SOURCE_KERNEL, MMUN_SOURCE_KERNEL};
	const struct mmun_options any = {sizeof(any), MMUN_SOURCE_KERNEL | MMUN_SOURCE_OWN, 0};
	struct mmun_status status = {.size = sizeof(status)};
	struct mmun_subscription *subscription;
	struct mmun_regcache *cache;
	struct mmun_lease lease;
	struct mmun_watch *watch;
	atomic_ulong changes = 0;
	struct mmun *mmun;
	char *memory;

	CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
	CHECK(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0);
	if (by(MMUN_SOURCE_KERNEL)) {
		CHECK(mmun_open(&kernel, &mmun) < 0 && mmun_last_error()[0]);
		CHECK(mmun_open(&any, &mmun) == 0);
		CHECK(mmun_status(mmun, &status) == 0 && status.no_kernel[0]);
		mmun_close(mmun);
		CHECK(mmun_open(&own, &mmun) == 0);
		mmun_close(mmun);
		return;
	}
	mmun = opened();
	memory = mapped();
	subscription = subscribed(mmun, &changes);
	cache = cached(mmun);
	CHECK(mmun_watch(mmun, memory, LENGTH, &watch) == 0 && mmun_watch_valid(watch));
	CHECK(mmun_regcache_get(cache, memory, LENGTH, &lease) == 0 && mmun_lease_valid(&lease));
	change(memory);
	CHECK(!mmun_watch_valid(watch) && !mmun_lease_valid(&lease) && atomic_load(&changes) > 0);
	mmun_regcache_put(&lease);
	mmun_unwatch(watch);
	CHECK(mmun_unsubscribe(subscription) == 0);
	CHECK(mmun_regcache_close(cache) == 0);
	mmun_close(mmun);
}

void surroundings(void)
{
	RUN(without_threads);
	RUN(signals_come_all_the_time);
	RUN(signals_are_for_the_threads_of_the_program);
	RUN(all_signals_are_blocked);
	RUN(without_environment);
	RUN(without_files);
	RUN(without_room_for_files);
}
