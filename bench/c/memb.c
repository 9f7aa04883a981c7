/* liburcu's "memb" flavour: sys_membarrier in the updater, a compiler fence in the reader. */
#define RCU_MEMBARRIER
#include <urcu/urcu-memb.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static double now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e9 + t.tv_nsec;
}

void peer_memb_register(void) { urcu_memb_register_thread(); }
void peer_memb_unregister(void) { urcu_memb_unregister_thread(); }

double peer_memb_read(long rounds)
{
	double start = now_ns();

	for (long i = 0; i < rounds; i++) {
		urcu_memb_read_lock();
		__asm__ volatile("" ::: "memory");
		urcu_memb_read_unlock();
	}
	return now_ns() - start;
}

double peer_memb_synchronize(long rounds)
{
	double start = now_ns();

	for (long i = 0; i < rounds; i++)
		urcu_memb_synchronize_rcu();
	return now_ns() - start;
}

static void nothing(struct rcu_head *head) { (void)head; }

double peer_memb_call(long rounds)
{
	struct rcu_head *heads = calloc(rounds, sizeof(*heads));
	double elapsed, start = now_ns();

	for (long i = 0; i < rounds; i++)
		urcu_memb_call_rcu(&heads[i], nothing);
	elapsed = now_ns() - start;
	urcu_memb_barrier();
	free(heads);
	return elapsed;
}

struct late {
	struct rcu_head head;
	_Atomic double at;
};

static void called(struct rcu_head *head) { ((struct late *)head)->at = now_ns(); }

/* Returns the time from the end of the only section to the callback. The callback is queued a
 * millisecond before that end. */
double peer_memb_latency(void)
{
	struct late late = { .at = 0 };
	double start;

	urcu_memb_read_lock();
	urcu_memb_call_rcu(&late.head, called);
	usleep(1000);
	start = now_ns();
	urcu_memb_read_unlock();
	while (late.at == 0)
		usleep(10);
	return late.at - start;
}
