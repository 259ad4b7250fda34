/* The heartbeat of beat.h for a program that knows nothing of it: LD_PRELOAD. */
#include "beat.h"

__attribute__((constructor)) static void begin(void)
{
	start_beat();
}
