/* Shared by the scenario programs: a driver that records its callbacks, gates, and threads. */
#ifndef CHECK_H
#define CHECK_H

#include "checked.h"
#include <mmun/mmu_notifier.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096ul
#define SCENARIO(name) static void name(void)
/* Runs a scenario, and waits for its frees before the next scenario begins. */
#define RUN(name)                                                                                    \
	do {                                                                                         \
		name();                                                                              \
		mmu_notifier_synchronize();                                                          \
		printf("ok %s\n", #name);                                                            \
		fflush(stdout);                                                                      \
	} while (0)

enum at { ALLOC, START, END, RELEASE, FREE, FLUSH, YOUNG, AT_MAX };

/* A driver's object. */
struct probe {
	int name;
	atomic_int count[AT_MAX];
	struct mmu_notifier mn; /* Not the first field, so only container_of finds the object. */
	void (*hook)(struct probe *, enum at, const struct mmu_notifier_range *);
	int refuse; /* Return value of start. */
	unsigned long last_start, last_end;
	enum mmu_notifier_event last_event;
	void *last_owner;
	bool last_blockable;
};

/* The callbacks in the order in which they ran, each as name * 10 + at. */
extern int order[256];
extern atomic_int happened;
extern atomic_int allocs, frees;

extern const struct mmu_notifier_ops ops, other_ops, failing_ops, flush_ops, both_ops, bare_ops;
/* The name that alloc_notifier of `ops` gives to the next object. */
extern int next_name;
extern void (*next_hook)(struct probe *, enum at, const struct mmu_notifier_range *);

struct probe *probe_of(struct mmu_notifier *mn);
struct probe *probe_new(int name, const struct mmu_notifier_ops *table);
struct probe *got(struct mm_struct *mm, const struct mmu_notifier_ops *table, int name);
void event(struct mm_struct *mm, unsigned long page);
void forget(void);
/* Returns the names of the objects whose callback `at` ran, in that order, as decimal digits. */
long names(enum at at);
/* Waits until another thread has made the condition true. */
#define AWAIT(condition)                                                                             \
	while (!(condition))                                                                         \
		sched_yield()

/* A callback posts `arrived` and then waits for `open`. */
struct gate {
	sem_t arrived, open;
};
extern struct gate gate;
void gate_reset(void);
void stop_at_start(struct probe *, enum at, const struct mmu_notifier_range *);
void stop_at_release(struct probe *, enum at, const struct mmu_notifier_range *);
void stop_at_free(struct probe *, enum at, const struct mmu_notifier_range *);

pthread_t spawn(void *(*run)(void *), void *argument);
void join(pthread_t thread);
/* Runs `f` in a child process. Returns whether SIGABRT ends the child. */
bool aborts(void (*f)(void));
bool child_succeeds(void (*f)(void));

void get_put(void);
void life(void);
void events(void);
void intervals(void);
void waits(void);

#endif
