/* A condition that must hold, or the program ends with the place. */
#ifndef CHECKED_H
#define CHECKED_H

#include <stdio.h>
#include <unistd.h>

/* What is known beside the condition. */
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
