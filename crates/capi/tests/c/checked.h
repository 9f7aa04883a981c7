/* CHECK: a condition that must hold. If it does not, the program prints the condition and ends. */
#ifndef CHECKED_H
#define CHECKED_H

#include <stdio.h>
#include <unistd.h>

/* A text that CHECK appends to its message. */
#ifndef WHY
#define WHY ""
#endif

#define CHECK(condition)                                                             \
	do {                                                                         \
		if (!(condition)) {                                                  \
			fprintf(stderr, "%s:%d: %s %s\n", __FILE__, __LINE__,       \
				#condition, WHY);                                    \
			_exit(1);                                                    \
		}                                                                    \
	} while (0)

#endif
