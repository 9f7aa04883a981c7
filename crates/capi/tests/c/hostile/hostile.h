/* Shared by the hostile programs. */
#ifndef HOSTILE_H
#define HOSTILE_H

#define _GNU_SOURCE
#include <mmun/mmu_notifier.h>
#include <mmun/mmun.h>

#define WHY mmun_last_error()
#include "../checked.h"

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>

#define LENGTH ((size_t)65536)

/* Opens the source that the argument names, and checks that this source runs. */
struct mmun *opened(void);
bool by(uint32_t which);
struct mmun_regcache *cached(struct mmun *mmun);
struct mmun_subscription *subscribed(struct mmun *mmun, atomic_ulong *changes);
char *mapped(void);
void change(char *memory);
void holds(struct mmun_watch *watch);
void everything(void);
pthread_t spawn(void *(*run)(void *), void *argument);
void run(const char *name, void (*what)(void));
#define RUN(name) run(#name, name)
#define SKIP _exit(77)

void descriptors(void);
void surroundings(void);
void a_small_stack(void);
void threads(void);
void ends(void);

#endif
