/* liburcu's "bulletproof" flavour, in which threads need not register. */
#include <urcu/urcu-bp.h>
#include <time.h>

static double now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e9 + t.tv_nsec;
}

double peer_bp_read(long rounds)
{
	double start;

	urcu_bp_read_lock();
	urcu_bp_read_unlock();
	start = now_ns();
	for (long i = 0; i < rounds; i++) {
		urcu_bp_read_lock();
		__asm__ volatile("" ::: "memory");
		urcu_bp_read_unlock();
	}
	return now_ns() - start;
}
